// The user's sends and receives: a channel of their own per pair of ranks, matched by (source, tag) in order, so
// that an unread message never blocks a collective.
#pragma once

#include <deque>
#include <list>
#include <memory>
#include <mutex>
#include <vector>

#include "endpoint.hpp"
#include "work.hpp"

namespace abccl {

constexpr int32_t any_source = -1;
constexpr int64_t any_tag = INT64_MIN;

class Mailbox {
  public:
    explicit Mailbox(Endpoint& endpoint);

    // Whether its messages are recorded here; not where somebody else records what the user sends.
    bool records = true;

    // The bytes must stay as they are until the work is finished.
    std::shared_ptr<Work> post_send(uint32_t peer, int64_t tag, const void* data, size_t bytes, Deadline deadline);
    // Receives exactly `bytes` bytes; a matching message of another length is a Mismatch. Any tag is any that is not
    // negative: those are the library's own.
    std::shared_ptr<Work> post_receive(int32_t source, int64_t tag, void* data, size_t bytes, Deadline deadline);

    // Moves what can be moved without waiting. Any thread may call it. Done: nothing is pending.
    Outcome progress();
    // Throws if what is pending can not end: aborted, a peer gone, a deadline passed.
    void check();
    // Fails all that is pending.
    void fail(std::exception_ptr error);
    // Whether nothing is pending.
    bool idle();

  private:
    struct Sending {
        std::shared_ptr<Work> work;
        int64_t tag;
        const uint8_t* data;
        size_t bytes;
        size_t moved;
        bool announced;
        Deadline deadline;
        uint64_t recorded;  // its number in the flight recorder
    };
    struct Receiving {
        std::shared_ptr<Work> work;
        int32_t source;
        int64_t tag;
        uint8_t* data;
        size_t bytes;
        Deadline deadline;
        uint64_t recorded;
        bool accepts(uint32_t peer, int64_t message_tag) const {
            return from(peer) && (tag == any_tag ? message_tag >= 0 : tag == message_tag);
        }
        bool from(uint32_t peer) const { return source == any_source || static_cast<uint32_t>(source) == peer; }
    };
    // The first message of a channel that is not yet wholly here.
    struct Arriving {
        bool open = false;
        int64_t tag = 0;
        size_t bytes = 0;
        size_t moved = 0;
        bool matched = false;     // into the user's buffer
        bool unexpected = false;  // into `kept`
        Receiving receive{};
        std::vector<uint8_t> kept;  // the bytes that came before it was known where they go
    };
    struct Unexpected {
        uint32_t peer;
        int64_t tag;
        std::vector<uint8_t> bytes;
    };

    bool progress_sends(uint32_t peer);
    bool progress_receives(uint32_t peer);
    void settle(uint32_t peer, Arriving& arriving);
    void finish(uint32_t peer, Arriving& arriving);
    void check_length(const Receiving& receive, uint32_t peer, size_t bytes);
    void check_signature(uint32_t peer, const Descriptor& descriptor, uint32_t signature);
    void check_peer(int64_t peer) const;
    bool any_pending() const;
    // The user's messages are recorded, not the library's own.
    uint64_t record(bool sends, int32_t peer, int64_t tag, size_t bytes);
    void succeed(Work& work, uint64_t recorded, uint32_t peer);
    void fail(Work& work, uint64_t recorded, const std::exception_ptr& error);

    Endpoint& endpoint_;
    uint32_t lane_;
    std::mutex mutex_;
    std::vector<std::deque<Sending>> sending_;  // by peer
    std::deque<Receiving> receiving_;           // in the order posted
    std::vector<Arriving> arriving_;            // by peer
    std::list<Unexpected> unexpected_;          // in the order arrived
};

}  // namespace abccl
