#include "mailbox.hpp"

#include <algorithm>
#include <cstring>

#include "failure.hpp"

namespace abccl {
namespace {

// The first message on the channel announces the user's; what follows it is bytes.
struct Announcement {
    uint64_t bytes;
    int64_t tag;
};
constexpr uint32_t announcement_signature = 0x5E4DBEEF;
constexpr uint32_t bytes_signature = 0x5E4DDA7A;
constexpr size_t bytes_with_announcement = inline_bytes - sizeof(Announcement);

}  // namespace

Mailbox::Mailbox(Endpoint& endpoint)
    : endpoint_(endpoint),
      lane_(endpoint.geometry().lanes),
      sending_(endpoint.geometry().size),
      arriving_(endpoint.geometry().size) {}

void Mailbox::check_peer(int64_t peer) const {
    if (peer < 0 || peer >= endpoint_.geometry().size || peer == endpoint_.rank())
        throw Failure(Kind::argument, "send/recv: the peer must be another rank, and is " + std::to_string(peer));
}

// A thread that waits for the message may sleep while another has moved it.
void Mailbox::succeed(Work& work, uint64_t recorded, uint32_t peer) {
    endpoint_.recorder().end_message(recorded, static_cast<int32_t>(endpoint_.user_rank(peer)), true);
    work.succeed();
    endpoint_.ring_self();
}

void Mailbox::fail(Work& work, uint64_t recorded, const std::exception_ptr& error) {
    endpoint_.recorder().end_message(recorded, nobody, false);
    work.fail(error);
}

uint64_t Mailbox::record(bool sends, int32_t peer, int64_t tag, size_t bytes) {
    if (!records || (tag < 0 && tag != any_tag)) return 0;
    const int32_t whom =
        peer == any_source ? nobody : static_cast<int32_t>(endpoint_.user_rank(static_cast<uint32_t>(peer)));
    return endpoint_.recorder().begin_message(sends, whom, tag, bytes);
}

std::shared_ptr<Work> Mailbox::post_send(uint32_t peer, int64_t tag, const void* data, size_t bytes,
                                         Deadline deadline) {
    check_peer(peer);
    std::lock_guard<std::mutex> lock(mutex_);
    endpoint_.check_abort();
    auto work = std::make_shared<Work>();
    sending_[peer].push_back({work, tag, static_cast<const uint8_t*>(data), bytes, 0, false, deadline,
                              record(true, static_cast<int32_t>(peer), tag, bytes)});
    return work;
}

std::shared_ptr<Work> Mailbox::post_receive(int32_t source, int64_t tag, void* data, size_t bytes, Deadline deadline) {
    if (source != any_source) check_peer(source);
    std::lock_guard<std::mutex> lock(mutex_);
    endpoint_.check_abort();
    Receiving receive{std::make_shared<Work>(),         source, tag, static_cast<uint8_t*>(data), bytes, deadline,
                      record(false, source, tag, bytes)};
    auto found = std::find_if(unexpected_.begin(), unexpected_.end(),
                              [&](const Unexpected& u) { return receive.accepts(u.peer, u.tag); });
    if (found == unexpected_.end()) {
        receiving_.push_back(receive);
        return receive.work;
    }
    check_length(receive, found->peer, found->bytes.size());
    if (bytes) std::memcpy(receive.data, found->bytes.data(), bytes);
    receive.work->source = found->peer;
    endpoint_.recorder().end_message(receive.recorded, static_cast<int32_t>(endpoint_.user_rank(found->peer)), true);
    unexpected_.erase(found);
    receive.work->succeed();
    return receive.work;
}

void Mailbox::check_signature(uint32_t peer, const Descriptor& descriptor, uint32_t signature) {
    if (descriptor.signature == signature) return;
    endpoint_.fail(static_cast<uint32_t>(Kind::mismatch), "send/recv: " + endpoint_.name(peer) + " and " +
                                                              endpoint_.name(endpoint_.rank()) +
                                                              " run different versions of abccl");
}

void Mailbox::check_length(const Receiving& receive, uint32_t peer, size_t bytes) {
    if (bytes == receive.bytes) return;
    endpoint_.fail(static_cast<uint32_t>(Kind::mismatch),
                   "recv: " + endpoint_.name(endpoint_.rank()) + " wants " + std::to_string(receive.bytes) +
                       " bytes from " + endpoint_.name(peer) + ", whose send has " + std::to_string(bytes) +
                       ": both sides must name the same length");
}

Outcome Mailbox::progress() {
    std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock) return Outcome::blocked;
    bool moved = false;
    for (uint32_t peer = 0; peer < endpoint_.geometry().size; ++peer) {
        if (peer == endpoint_.rank()) continue;
        moved |= progress_sends(peer);
        moved |= progress_receives(peer);
    }
    return moved ? Outcome::moved : any_pending() ? Outcome::blocked : Outcome::done;
}

