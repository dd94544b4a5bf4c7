// all_reduce by kernels that wait for each other, for short vectors: in one shot, and in two.
//
// Every block does its part of the vector together with the blocks of its number on the other ranks, and with nobody
// else. They go in rounds: a block writes its own buffer of the round, tells its peers, waits for them, then reads
// theirs. Two buffers take turns, and no more is needed: who writes in round n has met all in round n - 1, and they
// told so after they had read in round n - 2. Rounds are counted in memory, so that a launch may be repeated in a
// graph.
//
// Each element is folded in ascending rank order, once by every rank (one shot) or by one (two shots): all get the
// same bits. The vector is done in tiles of what a buffer takes, so its length has no limit.
#include "block.cuh"
#include "signals.cuh"

namespace abccl {

enum class Scaled : int { no, before, after };

struct Reduction {
    u64 count;
    double factor;
    int op;
    Scaled scaled;
};

// The round of one block with its peers.
class Round {
  public:
    __device__ __forceinline__ Round(const Rank& self, u32 block)
        : self_(self), block_(block), number_(*Workspace(self, self.rank).round(block)) {}

    // The buffer of a rank in this round, or in the one before.
    __device__ __forceinline__ char* buffer(u32 rank) const { return Workspace(self_, rank).shot(block_, number_); }
    __device__ __forceinline__ char* last(u32 rank) const { return Workspace(self_, rank).shot(block_, number_ - 1); }

    // Begin the next round.
    __device__ __forceinline__ void begin() { ++number_; }

    // Tell the peers that the own buffer is written, and wait for theirs. False: in vain.
    __device__ __forceinline__ bool meet() const {
        __syncthreads();
        for (u32 peer = threadIdx.x; peer < self_.size; peer += blockDim.x)
            if (peer != self_.rank) store_release(Workspace(self_, peer).met(block_) + self_.rank, number_);
        bool met = true;
        const u32* words = Workspace(self_, self_.rank).met(block_);
        for (u32 peer = threadIdx.x; peer < self_.size; peer += blockDim.x)
            if (peer != self_.rank) met = met && wait_until(self_, words + peer, number_, Wait::meeting, block_, peer);
        return __syncthreads_and(met);
    }

    // The launch is over: the next one goes on from here.
    __device__ __forceinline__ void leave() const {
        __syncthreads();
        if (threadIdx.x == 0) *Workspace(self_, self_.rank).round(block_) = number_;
    }

  private:
    const Rank& self_;
    u32 block_, number_;
};

// A part of so many elements, such that `parts` of them cover all, and all begin at multiples of 16 elements.
__device__ __forceinline__ u64 part_of(u64 count, u32 parts) { return ((count + parts - 1) / parts + 15) / 16 * 16; }
__device__ __forceinline__ u64 smaller(u64 a, u64 b) { return a < b ? a : b; }

template <class E>
__device__ __forceinline__ void enter(char* own, const char* input, u64 count, const Reduction& reduction) {
    if (reduction.scaled == Scaled::before)
        scale<E>(own, input, reduction.factor, count);
    else
        copy<E>(own, input, count);
}

template <class E>
__device__ __forceinline__ void one_shot(const Calls& calls, u32 blocks, const Reduction& reduction) {
    constexpr u64 itemsize = sizeof(typename E::Stored), tile = shot_bytes / itemsize;
    const Call& call = calls.call[blockIdx.x / blocks];
    const Rank& self = *call.rank;
    const u32 block = blockIdx.x % blocks;
    const u64 part = part_of(reduction.count, blocks), end = smaller(reduction.count, (block + 1) * part);
    Round round(self, block);
    for (u64 first = block * part; first < end; first += tile) {
        const u64 count = smaller(tile, end - first);
        round.begin();
        enter<E>(round.buffer(self.rank), call.input + first * itemsize, count, reduction);
        if (!round.meet()) return;
        char* to = call.output + first * itemsize;
        fold<E>(to, self.size, [=](u32 rank) { return round.buffer(rank); }, reduction.op, count);
        if (reduction.scaled == Scaled::after) scale<E>(to, to, reduction.factor, count);
    }
    round.leave();
}

template <class E>
__device__ __forceinline__ void two_shot(const Calls& calls, u32 blocks, const Reduction& reduction) {
    constexpr u64 itemsize = sizeof(typename E::Stored), tile = shot_bytes / itemsize;
    const Call& call = calls.call[blockIdx.x / blocks];
    const Rank& self = *call.rank;
    const u32 block = blockIdx.x % blocks;
    const u64 part = part_of(reduction.count, blocks), end = smaller(reduction.count, (block + 1) * part);
    Round round(self, block);
    for (u64 first = block * part; first < end; first += tile) {
        const u64 count = smaller(tile, end - first), share = part_of(count, self.size);
        round.begin();
        enter<E>(round.buffer(self.rank), call.input + first * itemsize, count, reduction);
        if (!round.meet()) return;
        round.begin();
        const u64 mine = smaller(count, self.rank * share), own = smaller(count, mine + share) - mine;
        char* to = round.buffer(self.rank) + mine * itemsize;
        fold<E>(to, self.size, [=](u32 rank) { return round.last(rank) + mine * itemsize; }, reduction.op, own);
        if (reduction.scaled == Scaled::after) scale<E>(to, to, reduction.factor, own);
        if (!round.meet()) return;
        for (u32 rank = 0; rank < self.size; ++rank) {
            const u64 theirs = smaller(count, rank * share);
            copy<E>(call.output + (first + theirs) * itemsize, round.buffer(rank) + theirs * itemsize,
                    smaller(count, theirs + share) - theirs);
        }
    }
    round.leave();
}

}  // namespace abccl

#define ABCCL_SHOTS(name, Element)                                                   \
    extern "C" __global__ void __launch_bounds__(512, 1)                             \
        one_shot_##name(const __grid_constant__ abccl::Calls calls, unsigned blocks, \
                        const __grid_constant__ abccl::Reduction reduction) {        \
        abccl::one_shot<Element>(calls, blocks, reduction);                          \
    }                                                                                \
    extern "C" __global__ void __launch_bounds__(512, 1)                             \
        two_shot_##name(const __grid_constant__ abccl::Calls calls, unsigned blocks, \
                        const __grid_constant__ abccl::Reduction reduction) {        \
        abccl::two_shot<Element>(calls, blocks, reduction);                          \
    }
ABCCL_KERNELS(ABCCL_SHOTS)
