// What the threads of one block do together to a run of elements: move it, scale it, fold it.
//
// 16 bytes at a time where all addresses are multiples of 16, else element by element. None of these waits for the
// block: who reads what other threads have written comes behind a barrier.
#pragma once

#include "arithmetic.cuh"

namespace abccl {

// What a factor multiplies: the floating types, and the complex ones part by part.

template <class T>
struct Factor {
    static constexpr bool defined = false;
};
template <>
struct Factor<float> {
    static constexpr bool defined = true;
    static __device__ __forceinline__ float times(float value, double factor) {
        return value * static_cast<float>(factor);
    }
};
template <>
struct Factor<double> {
    static constexpr bool defined = true;
    static __device__ __forceinline__ double times(double value, double factor) { return value * factor; }
};
template <class T>
struct Factor<ComplexValue<T>> : Factor<T> {
    static __device__ __forceinline__ ComplexValue<T> times(ComplexValue<T> value, double factor) {
        return {Factor<T>::times(value.real, factor), Factor<T>::times(value.imaginary, factor)};
    }
};

// body(access, offset) for all of `count` elements, each in the thread that has it whatever the operands are.
template <class E, class Body>
__device__ __forceinline__ void for_elements(u64 count, bool aligned, Body body) {
    constexpr u64 lanes = Vector<E>::lanes;
    const u64 vectors = aligned ? count / lanes : 0;
    for (u64 i = threadIdx.x; i < vectors; i += blockDim.x) body(Vector<E>{}, i * 16);
    for (u64 i = vectors * lanes + threadIdx.x; i < count; i += blockDim.x)
        body(Single<E>{}, i * sizeof(typename E::Stored));
}

__device__ __forceinline__ bool is_aligned(const char* address) { return reinterpret_cast<u64>(address) % 16 == 0; }

template <class E>
__device__ __forceinline__ void copy(char* destination, const char* source, u64 count) {
    for_elements<E>(count, is_aligned(destination) && is_aligned(source),
                    [=](auto access, u64 offset) { access.store(destination + offset, access.load(source + offset)); });
}

// destination = source * factor; both may be the same.
template <class E>
__device__ __forceinline__ void scale(char* destination, const char* source, double factor, u64 count) {
    using By = Factor<typename E::Value>;
    if constexpr (By::defined)
        for_elements<E>(count, is_aligned(destination) && is_aligned(source), [=](auto access, u64 offset) {
            typename E::Value values[access.lanes];
            access.unpack(values, access.load(source + offset));
#pragma unroll
            for (int lane = 0; lane < access.lanes; ++lane) values[lane] = By::times(values[lane], factor);
            access.store(destination + offset, access.pack(values));
        });
}

// destination = source(0) op source(1) op ..., `sources` of them, rounded once; the destination may be one of them.
template <class E, class Source>
__device__ __forceinline__ void fold(char* destination, u32 sources, Source source, int op, u64 count) {
    bool aligned = is_aligned(destination);
    for (u32 i = 0; i < sources; ++i) aligned = aligned && is_aligned(source(i));
    with_operator<E>(op, [=](auto operation) {
        for_elements<E>(count, aligned, [=](auto access, u64 offset) {
            using Access = decltype(access);
            constexpr u32 together = 4;  // loads under way: a peer's memory is far
            typename E::Value total[Access::lanes] = {};
            for (u32 first = 0; first < sources; first += together) {
                typename Access::Raw raw[together];
#pragma unroll
                for (u32 i = 0; i < together; ++i)
                    if (first + i < sources) raw[i] = access.load(source(first + i) + offset);
                if (first == 0) access.unpack(total, raw[0]);
#pragma unroll
                for (u32 i = 0; i < together; ++i)
                    if (first + i > 0 && first + i < sources) accumulate<Access, decltype(operation)>(total, raw[i]);
            }
            access.store(destination + offset, access.pack(total));
        });
    });
}

}  // namespace abccl

// ABCCL_KERNELS(X) is X(name, Element) for all types, or for the one that ABCCL_TYPE names: that is compiled sooner.
#ifdef ABCCL_TYPE
#define ABCCL_NAME_TYPE(name, Element) using type_##name = Element;
namespace abccl {
ABCCL_TYPES(ABCCL_NAME_TYPE)
}
#define ABCCL_PASTE(X, name) X(name, abccl::type_##name)
#define ABCCL_EXPAND(X, name) ABCCL_PASTE(X, name)
#define ABCCL_KERNELS(X) ABCCL_EXPAND(X, ABCCL_TYPE)
#else
#define ABCCL_KERNELS(X) ABCCL_TYPES(X)
#endif