bool Mailbox::any_pending() const {
    return !receiving_.empty() ||
           std::any_of(sending_.begin(), sending_.end(), [](const auto& queue) { return !queue.empty(); }) ||
           std::any_of(arriving_.begin(), arriving_.end(), [](const Arriving& a) { return a.matched; });
}

bool Mailbox::idle() {
    std::lock_guard<std::mutex> lock(mutex_);
    return !any_pending();
}

bool Mailbox::progress_sends(uint32_t peer) {
    bool moved = false;
    while (!sending_[peer].empty()) {
        Sending& s = sending_[peer].front();
        const size_t left = s.bytes - s.moved;
        if (!s.announced) {
            const Announcement announcement{s.bytes, s.tag};
            const size_t now = s.bytes <= bytes_with_announcement ? s.bytes : 0;
            const Span spans[2] = {{&announcement, sizeof(announcement)}, {s.data, now}};
            if (!endpoint_.try_send(&peer, 1, lane_, announcement_signature, spans, now ? 2 : 1,
                                    sizeof(announcement) + now, endpoint_.streaming_from()))
                return moved;
            s.announced = true;
            s.moved = now;
        } else {
            const Span span{s.data + s.moved, std::min<size_t>(left, endpoint_.geometry().slot_bytes)};
            if (!endpoint_.try_send(&peer, 1, lane_, bytes_signature, &span, 1, span.bytes, endpoint_.streaming_from()))
                return moved;
            s.moved += span.bytes;
        }
        moved = true;
        if (s.moved == s.bytes) {
            succeed(*s.work, s.recorded, peer);
            sending_[peer].pop_front();
        }
    }
    return moved;
}

bool Mailbox::progress_receives(uint32_t peer) {
    bool moved = false;
    Arriving& a = arriving_[peer];
    for (;;) {
        const bool wanted =
            std::any_of(receiving_.begin(), receiving_.end(), [&](const Receiving& r) { return r.from(peer); });
        if (!a.open) {
            // What nobody waits for stays with its sender: its memory is bounded, ours stays free.
            if (!wanted) return moved;
            const Descriptor* descriptor = endpoint_.try_receive(peer, lane_);
            if (!descriptor) return moved;
            check_signature(peer, *descriptor, announcement_signature);
            const uint8_t* payload = endpoint_.payload(peer, *descriptor);
            Announcement announcement;
            std::memcpy(&announcement, payload, sizeof(announcement));
            const size_t now = descriptor->length - sizeof(announcement);
            if (now > bytes_with_announcement || (now != 0 && now != announcement.bytes) ||
                announcement.bytes > PTRDIFF_MAX)
                endpoint_.spoilt(peer);
            a.open = true;
            a.tag = announcement.tag;
            a.bytes = announcement.bytes;
            a.moved = 0;
            a.matched = a.unexpected = false;
            a.kept.assign(payload + sizeof(announcement), payload + sizeof(announcement) + now);
            endpoint_.release(peer, lane_);
            moved = true;
        }
        settle(peer, a);
        if (!a.matched && !a.unexpected) {
            if (!wanted) return moved;
            a.unexpected = true;  // somebody waits for what is behind this message
            a.moved = a.kept.size();
        }
        while (a.moved < a.bytes) {
            const Descriptor* descriptor = endpoint_.try_receive(peer, lane_);
            if (!descriptor) return moved;
            check_signature(peer, *descriptor, bytes_signature);
            const uint8_t* payload = endpoint_.payload(peer, *descriptor);
            const size_t now = descriptor->length;
            if (now > a.bytes - a.moved) endpoint_.spoilt(peer);
            // What nobody waits for takes memory as it comes, whatever length was announced.
            if (a.matched)
                std::memcpy(a.receive.data + a.moved, payload, now);
            else
                a.kept.insert(a.kept.end(), payload, payload + now);
            a.moved += now;
            endpoint_.release(peer, lane_);
            moved = true;
        }
        finish(peer, a);
        moved = true;
    }
}

