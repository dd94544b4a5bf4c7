#include "copy.hpp"

#include <cstdint>
#include <cstring>

#ifdef __x86_64__
#include <emmintrin.h>
#endif

namespace abccl {

void copy(void* destination, const void* source, size_t bytes) {
    if (bytes != 0) std::memcpy(destination, source, bytes);
}

#ifdef __x86_64__

// A write-combining buffer that is not filled as one whole line is written in pieces, so lines are begun at 64-byte
// borders and written at once.
void copy_streaming(void* destination, const void* source, size_t bytes) {
    constexpr size_t line = 64;
    auto* to = static_cast<char*>(destination);
    auto* from = static_cast<const char*>(source);

    const size_t head = -reinterpret_cast<uintptr_t>(to) % line;
    if (bytes < head + line) return copy(to, from, bytes);
    std::memcpy(to, from, head);
    to += head, from += head, bytes -= head;

    for (; bytes >= line; to += line, from += line, bytes -= line) {
        auto* wide_from = reinterpret_cast<const __m128i*>(from);
        auto* wide_to = reinterpret_cast<__m128i*>(to);
        const __m128i a = _mm_loadu_si128(wide_from), b = _mm_loadu_si128(wide_from + 1);
        const __m128i c = _mm_loadu_si128(wide_from + 2), d = _mm_loadu_si128(wide_from + 3);
        _mm_stream_si128(wide_to, a), _mm_stream_si128(wide_to + 1, b);
        _mm_stream_si128(wide_to + 2, c), _mm_stream_si128(wide_to + 3, d);
    }
    std::memcpy(to, from, bytes);
    _mm_sfence();
}

#else

void copy_streaming(void* destination, const void* source, size_t bytes) { copy(destination, source, bytes); }

#endif

}  // namespace abccl
