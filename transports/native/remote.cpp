#include "remote.hpp"

#include <utility>

#include "layout.hpp"

namespace abccl {

uint8_t* RemoteQueue::Buffer::start() const {
    return reinterpret_cast<uint8_t*>(Geometry::round_up(reinterpret_cast<size_t>(memory.get()), cache_line));
}

void RemoteQueue::begin(uint32_t lanes) {
    awaited_.assign(lanes, 0);
    leaving_.assign(lanes, 0);
}

uint32_t RemoteQueue::take_buffer(size_t bytes) {
    const size_t needed = header_bytes_ + bytes;
    for (size_t i = free_.size(); i-- > 0;) {
        const uint32_t buffer = free_[i];
        if (buffers_[buffer].bytes < needed) continue;
        free_.erase(free_.begin() + static_cast<std::ptrdiff_t>(i));
        return buffer;
    }
    // One that is too short makes room for one that is not.
    uint32_t buffer = static_cast<uint32_t>(buffers_.size());
    if (free_.empty()) {
        buffers_.emplace_back();
    } else {
        buffer = free_.back();
        free_.pop_back();
    }
    buffers_[buffer] = {std::unique_ptr<uint8_t[]>(new uint8_t[needed + cache_line]), needed, 0};
    return buffer;
}

void RemoteQueue::post(bool sends, uint32_t peer, uint32_t lane, size_t row, int64_t segment, uint32_t buffer,
                       size_t bytes) {
    uint32_t id = static_cast<uint32_t>(pending_.size());
    if (unused_.empty()) {
        pending_.emplace_back();
    } else {
        id = unused_.back();
        unused_.pop_back();
    }
    const RemoteMessage message{id, sends, peer, lane, row, segment, buffers_[buffer].start(), header_bytes_ + bytes};
    pending_[id] = {message, buffer, posted_++};
    fresh_.push_back(message);
    if (sends) ++buffers_[buffer].uses;
    ++(sends ? leaving_ : awaited_)[lane];
}

std::vector<RemoteMessage> RemoteQueue::take() { return std::exchange(fresh_, {}); }

void RemoteQueue::complete(uint32_t id) {
    Pending& pending = pending_[id];
    const RemoteMessage& message = pending.message;
    if (message.sends && --buffers_[pending.buffer].uses == 0) give_back(pending.buffer);
    --(message.sends ? leaving_ : awaited_)[message.lane];
    pending.buffer = none;
    unused_.push_back(id);
}

const RemoteMessage* RemoteQueue::first_pending(uint32_t lane) const {
    const Pending* first = nullptr;
    for (const Pending& pending : pending_) {
        if (pending.buffer == none || pending.message.lane != lane) continue;
        // What is to be received first: what is to be sent may only wait for room.
        const bool before = !first || std::make_pair(pending.message.sends, pending.order) <
                                          std::make_pair(first->message.sends, first->order);
        if (before) first = &pending;
    }
    return first ? &first->message : nullptr;
}

}  // namespace abccl
