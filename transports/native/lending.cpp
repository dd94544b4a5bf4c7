// The endpoint's messages that are read where they lie: in registered memory that peers map, or in private memory that
// they pull.
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "endpoint.hpp"
#include "failure.hpp"

namespace abccl {
namespace {

// Between calls that read a peer's memory an abort is seen. (One call reads 2 GiB at most.)
constexpr size_t longest_pull = 16 << 20;

}  // namespace

bool Endpoint::can_lend(const Span* spans, size_t span_count) const {
    if (span_count > lent_parts) return false;
    for (size_t i = 0; i < span_count && !pulls_; ++i)
        if (spans[i].bytes != 0 && !in_heap(spans[i].data)) return false;
    return true;
}

bool Endpoint::try_lend(const uint32_t* peers, uint32_t n, uint32_t lane, uint32_t signature, const Span* spans,
                        size_t span_count, size_t bytes, bool whole, uint32_t* numbers) {
    if (!has_room(peers, n, lane)) return false;
    bool registered = !whole;
    for (size_t i = 0; i < span_count; ++i)
        if (spans[i].bytes != 0) registered = registered && in_heap(spans[i].data);
    const uint64_t origin = registered ? reinterpret_cast<uint64_t>(heap_->base()) : 0;
    uint64_t parts[lent_parts];
    for (size_t i = 0; i < span_count; ++i)
        parts[i] = spans[i].bytes != 0 ? reinterpret_cast<uint64_t>(spans[i].data) - origin : 0;
    const uint32_t where = registered ? direct : whole ? pulled_whole : pulled;
    for (uint32_t i = 0; i < n; ++i) {
        Descriptor& descriptor = next_descriptor(peers[i], lane, signature, bytes, where);
        std::memcpy(descriptor.payload, parts, span_count * sizeof(uint64_t));
        publish(peers[i], lane);
        numbers[i] = outgoing_[geometry_.channel(peers[i], lane)].next;
    }
    return true;
}

const uint8_t* Endpoint::direct_part(uint32_t peer, const Descriptor& descriptor, size_t part, size_t bytes) {
    if (!heaps_[peer]) {
        const Control& theirs = control(peer);
        try {
            heaps_[peer] =
                Region::attach(theirs.pid, theirs.heap_fd, theirs.heap_bytes.load(std::memory_order_acquire));
        } catch (const Failure& failure) {
            if (gone(peer)) lost(peer, *text_ + " #" + shown(sequence_));
            fail(static_cast<uint32_t>(Kind::transport),
                 name(rank_) + " could not map the registered memory of " + name(peer) + ": " + failure.what());
        }
    }
    uint64_t offset;
    std::memcpy(&offset, descriptor.payload + part * sizeof(offset), sizeof(offset));
    const size_t available = heaps_[peer]->bytes();
    if (offset > available || bytes > available - offset) mismatch(peer, " (a message lies outside registered memory)");
    return heaps_[peer]->base() + offset;
}

void Endpoint::pull(uint32_t peer, const Descriptor& descriptor, const Span* spans, size_t span_count) {
    iovec here[lent_parts], there[lent_parts];
    size_t wanted = 0;
    for (size_t i = 0; i < span_count; ++i) {
        uint64_t address;
        std::memcpy(&address, descriptor.payload + i * sizeof(address), sizeof(address));
        here[i] = {const_cast<void*>(spans[i].data), spans[i].bytes};
        there[i] = {reinterpret_cast<void*>(address), spans[i].bytes};
        wanted += spans[i].bytes;
    }
    if (wanted <= longest_pull) return pull_some(peer, here, there, span_count, wanted);
    for (size_t i = 0; i < span_count; ++i)
        for (size_t done = 0; done < spans[i].bytes; done += longest_pull) {
            check_abort();
            const size_t now = std::min(longest_pull, spans[i].bytes - done);
            const iovec to{static_cast<uint8_t*>(here[i].iov_base) + done, now};
            const iovec from{static_cast<uint8_t*>(there[i].iov_base) + done, now};
            pull_some(peer, &to, &from, 1, now);
        }
}

void Endpoint::pull_some(uint32_t peer, const iovec* here, const iovec* there, size_t count, size_t wanted) {
    const ssize_t got = process_vm_readv(control(peer).pid, here, count, there, count, 0);
    if (got == static_cast<ssize_t>(wanted)) return;
    const int error = errno;
    check_abort();
    if (got < 0 && error == ESRCH) lost(peer, *text_ + " #" + shown(sequence_));
    fail(static_cast<uint32_t>(Kind::transport),
         name(rank_) + " could not read " + std::to_string(wanted) + " bytes of " + name(peer) + "'s memory" +
             (got < 0 ? std::string(": ") + std::strerror(error) : "") + ": was a buffer freed while the call ran?");
}

bool Endpoint::readable(const void* address, size_t bytes) const {
    if (bytes == 0) return true;
    uint8_t ends[2];
    auto* first = static_cast<uint8_t*>(const_cast<void*>(address));
    iovec here{ends, 2}, there[2] = {{first, 1}, {first + bytes - 1, 1}};
    return process_vm_readv(getpid(), &here, 1, there, 2, 0) == 2;
}

std::shared_ptr<Region> Endpoint::heap(size_t bytes) {
    if (!heap_) {
        heap_ = Region::create(bytes, "abccl-heap");
        control_->heap_fd = heap_->fd();
        control_->heap_bytes.store(bytes, std::memory_order_release);
        heap_base_.store(heap_->base(), std::memory_order_release);
    }
    return heap_;
}

bool Endpoint::can_read(uint32_t peer, uint64_t address_of_token, uint64_t token) const {
    uint64_t found = 0;
    iovec here{&found, sizeof(found)}, there{reinterpret_cast<void*>(address_of_token), sizeof(found)};
    return process_vm_readv(control(peer).pid, &here, 1, &there, 1, 0) == sizeof(found) && found == token;
}

}  // namespace abccl
