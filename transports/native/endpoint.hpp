// One rank's end of a shared-memory group: its channels to every peer, and how it waits, aborts and diagnoses.
#pragma once

#include <sys/uio.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "flight.hpp"
#include "layout.hpp"
#include "region.hpp"

namespace abccl {

using Clock = std::chrono::steady_clock;
using Deadline = Clock::time_point;

inline void cpu_relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

enum class Outcome { blocked, moved, done };

// Where in a slot of an arena the next message goes: behind the last one. A line that its reader has still in its cache
// takes a round trip to be written again (measured: 64 KiB in 9.5 us, not 3.6), and a reader's cache forgets in the
// end. So short messages walk through all of a slot.
class Cursor {
  public:
    size_t place(size_t bytes, size_t slot_bytes) {
        const size_t length = Geometry::round_up(bytes, cache_line);
        const size_t at = next_ + length > slot_bytes ? 0 : next_;
        next_ = static_cast<uint32_t>(at + length);
        return at;
    }

  private:
    uint32_t next_ = 0;
};

// The sender's side of a channel (pair of ranks, lane). Its counters are private, its ring and arena shared.
struct Outgoing {
    Descriptor* ring;
    uint8_t* arena;
    std::vector<Cursor> cursors;  // of the slots
    std::atomic<uint32_t>* tail;  // in the peer's region
    uint32_t next = 0;
    uint32_t seen_tail = 0;
};

// The receiver's side of a channel.
struct Incoming {
    Descriptor* ring;  // in the peer's region
    std::atomic<uint32_t>* tail;
    uint32_t next = 0;
};

// A slot of the multicast arena is free again when all its readers' tails have passed.
struct MulticastSlot {
    Cursor cursor;
    std::vector<std::pair<uint32_t, uint32_t>> readers;  // (peer, number of the message on the peer's channel)
};

struct Span {
    const void* data;
    size_t bytes;
};

// How long a wait spins (checks), then yields the core (times), before it sleeps.
struct Patience {
    int spins;
    int yields;
};

class Endpoint {
  public:
    Endpoint(uint32_t rank, Geometry geometry, std::shared_ptr<Region> own);
    ~Endpoint();
    Endpoint(const Endpoint&) = delete;
    Endpoint& operator=(const Endpoint&) = delete;

    // Announces the own region with a random token, which peers check.
    void announce(uint64_t token);
    void attach(uint32_t peer, std::shared_ptr<Region> region, uint64_t token);

    uint32_t rank() const { return rank_; }
    // "rank 5": what the users call a rank of this endpoint, which may serve some of theirs only.
    std::string name(uint32_t rank) const { return "rank " + std::to_string(user_rank(rank)); }
    uint32_t user_rank(uint32_t rank) const { return rank < names_.size() ? names_[rank] : rank; }
    void set_names(std::vector<uint32_t> names);
    // What the users call the communicator, and a number that all its ranks on this host share.
    void set_group(const std::string& name, uint64_t token);
    // " in group "default"", for messages to people; nothing if it has no name.
    std::string in_group() const { return group_.empty() ? "" : " in group \"" + group_ + "\""; }
    const Geometry& geometry() const { return geometry_; }

    // ---- Channels. None of these waits.

    // Sends the spans as one message to each of the peers, or to none: false if there is no room. Messages of
    // `streaming_from` bytes or more go past the cache.
    bool try_send(const uint32_t* peers, uint32_t n, uint32_t lane, uint32_t signature, const Span* spans,
                  size_t span_count, size_t bytes, size_t streaming_from);
    // Offers the spans as one message that each of the peers reads where they lie, or offers nothing: false if there is
    // no room. They must not change before `has_read` says so of each peer, whose message gets numbers[i]. `whole`:
    // they are whole blocks, of ordinary memory.
    bool try_lend(const uint32_t* peers, uint32_t n, uint32_t lane, uint32_t signature, const Span* spans,
                  size_t span_count, size_t bytes, bool whole, uint32_t* numbers);
    // Whether these spans can be lent: few enough, and all registered, or peers can pull.
    bool can_lend(const Span* spans, size_t span_count) const;
    bool has_read(uint32_t peer, uint32_t lane, uint32_t number) const {
        const Outgoing& out = outgoing_[geometry_.channel(peer, lane)];
        return static_cast<int32_t>(out.tail->load(std::memory_order_acquire) - number) >= 0;
    }
    // The next message from the peer, or null. Its bytes stay valid until `release` of its channel.
    const Descriptor* try_receive(uint32_t peer, uint32_t lane);
    // Where its bytes lie, if not lent. What a peer says of its region is not taken on trust.
    const uint8_t* payload(uint32_t peer, const Descriptor& descriptor);
    // A peer's part of the shared memory says what no peer writes.
    [[noreturn]] void spoilt(uint32_t peer);
    // Where part number `part` of a message of the peer's heap lies.
    const uint8_t* direct_part(uint32_t peer, const Descriptor& descriptor, size_t part, size_t bytes);
    // Copies the parts of a message in the peer's private memory to where the spans say.
    void pull(uint32_t peer, const Descriptor& descriptor, const Span* spans, size_t span_count);
    // Whether peers can pull these bytes of this rank: a driver's mapping (pinned memory, say) can not be read so.
    bool readable(const void* address, size_t bytes) const;
    // Gives back all messages received so far on the channel.
    void release(uint32_t peer, uint32_t lane);

