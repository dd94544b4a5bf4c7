// Signals between ranks whose kernels wait for each other: words in mapped memory, and waits that end.
//
// A word counts up and wraps around; who waits for a value goes on at any later one. A store releases, and a load
// acquires, what was written before, in the memory of any device. A wait ends by itself at its timeout, when somebody
// has aborted, and when another wait of this rank has ended so; then all that come after it end at once.
#pragma once

#include "arithmetic.cuh"

namespace abccl {

constexpr u32 ranks_at_most = 32;

// What a kernel knows of its rank; the same for all launches.
struct Rank {
    u64 timeout;       // nanoseconds that a wait may take
    const u32* abort;  // in host memory: not 0 when somebody has aborted
    u64* report;       // in host memory: not 0 when a wait has ended in vain, or shall; see Wait
    u32 rank, size, lanes;
    u32 slot_bytes;                   // of a message of the interpreter's; a multiple of 128
    char* workspaces[ranks_at_most];  // of all ranks, mapped
};

// What a wait is for: the report of one that ended in vain is 1 << 63 | what << 48 | block << 16 | peer.
enum class Wait : u32 { meeting, message, room };

// One rank's part of a launch. A launch on a device of its own has one; where all ranks run on one device, the first
// blocks of the grid are the first one's, the next ones the second one's.
struct Call {
    const Rank* rank;
    const void* plan;  // of the interpreter
    const char* input;
    char* output;
};

struct Calls {
    Call call[8];
};

#ifdef __CUDACC__

__device__ __forceinline__ void store_release(u32* word, u32 value) {
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(word), "r"(value) : "memory");
}

__device__ __forceinline__ u32 load_acquire(const u32* word) {
    u32 value;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
    return value;
}

__device__ __forceinline__ u32 load_relaxed(const u32* word) {
    u32 value;
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
    return value;
}

__device__ __forceinline__ u64 load_relaxed(const u64* word) {
    u64 value;
    asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
    return value;
}

__device__ __forceinline__ void store_relaxed(u64* word, u64 value) {
    asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(word), "l"(value) : "memory");
}

__device__ __forceinline__ u64 nanoseconds() {
    u64 now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    return now;
}

// Memory of the block.
#define ABCCL_SHARED(type, name) __shared__ type name

#else

// Where the compiler is not CUDA's, these are given to it.
using cpu::load_acquire;
using cpu::load_relaxed;
using cpu::nanoseconds;
using cpu::store_relaxed;
using cpu::store_release;

#define ABCCL_SHARED(type, name) type& name = cpu::shared<type>()

#endif

// Waits until the word is `value` or later. False: in vain.
__device__ __forceinline__ bool wait_until(const Rank& self, const u32* word, u32 value, Wait what, u32 block,
                                           u32 peer) {
    // The host's words are far away: they are looked at once in a while.
    constexpr u32 polls = 256;
    u64 started = 0;
    for (;;) {
#pragma unroll 1
        for (u32 poll = 0; poll < polls; ++poll)
            if (static_cast<i32>(load_acquire(word) - value) >= 0) return true;
        if (load_relaxed(self.abort) != 0 || load_relaxed(self.report) != 0) return false;
        const u64 now = nanoseconds();
        if (started == 0) started = now;
        if (now - started > self.timeout) {
            store_relaxed(self.report, u64{1} << 63 | u64{static_cast<u32>(what)} << 48 | u64{block} << 16 | peer);
            return false;
        }
    }
}

// ---- the workspace: words of 32 bits, all zero at first, then buffers
//
//     blocks of shots, each: words that its peers write, one for each rank; then the number of its last round
//     lanes, each: for each rank the messages that came from it, those it has read, those sent to it, those read here
//     blocks of shots, each: two buffers
//     lanes, each: for each rank the slots of messages to it
//
// What peers write is read by the owner's kernels alone, and each of the other words by one block.

constexpr u32 shot_blocks = 32;
constexpr u32 shot_bytes = 32768;
constexpr u32 slots = 2;

struct Workspace {
    const Rank& self;
    char* start;

    __device__ __forceinline__ Workspace(const Rank& self, u32 rank) : self(self), start(self.workspaces[rank]) {}

    __device__ __forceinline__ u32* met(u32 block) const { return words() + block * (self.size + 1); }
    __device__ __forceinline__ u32* round(u32 block) const { return met(block) + self.size; }

    __device__ __forceinline__ u32* arrived(u32 lane) const { return lane_words(lane); }
    __device__ __forceinline__ u32* taken(u32 lane) const { return lane_words(lane) + self.size; }
    __device__ __forceinline__ u32* sent(u32 lane) const { return lane_words(lane) + 2 * self.size; }
    __device__ __forceinline__ u32* received(u32 lane) const { return lane_words(lane) + 3 * self.size; }

    __device__ __forceinline__ char* shot(u32 block, u32 round) const {
        return buffers() + (2 * block + round % 2) * u64{shot_bytes};
    }
    __device__ __forceinline__ char* slot(u32 lane, u32 peer, u32 message) const {
        const u64 index = (u64{lane} * self.size + peer) * slots + message % slots;
        return buffers() + 2 * u64{shot_blocks} * shot_bytes + index * self.slot_bytes;
    }

    __device__ __forceinline__ u64 nbytes() const { return slot(self.lanes, 0, 0) - start; }

  private:
    __device__ __forceinline__ u32* words() const { return reinterpret_cast<u32*>(start); }
    __device__ __forceinline__ u32* lane_words(u32 lane) const {
        return words() + shot_blocks * (self.size + 1) + 4 * lane * self.size;
    }
    __device__ __forceinline__ char* buffers() const {
        const u64 nbytes = 4 * (shot_blocks * (self.size + 1) + 4 * self.lanes * u64{self.size});
        return start + (nbytes + 127) / 128 * 128;
    }
};

}  // namespace abccl
