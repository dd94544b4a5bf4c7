// The fold kernels for x86-64 with AVX2 and F16C.
#ifdef __x86_64__

#include <immintrin.h>

#include "fold_table.hpp"

#pragma GCC target("avx2,f16c")
#define ABCCL_ISA avx2
#define ABCCL_F16C
#include "fold_kernels.inc"

namespace abccl {
constexpr FoldTable fold_avx2 = avx2::make_table("avx2");
}

#endif
