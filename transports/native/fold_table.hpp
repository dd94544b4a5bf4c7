// The table through which fold.cpp reaches the kernels of one instruction set.
#pragma once

#include "quantize.hpp"
#include "types.hpp"

namespace abccl {

using FoldKernel = void (*)(char* destination, const char* const* sources, int k, size_t count);  // k >= 2
using ScaleKernel = void (*)(char* destination, const char* source, double factor, size_t count);
using QuantizeKernel = void (*)(float* values, const float* added, int8_t* integers, float* scales, size_t blocks);
using DequantizeKernel = void (*)(float* out, const char* const* rows, size_t k, float factor, size_t blocks);

struct FoldTable {
    const char* name;
    FoldKernel fold[type_count][op_count];  // null where the operator is not defined for the type
    ScaleKernel scale[type_count];          // null where the type is not scalable
    QuantizeKernel quantize;
    DequantizeKernel dequantize;
};

// The one that is in use.
const FoldTable& fold_table();

// Each is a constant, so that no code of an instruction set runs before the CPU was asked for it.
extern const FoldTable fold_baseline;
extern const FoldTable fold_avx2;
extern const FoldTable fold_avx512;

}  // namespace abccl
