// Checks the fold, scale and copy kernels of every instruction set against scalar code written independently.
//
// Build with the flags of the library, at least -ffp-contract=off, together with transports/native/fold*.cpp and
// copy.cpp. Prints what failed and returns 1, or prints a summary.
#include <algorithm>
#include <cmath>
#include <complex>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "../../transports/native/copy.hpp"
#include "../../transports/native/fold.hpp"

namespace {

using abccl::Op;
using abccl::Type;
using Bytes = std::vector<unsigned char>;

const size_t counts[] = {0, 1, 2, 3, 15, 16, 17, 63, 64, 65, 1000, 4099};
constexpr size_t most = 4099;
constexpr size_t guard = 64;
constexpr unsigned char guard_byte = 0xa5;

int failures = 0;
long checks = 0;

void check(bool ok, const std::string& what) {
    ++checks;
    if (ok) return;
    if (++failures <= 20) std::printf("FAILED: %s\n", what.c_str());
}

// ---- The reference: elements are decoded to something exact, combined one at a time, and encoded.

template <class T>
T get(const Bytes& bytes, size_t i) {
    T value;
    std::memcpy(&value, bytes.data() + i * sizeof value, sizeof value);
    return value;
}

template <class T>
void put(Bytes& bytes, size_t i, T value) {
    std::memcpy(bytes.data() + i * sizeof value, &value, sizeof value);
}

// A binary floating-point format of 16 bits.
struct Small {
    int mantissa_bits, bias;

