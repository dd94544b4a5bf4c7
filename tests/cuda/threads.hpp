// What a .cu file needs of CUDA's language to run on the CPU with a thread of the system for each thread of a kernel,
// so that kernels can wait for each other and ThreadSanitizer sees what they do.
//
// Include it before the .cu file, and give `launch` a function that calls the kernel. Blocks have few threads here: a
// kernel must go by blockDim. Where a wait polls, and at random before signals, the processor is given away.
#pragma once

#include <pthread.h>
#include <sched.h>

#include <chrono>
#include <memory>
#include <thread>
#include <vector>

#include "shim.hpp"

namespace cpu {

// What the threads of a block share.
class Block {
  public:
    explicit Block(unsigned threads) : threads_(threads) { pthread_barrier_init(&barrier_, nullptr, threads); }
    ~Block() { pthread_barrier_destroy(&barrier_); }

    void wait() {
        if (threads_ > 1) pthread_barrier_wait(&barrier_);
    }
    bool all(bool mine) {
        if (threads_ == 1) return mine;
        if (!mine) __atomic_store_n(&failed_, true, __ATOMIC_RELAXED);
        wait();
        const bool all = !__atomic_load_n(&failed_, __ATOMIC_RELAXED);
        wait();
        return all;  // once false it stays so: the kernels give up at the first
    }

    alignas(64) char memory[16384] = {};

  private:
    pthread_barrier_t barrier_;
    unsigned threads_;
    bool failed_ = false;
};

inline thread_local Block* block;
inline thread_local uint32_t dice = 1;

inline void yield_sometimes() {
    dice = dice * 1664525 + 1013904223;
    if (dice >> 30 == 0) sched_yield();
}

template <class T>
T& shared() {
    static_assert(sizeof(T) <= sizeof(Block::memory), "");
    return *reinterpret_cast<T*>(block->memory);
}

// Which order the atomic operations have: tests of the tests weaken them.
#ifndef ABCCL_RELEASE
#define ABCCL_RELEASE __ATOMIC_RELEASE
#endif
#ifndef ABCCL_ACQUIRE
#define ABCCL_ACQUIRE __ATOMIC_ACQUIRE
#endif

inline void store_release(unsigned* word, unsigned value) {
    yield_sometimes();
    __atomic_store_n(word, value, ABCCL_RELEASE);
}

inline unsigned load_acquire(const unsigned* word) {
    const unsigned value = __atomic_load_n(word, ABCCL_ACQUIRE);
    yield_sometimes();
    return value;
}

template <class T>
T load_relaxed(const T* word) {
    return __atomic_load_n(word, __ATOMIC_RELAXED);
}

inline void store_relaxed(unsigned long long* word, unsigned long long value) {
    __atomic_store_n(word, value, __ATOMIC_RELAXED);
}

inline unsigned long long nanoseconds() {
    sched_yield();
    return static_cast<unsigned long long>(
        std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
            .count());
}

// Runs kernel() in all threads of all blocks at the same time.
template <class Kernel>
void launch(unsigned grid, unsigned threads, uint32_t seed, const Kernel& kernel) {
    std::vector<std::unique_ptr<Block>> blocks;
    for (unsigned b = 0; b < grid; ++b) blocks.push_back(std::make_unique<Block>(threads));
    std::vector<std::thread> running;
    for (unsigned b = 0; b < grid; ++b)
        for (unsigned t = 0; t < threads; ++t)
            running.emplace_back([&, b, t] {
                threadIdx = {t}, blockIdx = {b}, blockDim = {threads}, gridDim = {grid};
                block = blocks[b].get();
                dice = seed + 7919 * (b * threads + t);
                kernel();
            });
    for (std::thread& one : running) one.join();
}

}  // namespace cpu

inline void __syncthreads() { cpu::block->wait(); }
inline bool __syncthreads_and(bool mine) { return cpu::block->all(mine); }
