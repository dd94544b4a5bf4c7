// What a .cu file needs of CUDA's language to be compiled for the CPU: the plain parts. Include it before the .cu file.
//
// Kernels that do not wait run in one thread of the system, by `serial`; for those that do see threads.hpp.
#pragma once

#include <cstdint>
#include <cstring>

#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

// A vector of the compiler's: the CPU refuses to load one, or to store it, where its address is no multiple of 16.
using uint4 = unsigned __attribute__((vector_size(16)));

struct Index {
    unsigned x;
};

inline thread_local Index threadIdx, blockIdx, blockDim, gridDim;

// IEEE's halves, by the compiler's type; bfloat16 is the upper half of a float, rounded to even.
inline float widen_float16(unsigned short stored) {
    _Float16 half;
    memcpy(&half, &stored, sizeof half);
    return static_cast<float>(half);
}

inline unsigned short narrow_float16(float value) {
    const _Float16 half = static_cast<_Float16>(value);
    unsigned short stored;
    memcpy(&stored, &half, sizeof stored);
    return stored;
}

inline unsigned short narrow_bfloat16(float value) {
    unsigned bits;
    memcpy(&bits, &value, sizeof bits);
    if (value != value) return static_cast<unsigned short>(bits >> 16 | 0x40);
    return static_cast<unsigned short>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline void __threadfence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

inline unsigned atomicAdd_system(unsigned* word, unsigned value) {
    return __atomic_fetch_add(word, value, __ATOMIC_RELAXED);
}

// Calls kernel() as each thread of each block, one after another.
template <class Kernel>
void serial(unsigned grid, unsigned block, const Kernel& kernel) {
    gridDim = {grid}, blockDim = {block};
    for (blockIdx = {0}; blockIdx.x < grid; ++blockIdx.x)
        for (threadIdx = {0}; threadIdx.x < block; ++threadIdx.x) kernel();
}
