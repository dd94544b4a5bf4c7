// The flight recorder: what a rank has called, and where it waits, in memory that others can read at any time.
//
// One writer, any readers, who may live in other processes. An entry is valid if its number is what a reader expects
// before and after it has read the rest; all fields are atomic, so that a torn entry is no undefined behaviour.
#pragma once

#include <atomic>
#include <cstdint>
#include <optional>
#include <string>
#include <unordered_map>

#include "clock.hpp"

namespace abccl {

constexpr uint64_t flight_magic = 0x0001'6c63'6362'6100;  // grows with the layout
constexpr size_t recorded_operations = 1024;
constexpr size_t recorded_texts = 2 * recorded_operations;
constexpr size_t recorded_messages = 1024;
constexpr size_t recorded_steps = 4096;
constexpr uint64_t has_failed = uint64_t{1} << 63;  // beside the end of what has failed
constexpr int32_t nobody = -1;

// Words for people. What comes while they are rewritten is torn, and the number beside them tells.
template <size_t words>
struct SharedText {
    std::atomic<uint64_t> word[words];
    void store(const std::string& text);
    std::string load() const;
};

// A call in words: "all_reduce(float32, sum, 1024 elements, ring)". Calls that look alike share one.
struct CallText {
    std::atomic<uint64_t> number;
    std::atomic<uint64_t> bytes;
    SharedText<20> text;
};

// A collective. Times are in ticks; the start is 0 for a moment, the end is 0 while it runs.
struct OperationEntry {
    std::atomic<uint64_t> number;
    std::atomic<uint32_t> signature;
    std::atomic<uint32_t> text;  // number of its CallText
    std::atomic<uint64_t> start, end;
};
static_assert(sizeof(OperationEntry) == 32, "two operations to a cache line");

// A send or receive of the user's.
struct MessageEntry {
    std::atomic<uint64_t> number;
    std::atomic<int64_t> tag;
    std::atomic<uint64_t> bytes;
    std::atomic<uint64_t> start, end;
    std::atomic<int32_t> peer;  // as users call it
    std::atomic<uint32_t> sends;
};

// The end of a step of a lane.
struct StepEntry {
    std::atomic<uint64_t> end;
    std::atomic<uint32_t> number, segment;  // of the collective: its lower half
    std::atomic<uint16_t> step, lane;
    std::atomic<int32_t> peer;
};

// Where the present collective waits, written when that lasts.
struct WaitEntry {
    std::atomic<uint64_t> number;  // of the collective; 0 while it is rewritten
    std::atomic<uint64_t> since;
    std::atomic<int32_t> step;  // from 1; 0 between steps
    std::atomic<int32_t> peer;
    SharedText<32> text;
    SharedText<32> note;  // what is known of a peer on another host
};

struct Flight {
    std::atomic<uint64_t> magic;
    std::atomic<uint64_t> token;      // of the communicator, on this host
    std::atomic<int32_t> rank, size;  // as users call them
    SharedText<8> group;              // the communicator's name
    std::atomic<int64_t> began_ns;    // both clocks when the recorder began
    std::atomic<uint64_t> began_counted;
    std::atomic<uint64_t> before_users;  // how many collectives are the library's own, made before the user's
    std::atomic<uint64_t> messages_begun, steps_ended, failed;
    SharedText<64> failure;
    WaitEntry wait;
    OperationEntry operations[recorded_operations];
    CallText texts[recorded_texts];
    MessageEntry messages[recorded_messages];
    StepEntry steps[recorded_steps];
};

// The clocks, for times of this recorder.
inline ClockReading clocks(const Flight& flight) {
    return ClockReading::now(flight.began_ns.load(std::memory_order_relaxed),
                             flight.began_counted.load(std::memory_order_relaxed));
}

// A copy of an entry for a reader.
struct Recorded {
    uint32_t signature;
    std::string text;
    uint64_t bytes, start, end;
};
// The operation of that number, if it is still there.
std::optional<Recorded> read_operation(const Flight& flight, uint64_t number);

// The writing side. Operations and steps by whoever runs the engine, messages from any thread.
class Recorder {
  public:
    explicit Recorder(Flight& flight);

    void begin(uint64_t number, uint32_t signature, uint32_t text) {
        OperationEntry& entry = flight_.operations[number % recorded_operations];
        entry.number.store(0, std::memory_order_relaxed);
        entry.signature.store(signature, std::memory_order_release);
        entry.text.store(text, std::memory_order_release);
        entry.end.store(0, std::memory_order_release);
        entry.start.store(0, std::memory_order_release);
        entry.number.store(number, std::memory_order_release);
        started_ = false;
    }
    // The operation has begun: told when its first messages have left, and the stamp delays nobody.
    void started(uint64_t number) {
        if (started_) return;
        started_ = true;
        flight_.operations[number % recorded_operations].start.store(now(), std::memory_order_release);
    }
    void end(uint64_t number, bool well = true) {
        OperationEntry& entry = flight_.operations[number % recorded_operations];
        const uint64_t end = now();
        if (!started_) entry.start.store(end, std::memory_order_release);
        entry.end.store(well ? end : end | has_failed, std::memory_order_release);
    }
    // The number of a text that will be there as long as an operation that begins now. `known` is what the last call
    // for the same text returned, or 0.
    uint32_t text(uint32_t known, const std::string& text, uint64_t bytes) {
        if (known != 0 && newest_text_ - known < recorded_operations) return known;
        return add(text, bytes);
    }
    // The same for who has no place to keep the number.
    uint32_t text(const std::string& text, uint64_t bytes);

    // Whether the steps of a plan with messages of so many bytes are worth their stamps.
    bool wants_steps(size_t longest_message) const { return all_steps_ || longest_message > 4096; }
    void set_all_steps(bool all) { all_steps_ = all; }
    // To measure what the stamps cost.
    void set_stamps(bool stamps) { stamps_ = stamps; }
    void step(uint64_t number, uint32_t lane, int64_t segment, uint32_t step, int32_t peer);
    // `moved` is another number when the run has got on meanwhile.
    void waits(uint64_t number, uint64_t moved, int32_t step, int32_t peer, const std::string& text);
    void note(const std::string& text) { flight_.wait.note.store(text); }

    uint64_t begin_message(bool sends, int32_t peer, int64_t tag, uint64_t bytes);
    void end_message(uint64_t number, int32_t peer, bool well);

    void fail(const std::string& why);
    Flight& flight() { return flight_; }
    const Flight& flight() const { return flight_; }

  private:
    uint64_t now() const { return stamps_ ? ticks() & ~has_failed : 1; }
    uint32_t add(const std::string& text, uint64_t bytes);

    Flight& flight_;
    uint32_t newest_text_ = 0;
    bool all_steps_ = false, stamps_ = true, started_ = false;
    uint64_t moved_ = 0;
    std::atomic<bool> failing_{false};
    std::unordered_map<std::string, uint32_t> known_;
};

}  // namespace abccl