// Looks for the receive that an open message belongs to, as long as its bytes have nowhere to go.
void Mailbox::settle(uint32_t peer, Arriving& a) {
    if (a.matched || a.unexpected) return;
    auto found =
        std::find_if(receiving_.begin(), receiving_.end(), [&](const Receiving& r) { return r.accepts(peer, a.tag); });
    if (found == receiving_.end()) return;
    check_length(*found, peer, a.bytes);
    a.receive = *found;
    receiving_.erase(found);
    a.matched = true;
    if (!a.kept.empty()) std::memcpy(a.receive.data, a.kept.data(), a.kept.size());
    a.moved = a.kept.size();
}

void Mailbox::finish(uint32_t peer, Arriving& a) {
    a.open = false;
    if (a.unexpected) {
        auto found = std::find_if(receiving_.begin(), receiving_.end(),
                                  [&](const Receiving& r) { return r.accepts(peer, a.tag); });
        if (found == receiving_.end()) {
            unexpected_.push_back({peer, a.tag, std::move(a.kept)});
            a.kept.clear();
            return;
        }
        check_length(*found, peer, a.bytes);
        if (a.bytes) std::memcpy(found->data, a.kept.data(), a.bytes);
        a.receive = *found;
        receiving_.erase(found);
    }
    a.matched = false;
    a.kept.clear();
    a.receive.work->source = peer;
    succeed(*a.receive.work, a.receive.recorded, peer);
    a.receive.work.reset();
}

void Mailbox::check() {
    endpoint_.check_abort();
    const uint32_t size = endpoint_.geometry().size;
    const uint32_t self = endpoint_.rank();
    std::lock_guard<std::mutex> lock(mutex_);
    uint32_t left = size - 1, last_gone = 0;
    for (uint32_t peer = 0; peer < size; ++peer) {
        if (peer == self || !endpoint_.gone(peer)) continue;
        --left;
        last_gone = peer;
        progress_receives(peer);  // what it sent before it went
        if (!sending_[peer].empty()) endpoint_.lost(peer, "a send to it");
        const bool awaited = std::any_of(receiving_.begin(), receiving_.end(), [&](const Receiving& r) {
            return r.source != any_source && r.from(peer) && !r.work->standing.load();
        });
        if (awaited || arriving_[peer].matched) endpoint_.lost(peer, "a receive from it");
    }
    const bool from_anybody =
        std::any_of(receiving_.begin(), receiving_.end(), [](const Receiving& r) { return r.source == any_source; });
    if (left == 0 && size > 1 && from_anybody) endpoint_.lost(last_gone, "a receive from any rank");
    const Deadline now = Clock::now();
    const std::string rank = endpoint_.name(self);
    const auto expired = [&](const std::string& what, int32_t peer) {
        const std::string where = peer == any_source ? "" : endpoint_.whereabouts(static_cast<uint32_t>(peer));
        endpoint_.fail(static_cast<uint32_t>(Kind::deadline), what + endpoint_.in_group() + where);
    };
    for (uint32_t peer = 0; peer < size; ++peer)
        if (const Arriving& a = arriving_[peer]; a.matched && now > a.receive.deadline)
            expired("recv: " + rank + " waits for the rest of " + std::to_string(a.bytes) + " bytes from " +
                        endpoint_.name(peer) + " (" + std::to_string(a.moved) + " have come)",
                    static_cast<int32_t>(peer));
    for (const Receiving& r : receiving_)
        if (now > r.deadline)
            expired("recv: " + rank + " waits for " + std::to_string(r.bytes) + " bytes from " +
                        (r.source == any_source ? "any rank" : endpoint_.name(static_cast<uint32_t>(r.source))) +
                        (r.tag == any_tag ? "" : " with tag " + std::to_string(r.tag)) + ", and no such send was made",
                    r.source);
    for (uint32_t peer = 0; peer < size; ++peer)
        for (const Sending& s : sending_[peer])
            if (now > s.deadline)
                expired("send: " + rank + " waits for " + endpoint_.name(peer) + " to receive " +
                            std::to_string(s.bytes) + " bytes with tag " + std::to_string(s.tag),
                        static_cast<int32_t>(peer));
}

void Mailbox::fail(std::exception_ptr error) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto& queue : sending_) {
        for (Sending& s : queue) fail(*s.work, s.recorded, error);
        queue.clear();
    }
    for (Receiving& r : receiving_) fail(*r.work, r.recorded, error);
    receiving_.clear();
    for (Arriving& a : arriving_)
        if (a.matched && a.receive.work) {
            fail(*a.receive.work, a.receive.recorded, error);
            a.matched = false;
        }
}

}  // namespace abccl