    // ---- Memory of the user's that peers can read.

    // The registered memory of this rank, made at the first call: `bytes` of address space, touched only when used.
    // Peers map it when they first read from it.
    std::shared_ptr<Region> heap(size_t bytes);
    bool in_heap(const void* address) const {
        const uint8_t* base = heap_base_.load(std::memory_order_acquire);
        return base && address >= base && address < base + heap_->bytes();
    }
    // Whether this process may read the memory of the peer's: tried on its token.
    bool can_read(uint32_t peer, uint64_t address_of_token, uint64_t token) const;
    uint64_t address_of_token() const { return reinterpret_cast<uint64_t>(&control_->token); }
    // Lets ordinary memory be lent. To be set on all ranks or none, if all can read all others' memory.
    void set_pull(bool pull) { pulls_ = pull; }
    bool pulls() const { return pulls_; }

    // ---- Collectives as seen by peers.

    // Enters the next collective; returns its number. `signature` and `text`, which must live until the next, describe
    // what was called; `text_number` is the text's in the flight recorder.
    uint64_t enter(uint32_t signature, const std::string& text, uint32_t text_number);
    // The same for a collective that somebody else runs, who tells its end by `finish`.
    uint64_t begin_call(uint32_t signature, const std::string& text, uint64_t bytes);
    void finish(bool well = true) {
        recorder_.end(sequence_, well);
        if (well) control_->finished.store(sequence_, std::memory_order_release);
    }
    uint64_t sequence() const { return sequence_; }
    Recorder& recorder() { return recorder_; }
    const Recorder& recorder() const { return recorder_; }
    // The library's own collectives end here: what follows is numbered from 1 in messages to people.
    void number_from_here();
    std::string shown(uint64_t number) const;
    // The present collective: all_reduce #17 (float32, sum, 1024 elements, ring) in group "default".
    std::string title() const;
    // Throws Mismatch if `peer` is known to have called something else as its collective of the present number.
    void compare(uint32_t peer);
    // For ranks that only send, and return before their readers have read: what a run takes those.
    void tell_time(uint32_t signature, float seconds);
    double time_of(uint32_t peer, uint32_t signature) const;
    const Control& control() const { return *control_; }
    int pid(uint32_t peer) const { return control(peer).pid; }
    // Whether `peer` has entered the present collective.
    bool entered(uint32_t peer) const { return control(peer).entered.load(std::memory_order_acquire) >= sequence_; }
    // How far a rank is. Numbers are the users'.
    struct Position {
        uint64_t entered = 0, finished = 0;
        bool closed = false;
        std::string last;           // what it entered last
        std::optional<double> ago;  // seconds since it finished that; or entered it, if it has not finished
    };
    Position position(uint32_t peer) const;
    // That in words: "which has not entered #17 (last: broadcast #16, finished 4.2 s ago)".
    std::string status_words(const Position& position) const;
    std::string status(uint32_t peer) const { return status_words(position(peer)); }
    // "; rank 3 called last: broadcast #16, finished 4.2 s ago".
    std::string whereabouts(uint32_t peer) const;
    // "; rank 3 has not entered #17 ...", of those that have not entered the present collective.
    std::string stragglers(uint32_t except) const;
    // A message of collective number `sequence()` from `peer` had the wrong signature or length: throws Mismatch.
    [[noreturn]] void mismatch(uint32_t peer, const std::string& detail);

    // ---- Waiting and failing.

