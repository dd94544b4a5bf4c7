// The fold kernels for x86-64 with AVX-512 (F, BW, DQ and VL).
#ifdef __x86_64__

#include <immintrin.h>

#include "fold_table.hpp"

#pragma GCC target("avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=256")
#define ABCCL_ISA avx512
#define ABCCL_F16C
#include "fold_kernels.inc"

namespace abccl {
constexpr FoldTable fold_avx512 = avx512::make_table("avx512");
}

#endif
