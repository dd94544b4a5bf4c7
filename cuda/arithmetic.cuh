// The element types and operators of abccl for kernels, and 16-byte accesses. Needs no header, of CUDA's or others.
//
// Every result has the bits of the native core's (`transports/native/`), but that a NaN is only promised to be a NaN.
// For that, multiplications and additions must not be contracted: compile with -fmad=false.
#pragma once

namespace abccl {

using i8 = signed char;
using i16 = short;
using i32 = int;
using i64 = long long;
using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

template <class To, class From>
__device__ __forceinline__ To bits(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

// ---- element types: how one is stored, and what it is computed in

template <class T>
struct Plain {
    using Stored = T;
    using Value = T;
    static __device__ __forceinline__ Value widen(Stored stored) { return stored; }
    static __device__ __forceinline__ Stored narrow(Value value) { return value; }
};

// Where the compiler is not CUDA's, widen_float16, narrow_float16 and narrow_bfloat16 are given to it.
struct Float16 {
    using Stored = u16;
    using Value = float;
    static __device__ __forceinline__ float widen(u16 stored) {
#ifdef __CUDACC__
        float value;
        asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(stored));
        return value;
#else
        return widen_float16(stored);
#endif
    }
    static __device__ __forceinline__ u16 narrow(float value) {
#ifdef __CUDACC__
        u16 stored;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(stored) : "f"(value));
        return stored;
#else
        return narrow_float16(value);
#endif
    }
};

struct Bfloat16 {
    using Stored = u16;
    using Value = float;
    static __device__ __forceinline__ float widen(u16 stored) { return bits<float>(u32{stored} << 16); }
    static __device__ __forceinline__ u16 narrow(float value) {
#ifdef __CUDACC__
        u16 stored;
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(stored) : "f"(value));
        return stored;
#else
        return narrow_bfloat16(value);
#endif
    }
};

// A truth value: its bytes are 0 or 1.
struct Bool : Plain<u8> {};

template <class T>
struct ComplexValue {
    T real, imaginary;
};

template <class T>
struct Complex : Plain<ComplexValue<T>> {
    using Part = Plain<T>;
};

// X(name, E) for all element types: the names are those of numpy and torch, the order is that of transports/types.py.
#define ABCCL_TYPES(X)                  \
    X(float16, abccl::Float16)          \
    X(bfloat16, abccl::Bfloat16)        \
    X(float32, abccl::Plain<float>)     \
    X(float64, abccl::Plain<double>)    \
    X(int8, abccl::Plain<abccl::i8>)    \
    X(int16, abccl::Plain<abccl::i16>)  \
    X(int32, abccl::Plain<abccl::i32>)  \
    X(int64, abccl::Plain<abccl::i64>)  \
    X(uint8, abccl::Plain<abccl::u8>)   \
    X(uint16, abccl::Plain<abccl::u16>) \
    X(uint32, abccl::Plain<abccl::u32>) \
    X(uint64, abccl::Plain<abccl::u64>) \
    X(bool, abccl::Bool)                \
    X(complex64, abccl::Complex<float>) \
    X(complex128, abccl::Complex<double>)

// ---- operators

// What sums and products are computed in: integers wrap, as unsigned ones of at least 32 bits do.
template <class T>
struct Wrapping {
    using Type = u32;
};
template <>
struct Wrapping<i64> {
    using Type = u64;
};
template <>
struct Wrapping<u64> {
    using Type = u64;
};
template <>
struct Wrapping<float> {
    using Type = float;
};
template <>
struct Wrapping<double> {
    using Type = double;
};

struct Sum {
    template <class T>
    static __device__ __forceinline__ T of(T a, T b) {
        using W = typename Wrapping<T>::Type;
        return static_cast<T>(static_cast<W>(a) + static_cast<W>(b));
    }
    template <class T>
    static __device__ __forceinline__ ComplexValue<T> of(ComplexValue<T> a, ComplexValue<T> b) {
        return {a.real + b.real, a.imaginary + b.imaginary};
    }
};

struct Prod {
    template <class T>
    static __device__ __forceinline__ T of(T a, T b) {
        using W = typename Wrapping<T>::Type;
        return static_cast<T>(static_cast<W>(a) * static_cast<W>(b));
    }
    template <class T>
    static __device__ __forceinline__ ComplexValue<T> of(ComplexValue<T> a, ComplexValue<T> b) {
        return {a.real * b.real - a.imaginary * b.imaginary, a.real * b.imaginary + a.imaginary * b.real};
    }
};

// If only b is NaN then the comparison is false, which picks b.
struct Min {
    template <class T>
    static __device__ __forceinline__ T of(T a, T b) {
        return (a < b) | (a != a) ? a : b;
    }
};

struct Max {
    template <class T>
    static __device__ __forceinline__ T of(T a, T b) {
        return (a > b) | (a != a) ? a : b;
    }
};

struct And {
    template <class T>
    static __device__ __forceinline__ T of(T a, T b) {
        return static_cast<T>(a & b);
    }
};