    // Calls `progress` until it returns done. Spins, yields, then sleeps until a peer rings or a tick has passed,
    // and calls `tick`, which throws what ends the wait. Throws as soon as the group is aborted.
    void wait(const std::function<Outcome()>& progress, const std::function<void()>& tick, Patience patience);
    void check_abort() const {
        if (control_->abort.load(std::memory_order_relaxed) != 0) throw_abort();
    }
    // Throws if the present collective can not end: aborted, a peer gone before it, a mismatch known.
    void check_collective();
    // Whether the peer's process has ended or closed its communicator.
    bool gone(uint32_t peer) const;
    [[noreturn]] void lost(uint32_t peer, const std::string& doing);
    // Makes every rank raise; the first abort wins. Never throws.
    void abort(uint32_t kind, const std::string& reason) noexcept;
    [[noreturn]] void fail(uint32_t kind, const std::string& reason);
    // Wakes this rank's own sleeping threads.
    void ring_self() {
        std::atomic_thread_fence(std::memory_order_seq_cst);
        ring_if_sleeping(*control_);
    }
    // Says goodbye to peers, and makes this rank's own waits raise.
    void close();

    // ---- What survivors of a broken group tell each other. None of these waits or looks for an abort.

    // Shows the others so many bytes, at most `board_bytes`, as round number `round`, from 1; it replaces the last but
    // one.
    void publish(uint64_t round, const void* data, size_t bytes);
    // The newest round that a peer has shown, and what it showed as this one, if that is still there.
    std::pair<uint64_t, std::optional<std::string>> published(uint32_t peer, uint64_t round) const;
    // The answer to a question: the first value that any rank gives; 0 only asks, and is the answer as long as there is
    // none. The memory outlives its owner.
    uint64_t decide(uint32_t question, uint64_t value);

    Patience patience() const { return patience_; }
    void set_patience(Patience patience) { patience_ = patience; }
    void set_streaming_from(size_t bytes) { streaming_from_ = bytes; }
    size_t streaming_from() const { return streaming_from_; }
    // Lets plans find out by themselves from here on.
    void adapt() { adapts_ = true; }
    bool adapts() const { return adapts_; }
    // One way for all plans, by its number in `Way`; none lets each plan decide. Lends only what can be lent.
    void set_way(std::optional<int> way) { way_ = way; }
    std::optional<int> way() const { return way_; }

    // To be called at every tick of a caller's wait, without locks held; may throw. (Python checks for signals here.)
    static void set_on_tick(std::function<void()> on_tick);
    static std::function<void()> on_tick;

    static Patience short_patience() { return {50, 50}; }

    // Sleep protocol, for threads that wait on more than one thing: begin, look again, then sleep or end.
    class Sleeper {
      public:
        explicit Sleeper(Endpoint& endpoint);
        ~Sleeper();
        void sleep(int milliseconds);

      private:
        Endpoint& endpoint_;
        uint32_t bell_;
    };

  private:
    bool has_room(const uint32_t* peers, uint32_t n, uint32_t lane);
    Descriptor& next_descriptor(uint32_t peer, uint32_t lane, uint32_t signature, size_t bytes, uint32_t where);
    void publish(uint32_t peer, uint32_t lane);
    void pull_some(uint32_t peer, const iovec* here, const iovec* there, size_t count, size_t wanted);
    [[noreturn]] void throw_abort() const;
    [[noreturn]] void refuse_pair(uint64_t number, const std::string& ours, uint32_t peer, const std::string& theirs);
    void ring_if_sleeping(Control& control) {
        if (control.sleepers.load(std::memory_order_relaxed) != 0) ring(control);
    }
    static void ring(Control& control);
    bool multicast_is_free(uint32_t lane) const;
    void write(uint8_t* destination, const Span* spans, size_t span_count, size_t bytes, size_t streaming_from);
    Control& control(uint32_t peer) const { return *reinterpret_cast<Control*>(regions_[peer]->base()); }

    uint32_t rank_;
    std::vector<uint32_t> names_;
    Geometry geometry_;
    std::vector<std::shared_ptr<Region>> regions_;
    Control* control_;
    std::vector<Outgoing> outgoing_;
    std::vector<Incoming> incoming_;
    std::vector<MulticastSlot> multicast_;
    std::vector<uint32_t> multicast_next_;
    std::vector<int> process_handles_;  // pidfds
    std::shared_ptr<Region> heap_;
    std::atomic<const uint8_t*> heap_base_{nullptr};
    std::vector<std::shared_ptr<Region>> heaps_;  // of the peers
    Recorder recorder_;
    std::string group_;
    std::string called_;  // by `begin_call`
    bool pulls_ = false;
    uint64_t sequence_ = 0;
    uint64_t before_users_ = 0;
    uint32_t signature_ = 0;
    const std::string* text_ = &called_;  // of the present plan, while it runs
    Patience patience_{2000, 2000};
    size_t streaming_from_ = 4096;
    bool adapts_ = false;
    std::optional<int> way_;
};

}  // namespace abccl