    float decode(uint16_t code) const {
        const int exponents = 1 << (15 - mantissa_bits), fractions = 1 << mantissa_bits;
        const int exponent = code >> mantissa_bits & (exponents - 1), fraction = code & (fractions - 1);
        const float sign = code & 0x8000 ? -1.f : 1.f;
        if (exponent == exponents - 1) return fraction ? NAN : sign * INFINITY;
        if (exponent == 0) return sign * std::ldexp(float(fraction), 1 - bias - mantissa_bits);
        return sign * std::ldexp(float(fractions + fraction), exponent - bias - mantissa_bits);
    }
    uint16_t encode(float value) const {
        const int exponents = 1 << (15 - mantissa_bits), fractions = 1 << mantissa_bits;
        const int sign = std::signbit(value) ? 0x8000 : 0, infinity = (exponents - 1) << mantissa_bits;
        if (std::isnan(value)) return uint16_t(infinity + fractions / 2);
        if (std::isinf(value)) return uint16_t(sign | infinity);
        if (value == 0) return uint16_t(sign);
        const int exponent = std::max(std::ilogb(value), 1 - bias);
        const double units = std::nearbyint(std::ldexp(std::fabs(double(value)), mantissa_bits - exponent));
        const int code = int(units) + ((exponent + bias - 1) << mantissa_bits);  // a carry raises the exponent
        return uint16_t(sign | std::min(code, infinity));
    }
};

constexpr Small half{10, 15}, bfloat{7, 127};

template <class T>
T combine(Op op, T a, T b) {
    if constexpr (std::is_integral_v<T>) {
        const auto x = static_cast<unsigned __int128>(a), y = static_cast<unsigned __int128>(b);
        switch (op) {
            case Op::sum:
                return T(x + y);
            case Op::prod:
                return T(x * y);
            case Op::min:
                return a < b ? a : b;
            case Op::max:
                return a < b ? b : a;
            case Op::band:
                return T(x & y);
            case Op::bor:
                return T(x | y);
            default:
                return T(x ^ y);
        }
    } else if constexpr (std::is_floating_point_v<T>) {
        if (std::isnan(a) || std::isnan(b)) return std::numeric_limits<T>::quiet_NaN();
        switch (op) {
            case Op::sum:
                return a + b;
            case Op::prod:
                return a * b;
            case Op::min:
                return std::fmin(a, b);
            default:
                return std::fmax(a, b);
        }
    } else {
        if (op == Op::sum) return {a.real() + b.real(), a.imag() + b.imag()};
        return {a.real() * b.real() - a.imag() * b.imag(), a.real() * b.imag() + a.imag() * b.real()};
    }
}

bool combine_bool(Op op, bool a, bool b) {
    switch (op) {
        case Op::sum:
        case Op::max:
        case Op::bor:
            return a || b;
        case Op::bxor:
            return a != b;
        default:
            return a && b;
    }
}

// Calls visit with a decoder and an encoder for elements of the type.
template <class Visit>
void with_type(Type type, Visit visit) {
    const auto plain = [&](auto zero) {
        using T = decltype(zero);
        visit([](const Bytes& b, size_t i) { return get<T>(b, i); }, [](Bytes& b, size_t i, T v) { put(b, i, v); });
    };
    const auto small = [&](const Small& format) {
        visit([&](const Bytes& b, size_t i) { return format.decode(get<uint16_t>(b, i)); },
              [&](Bytes& b, size_t i, float v) { put(b, i, format.encode(v)); });
    };
    switch (type) {
        case Type::f16:
            return small(half);
        case Type::bf16:
            return small(bfloat);
        case Type::f32:
            return plain(float{});
        case Type::f64:
            return plain(double{});
        case Type::i8:
            return plain(int8_t{});
        case Type::i16:
            return plain(int16_t{});
        case Type::i32:
            return plain(int32_t{});
        case Type::i64:
            return plain(int64_t{});
        case Type::u8:
            return plain(uint8_t{});
        case Type::u16:
            return plain(uint16_t{});
        case Type::u32:
            return plain(uint32_t{});
        case Type::u64:
            return plain(uint64_t{});
        case Type::boolean:
            return plain(bool{});
        case Type::c64:
            return plain(std::complex<float>{});
        case Type::c128:
            return plain(std::complex<double>{});
    }
}

Bytes expected_fold(Type type, Op op, const std::vector<Bytes>& sources, int k) {
    Bytes result(most * abccl::size_of(type));
    with_type(type, [&](auto decode, auto encode) {
        for (size_t i = 0; i < most; ++i) {
            auto value = decode(sources[0], i);
            for (int j = 1; j < k; ++j) {
                const auto next = decode(sources[size_t(j)], i);
                if constexpr (std::is_same_v<decltype(value), bool>)
                    value = combine_bool(op, value, next);
                else
                    value = combine(op, value, next);
            }
            if (k == 1)
                std::memcpy(&result[i * abccl::size_of(type)], &sources[0][i * abccl::size_of(type)],
                            abccl::size_of(type));
            else
                encode(result, i, value);
        }
    });
    return result;
}

Bytes expected_scale(Type type, const Bytes& source, double factor) {
    const size_t n = source.size() / abccl::size_of(type);
    Bytes result(source.size());
    with_type(type, [&](auto decode, auto encode) {
        for (size_t i = 0; i < n; ++i) {
            auto value = decode(source, i);
            using T = decltype(value);
            if constexpr (std::is_floating_point_v<T>)
                value *= T(factor);
            else if constexpr (!std::is_integral_v<T>)
                value = T(value.real() * typename T::value_type(factor), value.imag() * typename T::value_type(factor));
            encode(result, i, value);
        }
    });
    return result;
}

// ---- Data and comparison.

std::mt19937_64 random_bits{20240229};

template <class T>
T random_real() {
    const T specials[] = {T(0),
                          -T(0),
                          T(INFINITY),
                          -T(INFINITY),
                          T(NAN),
                          std::numeric_limits<T>::denorm_min(),
                          std::numeric_limits<T>::max(),
                          std::numeric_limits<T>::min()};
    const uint64_t r = random_bits();
    if (r % 16 == 0) return specials[r / 16 % 8];
    return T(std::ldexp(double(int64_t(random_bits())), int(r / 16 % 8) - 64));
}

Bytes random_vector(Type type) {
    Bytes bytes(most * abccl::size_of(type));
    for (size_t i = 0; i < most; ++i) {
        if (type == Type::f32) put(bytes, i, random_real<float>());
        if (type == Type::f64) put(bytes, i, random_real<double>());
        if (type == Type::c64) put(bytes, i, std::complex<float>(random_real<float>(), random_real<float>()));
        if (type == Type::c128) put(bytes, i, std::complex<double>(random_real<double>(), random_real<double>()));
        if (type == Type::boolean) bytes[i] = random_bits() & 1;
    }
    if (type == Type::f16 || type == Type::bf16) {
        // Half of the numbers have any bits, half of them meet in magnitude.
        for (size_t i = 0; i < most; ++i) {
            const auto r = uint16_t(random_bits());
            const auto near =
                type == Type::f16 ? half.encode(random_real<float>()) : bfloat.encode(random_real<float>());
            put(bytes, i, random_bits() & 1 ? r : near);
        }
    } else if (!abccl::scalable(type) && type != Type::boolean) {
        for (unsigned char& byte : bytes) byte = static_cast<unsigned char>(random_bits());
    }
    return bytes;
}

// Bits are compared, but one NaN is as good as another, and so is one zero where `zeros` says it.
bool same(Type type, const unsigned char* a, const unsigned char* b, size_t count, bool zeros) {
    const size_t bytes = count * abccl::size_of(type);
    if (bytes == 0 || std::memcmp(a, b, bytes) == 0) return true;
    const auto real = [&](auto zero, auto decode) {
        using T = decltype(zero);
        for (size_t at = 0; at < bytes; at += sizeof(T)) {
            T x, y;
            std::memcpy(&x, a + at, sizeof x);
            std::memcpy(&y, b + at, sizeof y);
            const auto v = decode(x), w = decode(y);
            if (std::memcmp(&x, &y, sizeof x) == 0 || (std::isnan(v) && std::isnan(w))) continue;
            if (!(zeros && v == 0 && w == 0)) return false;
        }
        return true;
    };
    switch (type) {
        case Type::f16:
            return real(uint16_t{}, [](uint16_t x) { return half.decode(x); });
        case Type::bf16:
            return real(uint16_t{}, [](uint16_t x) { return bfloat.decode(x); });
        case Type::f32:
        case Type::c64:
            return real(float{}, [](float x) { return x; });
        case Type::f64:
        case Type::c128:
            return real(double{}, [](double x) { return x; });
        default:
            return false;
    }
}

// A buffer at a chosen distance from 64-byte alignment, with guard bytes on both sides.
struct Guarded {
    Guarded(size_t size, size_t offset) : size(size), store(size + offset + 2 * guard + 64, guard_byte) {
        const size_t up = -reinterpret_cast<uintptr_t>(store.data() + guard) % 64;
        data = store.data() + guard + up + offset;
    }
    void set(const unsigned char* from) {
        if (size) std::memcpy(data, from, size);
    }
    bool intact() const {
        const auto untouched = [](const unsigned char* from, const unsigned char* to) {
            return std::all_of(from, to, [](unsigned char byte) { return byte == guard_byte; });
        };
        return untouched(store.data(), data) && untouched(data + size, store.data() + store.size());
    }
    size_t size;
    Bytes store;
    unsigned char* data;
};

// ---- The checks.

void check_fold(Type type, Op op, int k, const std::vector<Bytes>& sources, const Bytes& expected) {
    const bool zeros = op == Op::min || op == Op::max;
    const size_t width = abccl::size_of(type);
    for (size_t count : counts) {
        for (size_t offset : {size_t{0}, width, size_t{1}, size_t{23}}) {
            std::vector<Guarded> buffers;  // the sources, then a destination of its own
            for (int j = 0; j <= k; ++j) buffers.emplace_back(count * width, offset + size_t(j) * (offset % 2));
            for (int alias = 0; alias <= k; ++alias) {
                std::vector<const void*> pointers;
                for (int j = 0; j < k; ++j) {
                    buffers[size_t(j)].set(sources[size_t(j)].data());
                    pointers.push_back(buffers[size_t(j)].data);
                }
                unsigned char* destination = buffers[size_t(alias)].data;
                abccl::fold(type, op, destination, pointers.data(), k, count);
                bool ok = same(type, destination, expected.data(), count, zeros);
                for (int j = 0; j <= k; ++j) {
                    ok = ok && buffers[size_t(j)].intact();
                    if (j < k && j != alias && count)
                        ok = ok && std::memcmp(buffers[size_t(j)].data, sources[size_t(j)].data(), count * width) == 0;
                }
                check(ok, std::string(abccl::instruction_set()) + " fold " + name(type) + " " + name(op) + " k " +
                              std::to_string(k) + " count " + std::to_string(count) + " offset " +
                              std::to_string(offset) + " alias " + std::to_string(alias));
            }
        }
    }
}

void check_scale(Type type, const Bytes& source, double factor, const std::vector<size_t>& lengths) {
    const Bytes expected = expected_scale(type, source, factor);
    for (size_t count : lengths)
        for (size_t offset : {0, 1, 6})
            for (bool alias : {false, true}) {
                Guarded from(count * abccl::size_of(type), offset), to(from.size, 2 * offset);
                from.set(source.data());
                Guarded& into = alias ? from : to;
                abccl::scale(type, into.data, from.data, factor, count);
                check(same(type, into.data, expected.data(), count, false) && from.intact() && to.intact(),
                      std::string(abccl::instruction_set()) + " scale " + name(type) + " by " + std::to_string(factor) +
                          " count " + std::to_string(count) + " offset " + std::to_string(offset));
            }
}

// Every code of the 16-bit types, alone and scaled so that it is rounded in every way.
void check_all_codes(Type type) {
    Bytes codes(2 * 65536);
    for (size_t i = 0; i < 65536; ++i) put(codes, i, uint16_t(i));
    Bytes back(codes.size());
    abccl::scale(type, back.data(), codes.data(), 1.0, 65536);
    check(same(type, back.data(), codes.data(), 65536, false),
          std::string(abccl::instruction_set()) + " round trip of " + name(type));
    for (double factor : {0.5, 1.5, 0.3333333, 1.0009765625, 1.00048828125, 1.00390625, 1.001953125, 3e-5, 5.9604645e-8,
                          2.9802322e-8, 1e-30, 32.5, 65504.0, 1e10, -1.0})
        check_scale(type, codes, factor, {65536});
}

bool throws(Type type, Op op) {
    char byte[16] = {};
    const void* sources[] = {byte, byte};
    try {
        abccl::fold(type, op, byte, sources, 2, 1);
    } catch (const std::invalid_argument&) {
        return true;
    }
    return false;
}

void check_kernels(const std::vector<const char*>& sets) {
    for (int t = 0; t < abccl::type_count; ++t) {
        const auto type = Type(t);
        std::vector<Bytes> sources;
        for (int j = 0; j < 9; ++j) sources.push_back(random_vector(type));
        for (int o = 0; o < abccl::op_count; ++o) {
            const auto op = Op(o);
            if (!defined(op, type)) {
                check(throws(type, op), std::string(name(op)) + " should be refused for " + name(type));
                continue;
            }
            for (int k = 1; k <= 9; ++k) {
                const Bytes expected = expected_fold(type, op, sources, k);
                for (const char* set : sets) {
                    abccl::use_instruction_set(set);
                    check_fold(type, op, k, sources, expected);
                }
            }
        }
        for (const char* set : sets) {
            abccl::use_instruction_set(set);
            if (!abccl::scalable(type)) continue;
            for (double factor : {1.0 / 3, 0.5, -7.25})
                check_scale(type, sources[0], factor, std::vector<size_t>(std::begin(counts), std::end(counts)));
            if (type <= Type::bf16) check_all_codes(type);
        }
    }
}

void check_copy(void (*copy)(void*, const void*, size_t), const char* what) {
    Bytes source(70000 + 64);
    for (unsigned char& byte : source) byte = static_cast<unsigned char>(random_bits());
    const auto one = [&](size_t length, size_t to, size_t from) {
        Guarded buffer(length, to);
        copy(buffer.data, source.data() + from, length);
        check(buffer.intact() && (length == 0 || std::memcmp(buffer.data, source.data() + from, length) == 0),
              std::string(what) + " length " + std::to_string(length) + " to " + std::to_string(to) + " from " +
                  std::to_string(from));
    };
    for (size_t to = 0; to < 64; ++to)
        for (size_t from : {0, 1, 7, 16, 33}) {
            for (size_t length = 0; length <= 260; ++length) one(length, to, from);
            for (size_t length : {4095, 4096, 4097, 65537}) one(length, to, from);
        }
    // A destination that is a little ahead of the source, modulo the page.
    Guarded buffer(9000, 5);
    for (size_t ahead = 0; ahead <= 70; ++ahead) {
        const size_t from =
            (reinterpret_cast<uintptr_t>(buffer.data) - ahead - reinterpret_cast<uintptr_t>(source.data())) % 4096;
        for (size_t length : {2047, 2048, 2049, 5000, 9000}) {
            std::memset(buffer.data, 0, buffer.size);
            copy(buffer.data, source.data() + from, length);
            check(buffer.intact() && std::memcmp(buffer.data, source.data() + from, length) == 0 &&
                      (length == buffer.size || buffer.data[length] == 0),
                  std::string(what) + " length " + std::to_string(length) + " ahead " + std::to_string(ahead));
        }
    }
}

}  // namespace

int main() {
    std::vector<const char*> sets;
    std::printf("picked %s; checking", abccl::instruction_set());
    for (const char* set : {"baseline", "avx2", "avx512"})
        if (abccl::use_instruction_set(set)) {
            sets.push_back(set);
            std::printf(" %s", set);
        }
    std::printf("\n");
    check(!abccl::use_instruction_set("none"), "an unknown instruction set should be refused");
    check_kernels(sets);
    check_copy(abccl::copy, "copy");
    check_copy(abccl::copy_streaming, "copy_streaming");
    std::printf("%ld checks, %d failed\n", checks, failures);
    return failures != 0;
}
