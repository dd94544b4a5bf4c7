// Names the data types and reduction operators of abccl by number; Python uses the same numbers.
#pragma once

#include <cstddef>
#include <cstdint>

namespace abccl {

enum class Type : int32_t { f16, bf16, f32, f64, i8, i16, i32, i64, u8, u16, u32, u64, boolean, c64, c128 };
enum class Op : int32_t { sum, prod, min, max, band, bor, bxor };  // avg and premul_sum are sum plus scaling

constexpr int type_count = 15;
constexpr int op_count = 7;

inline size_t size_of(Type type) {
    constexpr size_t sizes[type_count] = {2, 2, 4, 8, 1, 2, 4, 8, 1, 2, 4, 8, 1, 8, 16};
    return sizes[static_cast<int>(type)];
}

inline const char* name(Type type) {
    constexpr const char* names[type_count] = {"float16", "bfloat16", "float32", "float64",   "int8",
                                               "int16",   "int32",    "int64",   "uint8",     "uint16",
                                               "uint32",  "uint64",   "bool",    "complex64", "complex128"};
    return names[static_cast<int>(type)];
}

inline const char* name(Op op) {
    constexpr const char* names[op_count] = {"sum", "prod", "min", "max", "band", "bor", "bxor"};
    return names[static_cast<int>(op)];
}

inline bool is_complex(Type type) { return type >= Type::c64; }
inline bool is_floating(Type type) { return type <= Type::f64; }

// Bitwise operators are for integers and bool, an order is for all but complex.
inline bool defined(Op op, Type type) {
    switch (op) {
        case Op::sum:
        case Op::prod:
            return true;
        case Op::min:
        case Op::max:
            return !is_complex(type);
        default:
            return !is_complex(type) && !is_floating(type);
    }
}

inline bool scalable(Type type) { return is_floating(type) || is_complex(type); }

}  // namespace abccl
