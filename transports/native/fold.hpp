// Folds vectors element by element (the arithmetic of every reducing collective) and scales them.
#pragma once

#include "types.hpp"

namespace abccl {

// destination[i] = sources[0][i] op sources[1][i] op ... op sources[k - 1][i], left to right; k >= 1.
//
// The destination may be exactly one of the sources; partial overlap is not allowed. Pointers need no alignment.
// float16 and bfloat16 are folded in float32 and rounded to nearest even once. Integers wrap. For bool, whose
// bytes are 0 or 1, sum and max are "or", prod and min are "and". min and max of a NaN are NaN. Neither the
// payload of a NaN nor the sign of a minimum or maximum of two zeros is promised to be independent of the order.
// Throws std::invalid_argument where not defined(op, type).
void fold(Type type, Op op, void* destination, const void* const* sources, int k, size_t count);

// destination[i] = factor * source[i], where scalable(type). The destination may be the source. The factor is
// rounded to the type that is computed in: float64 for float64 and complex128, else float32.
void scale(Type type, void* destination, const void* source, double factor, size_t count);

// The kernels exist once for each of these: "baseline", on x86-64 also "avx2" and "avx512". The best that the CPU
// has is picked when the library is loaded.
const char* instruction_set();

// For tests and measurements: switches to the variant of that name, or returns false where the CPU has it not.
bool use_instruction_set(const char* name);

}  // namespace abccl
