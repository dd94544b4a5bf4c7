// Block-scaled 8-bit integers, in which gradients travel when bytes are dear.
#pragma once

#include <cstddef>
#include <cstdint>

namespace abccl {

constexpr size_t quantized_block = 256;  // values that share a scale

// A row of `count` values (a multiple of the block) as bytes: the integers, then one float32 scale a block.
constexpr size_t quantized_bytes(size_t count) { return count + count / quantized_block * sizeof(float); }

// Adds `added` (or nothing, if null) to the values, writes them as a row, and leaves in `values` what was rounded off.
// The scale of a block is its largest magnitude / 127, so that is at most the magnitude / 254. A block whose scale
// would be no normal number is written as zeros, and stays; one that is not finite gets a scale that is not a number,
// and nothing of it stays. Pointers need the alignment of float.
void quantize(float* values, const float* added, void* row, size_t count);

// out = factor * (the sum of the k rows, in their order).
void dequantize(float* out, const void* const* rows, size_t k, float factor, size_t count);

}  // namespace abccl
