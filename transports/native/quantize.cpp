// Calls the kernels of the instruction set that fold.cpp has picked.
#include "quantize.hpp"

#include "fold_table.hpp"

namespace abccl {

void quantize(float* values, const float* added, void* row, size_t count) {
    auto* bytes = static_cast<char*>(row);
    fold_table().quantize(values, added, reinterpret_cast<int8_t*>(bytes), reinterpret_cast<float*>(bytes + count),
                          count / quantized_block);
}

void dequantize(float* out, const void* const* rows, size_t k, float factor, size_t count) {
    fold_table().dequantize(out, reinterpret_cast<const char* const*>(rows), k, factor, count / quantized_block);
}

}  // namespace abccl
