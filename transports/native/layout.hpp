// What lies where in a rank's shared region: control block, descriptor rings, tails, arena.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "flight.hpp"

namespace abccl {

constexpr size_t cache_line = 64;
constexpr size_t inline_bytes = 304;
constexpr size_t board_bytes = 16 << 10;
constexpr size_t decisions_kept = 512;

// One message. The sender writes everything else, then `sequence` with release. A short message moves with it: from
// elsewhere it would take the reader a second way to the sender's cache, 150 ns between far cores.
struct alignas(cache_line) Descriptor {
    std::atomic<uint32_t> sequence;  // number of the message on its channel, from 1
    uint32_t signature;
    uint32_t length;
    uint32_t where;  // offset in the sender's region in units of a cache line, or one of the below
    uint8_t payload[inline_bytes];
};
static_assert(sizeof(Descriptor) == 5 * cache_line, "a descriptor is five cache lines");

constexpr uint32_t inlined = 0xFFFFFFFF;       // in the payload
constexpr uint32_t direct = 0xFFFFFFFE;        // in the sender's heap, each part at an offset that the payload tells
constexpr uint32_t pulled = 0xFFFFFFFD;        // in the sender's private memory, each part at an address
constexpr uint32_t pulled_whole = 0xFFFFFFFC;  // the same, and the blocks' other segments behind it
constexpr size_t lent_parts = inline_bytes / sizeof(uint64_t);

// How many messages of a channel its reader has given back. It lies in the reader's region: the writer is local.
struct alignas(cache_line) Tail {
    std::atomic<uint32_t> value;
};

// What survivors of a broken communicator tell each other: of two rounds, as each is read before the next but one.
struct BoardSlot {
    std::atomic<uint64_t> round;  // from 1; 0 while it is rewritten
    uint64_t bytes;
    uint8_t data[board_bytes];
};

struct Control {
    std::atomic<uint64_t> token;  // random; proves that an attached region is the one that was announced
    uint32_t rank;
    uint32_t size;
    int32_t pid;
    alignas(cache_line) std::atomic<uint32_t> doorbell;  // futex: rung when something came and this rank may sleep
    std::atomic<uint32_t> sleepers;
    alignas(cache_line) std::atomic<uint32_t> abort;  // kind << 24 | rank of the aborter + 1; 0 while all is well
    alignas(cache_line) std::atomic<uint64_t> entered;
    std::atomic<uint64_t> finished;
    std::atomic<uint32_t> closed;
    std::atomic<uint64_t> heap_bytes;  // of the rank's registered memory; 0 before there is any
    int32_t heap_fd;
    // Of a plan that receives: its signature << 32 | the bits of a float, the seconds of its last timed run.
    alignas(cache_line) std::atomic<uint64_t> took;
    char reason[2048];  // of this rank's own abort; written before any abort word that points to it
    // Of the first rank's region: the first value that is written to each wins.
    std::atomic<uint64_t> decisions[decisions_kept];
    BoardSlot board[2];
    Flight flight;
};

// The numbers that fix a region's layout; equal on all ranks.
struct Geometry {
    uint32_t size;
    uint32_t lanes;
    uint32_t slots;       // messages under way per pair and lane
    uint32_t slot_bytes;  // a multiple of the cache line

    // Lane number `lanes` is the channel of the user's own sends and receives.
    uint32_t channels() const { return lanes + 1; }

    size_t descriptors_at() const { return round_up(sizeof(Control), 4096); }
    size_t tails_at() const { return descriptors_at() + sizeof(Descriptor) * slots * channels() * size; }
    size_t arena_at() const { return round_up(tails_at() + sizeof(Tail) * channels() * size, 4096); }
    // Bytes of arena that the lanes of plans have for one peer.
    size_t to_peer() const { return static_cast<size_t>(slot_bytes) * slots * lanes; }
    size_t multicast_at() const { return arena_at() + static_cast<size_t>(slot_bytes) * slots * channels() * size; }
    size_t bytes() const { return round_up(multicast_at() + static_cast<size_t>(slot_bytes) * slots * lanes, 4096); }

    size_t channel(uint32_t peer, uint32_t lane) const { return static_cast<size_t>(peer) * channels() + lane; }
    size_t descriptor(uint32_t peer, uint32_t lane) const {
        return descriptors_at() + sizeof(Descriptor) * slots * channel(peer, lane);
    }
    size_t tail(uint32_t peer, uint32_t lane) const { return tails_at() + sizeof(Tail) * channel(peer, lane); }
    size_t arena(uint32_t peer, uint32_t lane) const {
        return arena_at() + static_cast<size_t>(slot_bytes) * slots * channel(peer, lane);
    }
    size_t multicast(uint32_t lane) const { return multicast_at() + static_cast<size_t>(slot_bytes) * slots * lane; }

    static size_t round_up(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }
};

}  // namespace abccl
