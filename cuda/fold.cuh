// The loops that fold and scale at the bandwidth of the memory, for the blocks of a kernel to share.
#pragma once

#include "block.cuh"

namespace abccl {

// How the elements of several buffers are reached: the first `head` one by one, then `vectors` times 16 bytes, then the
// rest one by one. Where the buffers do not lie alike modulo 16, there are no vectors.
template <class E>
struct Layout {
    static constexpr u64 size = sizeof(typename E::Stored);
    u64 head, vectors, singles;

    // `differences` holds the bits in which an address differs from the destination.
    __device__ __forceinline__ Layout(u64 destination, u64 differences, u64 count) {
        const u64 before = (16 - destination % 16) % 16;
        const bool alike = differences % 16 == 0 && before % size == 0;
        head = alike && before / size < count ? before / size : count;
        vectors = (count - head) * size / 16;
        singles = count - vectors * 16 / size;
    }
    // Where the i-th vector or single element begins, in bytes.
    __device__ __forceinline__ u64 vector(u64 i) const { return head * size + i * 16; }
    __device__ __forceinline__ u64 single(u64 i) const { return i * size + (i < head ? 0 : vectors * 16); }
};

// The threads of a block: a constant, so that the distance between the accesses of a thread is one, too.
constexpr int block_threads = 256;

// How many accesses a thread has under way for each source: more hide more of the memory's latency, and each needs
// registers for the values of its elements.
template <class Access>
constexpr int unroll = Access::lanes > 8 ? 2 : 4;

// By one block: up to unroll<Access> accesses of each thread, `count` in all, from the byte `at` on; `at` is this
// thread's. Each element is (sources[0] op sources[1]) op ...
template <class Access, class O, int threads>
__device__ __forceinline__ void fold_tile(char* destination, const char* const* sources, int k, u64 at, u64 count) {
    constexpr int depth = unroll<Access>;
    constexpr int stride = threads * static_cast<int>(sizeof(typename Access::Raw));
    typename Access::Raw raw[depth], next[depth];
    typename Access::Element::Value total[depth][Access::lanes];
    const auto load = [&](typename Access::Raw(&into)[depth], int source) {
        const char* const from = sources[source] + at;
#pragma unroll
        for (int d = 0; d < depth; ++d)
            if (threadIdx.x + d * threads < count) into[d] = Access::load(from + d * stride);
    };
    // The sources are taken two at a time, so that the loads of both are under way together.
    const int first = k % 2 ? 1 : 2;
#pragma unroll
    for (int d = 0; d < depth; ++d) raw[d] = next[d] = typename Access::Raw{};
    load(raw, 0);
    if (first == 2) load(next, 1);
#pragma unroll
    for (int d = 0; d < depth; ++d) {
        Access::unpack(total[d], raw[d]);
        if (first == 2) accumulate<Access, O>(total[d], next[d]);
    }
#pragma unroll 1
    for (int j = first; j < k; j += 2) {
        load(raw, j);
        load(next, j + 1);
#pragma unroll
        for (int d = 0; d < depth; ++d) {
            accumulate<Access, O>(total[d], raw[d]);
            accumulate<Access, O>(total[d], next[d]);
        }
    }
#pragma unroll
    for (int d = 0; d < depth; ++d)
        if (threadIdx.x + d * threads < count) Access::store(destination + at + d * stride, Access::pack(total[d]));
}

// Calls visit(i, n) for the tiles of `total` accesses that are the turn of block `block` of `blocks`: the tile has n
// accesses, and the i-th is this thread's first.
template <class Access, int threads, class Visit>
__device__ __forceinline__ void each_tile(u64 total, u32 block, u32 blocks, Visit visit) {
    constexpr u64 tile = unroll<Access> * threads;
    for (u64 begin = block * tile; begin < total; begin += blocks * tile)
        visit(begin + threadIdx.x, total - begin < tile ? total - begin : tile);
}

template <class Access, int threads>
__device__ __forceinline__ void scale_tile(char* destination, const char* source, double factor, u64 at, u64 count) {
    using Value = typename Access::Element::Value;
    constexpr int depth = unroll<Access>;
    constexpr int stride = threads * static_cast<int>(sizeof(typename Access::Raw));
    typename Access::Raw raw[depth];
#pragma unroll
    for (int d = 0; d < depth; ++d)
        if (threadIdx.x + d * threads < count) raw[d] = Access::load(source + at + d * stride);
#pragma unroll
    for (int d = 0; d < depth; ++d)
        if (threadIdx.x + d * threads < count) {
            Value values[Access::lanes];
            Access::unpack(values, raw[d]);
#pragma unroll
            for (int lane = 0; lane < Access::lanes; ++lane) values[lane] = Factor<Value>::times(values[lane], factor);
            Access::store(destination + at + d * stride, Access::pack(values));
        }
}

// destination = sources[0] op ... op sources[k - 1], `count` elements, k >= 1: the part of block `block` of `blocks`,
// whose threads all call. The destination may be exactly one of the sources. An address is a multiple of the size of
// its elements' parts.
template <class E, class O, int threads = block_threads>
__device__ __forceinline__ void fold(char* destination, const char* const* sources, int k, u64 count, u32 block,
                                     u32 blocks) {
    const u64 address = reinterpret_cast<u64>(destination);
    u64 differences = 0;
#pragma unroll 1
    for (int j = 0; j < k; ++j) differences |= address ^ reinterpret_cast<u64>(sources[j]);
    const Layout<E> layout(address, differences, count);
    using Wide = typename Widest<E, O>::Access;
    each_tile<Wide, threads>(layout.vectors, block, blocks, [&](u64 i, u64 n) {
        fold_tile<Wide, O, threads>(destination, sources, k, layout.vector(i), n);
    });
    // Where there are vectors too, fewer than `threads` elements are left: one tile, and a thread has one of them.
    each_tile<Single<E>, threads>(layout.singles, block, blocks, [&](u64 i, u64 n) {
        fold_tile<Single<E>, O, threads>(destination, sources, k, layout.single(i), n);
    });
}

// The same with the operator by number.
template <class E, int threads = block_threads>
__device__ __forceinline__ void fold(int op, char* destination, const char* const* sources, int k, u64 count, u32 block,
                                     u32 blocks) {
    with_operator<E>(op, [&](auto operation) {
        fold<E, decltype(operation), threads>(destination, sources, k, count, block, blocks);
    });
}

// destination = source * factor, `count` elements: the part of block `block` of `blocks`. Nothing where elements are
// not scaled. The destination may be the source.
template <class E, int threads = block_threads>
__device__ __forceinline__ void scale(char* destination, const char* source, double factor, u64 count, u32 block,
                                      u32 blocks) {
    if constexpr (Factor<typename E::Value>::defined) {
        const u64 address = reinterpret_cast<u64>(destination);
        const Layout<E> layout(address, address ^ reinterpret_cast<u64>(source), count);
        each_tile<Vector<E>, threads>(layout.vectors, block, blocks, [&](u64 i, u64 n) {
            scale_tile<Vector<E>, threads>(destination, source, factor, layout.vector(i), n);
        });
        each_tile<Single<E>, threads>(layout.singles, block, blocks, [&](u64 i, u64 n) {
            scale_tile<Single<E>, threads>(destination, source, factor, layout.single(i), n);
        });
    }
}

}  // namespace abccl
