// Checks the 8-bit kernels of every instruction set against scalar code written independently.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "../../transports/native/fold.hpp"
#include "../../transports/native/quantize.hpp"

namespace {

constexpr size_t block = abccl::quantized_block;
constexpr unsigned char guard = 0xa5;

int failures = 0;

void check(bool ok, const char* what, size_t at) {
    if (!ok && ++failures <= 20) std::printf("FAILED: %s at %zu, %s\n", what, at, abccl::instruction_set());
}

// Values of many magnitudes; the first block zeros, the second too small for a scale, the third with an infinity, the
// fourth with a NaN.
std::vector<float> values_of(size_t blocks, unsigned seed) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    std::vector<float> values(blocks * block);
    for (size_t i = 0; i < values.size(); ++i)
        values[i] = normal(random) * std::exp2(static_cast<float>(i / block % 40) - 20);
    for (size_t i = 0; i < block && blocks > 3; ++i) {
        values[i] = 0;
        values[block + i] *= 1e-37f;
    }
    if (blocks > 3) {
        values[2 * block + 5] = -std::numeric_limits<float>::infinity();
        values[3 * block + block - 1] = std::numeric_limits<float>::quiet_NaN();
    }
    return values;
}

void check_row(size_t blocks, bool adds) {
    const size_t count = blocks * block, bytes = abccl::quantized_bytes(count);
    const std::vector<float> before = values_of(blocks, 1), added = values_of(blocks, 2);
    std::vector<float> left = before, out(count + 1, 7);
    std::vector<unsigned char> row(bytes + 64, guard);
    abccl::quantize(left.data(), adds ? added.data() : nullptr, row.data(), count);
    const void* rows[] = {row.data()};
    abccl::dequantize(out.data(), rows, 1, 1.0f, count);
    for (size_t i = bytes; i < row.size(); ++i) check(row[i] == guard, "wrote behind the row", i);
    check(out[count] == 7, "wrote behind the values", count);
    for (size_t b = 0; b < blocks; ++b) {
        float largest = 0;
        bool finite = true;
        for (size_t i = b * block; i < (b + 1) * block; ++i) {
            const float sum = adds ? before[i] + added[i] : before[i];
            finite = finite && std::isfinite(sum);
            largest = std::fmax(largest, std::fabs(sum));
        }
        const bool tiny = largest / 127 < std::numeric_limits<float>::min();
        for (size_t i = b * block; i < (b + 1) * block; ++i) {
            const float sum = adds ? before[i] + added[i] : before[i];
            if (!finite) {
                check(!std::isfinite(out[i]) && left[i] == 0, "not finite", i);
            } else if (tiny) {
                check(out[i] == 0 && left[i] == sum, "tiny", i);
            } else {
                const float scale = largest / 127;
                const auto integer = static_cast<float>(static_cast<signed char>(row[i]));
                check(integer == std::nearbyint(sum * (1 / scale)), "rounding", i);
                check(out[i] == integer * scale, "value", i);
                check(left[i] == sum - integer * scale, "what is left", i);
                check(std::fabs(left[i]) <= largest / 254 * 1.0001f, "bound", i);
            }
        }
    }
}

void check_sum(size_t k) {
    constexpr size_t count = 5 * block;
    std::vector<std::vector<unsigned char>> packed(k, std::vector<unsigned char>(abccl::quantized_bytes(count)));
    std::vector<const void*> rows;
    std::vector<float> expected(count, 0), one(count), out(count);
    const float factor = 1.0f / static_cast<float>(k);
    for (size_t r = 0; r < k; ++r) {
        std::vector<float> values = values_of(3, static_cast<unsigned>(r));
        values.resize(count, static_cast<float>(r));
        abccl::quantize(values.data(), nullptr, packed[r].data(), count);
        rows.push_back(packed[r].data());
        abccl::dequantize(one.data(), &rows.back(), 1, factor, count);
        for (size_t i = 0; i < count; ++i) expected[i] += one[i];
    }
    abccl::dequantize(out.data(), rows.data(), k, factor, count);
    for (size_t i = 0; i < count; ++i) check(out[i] == expected[i], "sum", i);
}

}  // namespace

int main() {
    for (const char* name : {"baseline", "avx2", "avx512"}) {
        if (!abccl::use_instruction_set(name)) continue;
        for (size_t blocks : {0, 1, 2, 5, 41})
            for (bool adds : {false, true}) check_row(blocks, adds);
        for (size_t k : {1, 2, 3, 7}) check_sum(k);
    }
    if (failures) return 1;
    std::printf("quantize: all instruction sets agree with the reference\n");
    return 0;
}