struct Or {
    template <class T>
    static __device__ __forceinline__ T of(T a, T b) {
        return static_cast<T>(a | b);
    }
};

struct Xor {
    template <class T>
    static __device__ __forceinline__ T of(T a, T b) {
        return static_cast<T>(a ^ b);
    }
};

// with_operator<E>(op, run) calls run(O{}) with the operator of that number (transports/types.py) for elements of
// type E, and does nothing where it is not defined for them.
template <class E>
struct Operators {  // of integers
    template <class Run>
    static __device__ __forceinline__ void with(int op, Run run) {
        switch (op) {
            case 0:
                return run(Sum{});
            case 1:
                return run(Prod{});
            case 2:
                return run(Min{});
            case 3:
                return run(Max{});
            case 4:
                return run(And{});
            case 5:
                return run(Or{});
            case 6:
                return run(Xor{});
        }
    }
};

struct FloatingOperators {
    template <class Run>
    static __device__ __forceinline__ void with(int op, Run run) {
        switch (op) {
            case 0:
                return run(Sum{});
            case 1:
                return run(Prod{});
            case 2:
                return run(Min{});
            case 3:
                return run(Max{});
        }
    }
};
template <>
struct Operators<Float16> : FloatingOperators {};
template <>
struct Operators<Bfloat16> : FloatingOperators {};
template <>
struct Operators<Plain<float>> : FloatingOperators {};
template <>
struct Operators<Plain<double>> : FloatingOperators {};

template <class T>
struct Operators<Complex<T>> {
    template <class Run>
    static __device__ __forceinline__ void with(int op, Run run) {
        switch (op) {
            case 0:
                return run(Sum{});
            case 1:
                return run(Prod{});
        }
    }
};

template <>
struct Operators<Bool> {
    template <class Run>
    static __device__ __forceinline__ void with(int op, Run run) {
        switch (op) {
            case 0:
            case 3:
            case 5:
                return run(Or{});
            case 1:
            case 2:
            case 4:
                return run(And{});
            case 6:
                return run(Xor{});
        }
    }
};

template <class E, class Run>
__device__ __forceinline__ void with_operator(int op, Run run) {
    Operators<E>::with(op, run);
}

// ---- accesses: what one load or store moves, unpacked into the values of its elements

// One element, at an address that is aligned for its parts.
template <class E>
struct Single {
    using Element = E;
    using Raw = typename E::Stored;
    static constexpr int lanes = 1;
    static __device__ __forceinline__ Raw load(const char* address) { return *reinterpret_cast<const Raw*>(address); }
    static __device__ __forceinline__ void store(char* address, Raw raw) { *reinterpret_cast<Raw*>(address) = raw; }
    static __device__ __forceinline__ void unpack(typename E::Value (&values)[lanes], Raw raw) {
        values[0] = E::widen(raw);
    }
    static __device__ __forceinline__ Raw pack(const typename E::Value (&values)[lanes]) {
        return E::narrow(values[0]);
    }
};

// 16 bytes of elements, at an address that is a multiple of 16.
template <class E>
struct Vector {
    using Element = E;
    using Raw = uint4;
    static constexpr int lanes = static_cast<int>(sizeof(Raw) / sizeof(typename E::Stored));
    struct Elements {
        typename E::Stored elements[lanes];
    };
    static __device__ __forceinline__ Raw load(const char* address) { return *reinterpret_cast<const Raw*>(address); }
    static __device__ __forceinline__ void store(char* address, Raw raw) { *reinterpret_cast<Raw*>(address) = raw; }
    static __device__ __forceinline__ void unpack(typename E::Value (&values)[lanes], Raw raw) {
        const auto stored = bits<Elements>(raw);
#pragma unroll
        for (int lane = 0; lane < lanes; ++lane) values[lane] = E::widen(stored.elements[lane]);
    }
    static __device__ __forceinline__ Raw pack(const typename E::Value (&values)[lanes]) {
        Elements stored;
#pragma unroll
        for (int lane = 0; lane < lanes; ++lane) stored.elements[lane] = E::narrow(values[lane]);
        return bits<Raw>(stored);
    }
};

// 16 bytes as they are best computed: bitwise operators need no elements.
template <class E, class O>
struct Widest {
    using Access = Vector<E>;
};
template <class E>
struct Widest<E, And> {
    using Access = Vector<Plain<u32>>;
};
template <class E>
struct Widest<E, Or> {
    using Access = Vector<Plain<u32>>;
};
template <class E>
struct Widest<E, Xor> {
    using Access = Vector<Plain<u32>>;
};

// total = total op raw, element by element.
template <class Access, class O>
__device__ __forceinline__ void accumulate(typename Access::Element::Value (&total)[Access::lanes],
                                           typename Access::Raw raw) {
    typename Access::Element::Value values[Access::lanes];
    Access::unpack(values, raw);
#pragma unroll
    for (int lane = 0; lane < Access::lanes; ++lane) total[lane] = O::of(total[lane], values[lane]);
}

}  // namespace abccl
