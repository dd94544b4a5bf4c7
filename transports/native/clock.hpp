// Time stamps that cost next to nothing, in ticks; and what they are in nanoseconds of CLOCK_MONOTONIC.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <x86intrin.h>
#endif
#include <time.h>

namespace abccl {

inline int64_t monotonic_ns() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

#if defined(__x86_64__)
// Whether the processor's counter runs at one rate, on all cores, whatever they do.
bool has_steady_counter();
inline const bool steady_counter = has_steady_counter();
#endif

// The same on all processes of a host. clock_gettime takes 25 ns, the processor's counter 10.
inline uint64_t ticks() {
#if defined(__x86_64__)
    if (steady_counter) return __rdtsc();
#elif defined(__aarch64__)
    uint64_t value;
    asm volatile("mrs %0, cntvct_el0" : "=r"(value));
    return value;
#endif
    return static_cast<uint64_t>(monotonic_ns());
}

// Both clocks at one moment.
struct ClockPair {
    static ClockPair now();
    int64_t ns;
    uint64_t counted;
};

// Both clocks now, and how many nanoseconds a tick takes: on average since an earlier moment.
struct ClockReading {
    static ClockReading now(int64_t earlier_ns, uint64_t earlier_counted);
    double seconds(uint64_t at) const {
        return (static_cast<double>(ns) - static_cast<double>(static_cast<int64_t>(counted - at)) * ns_per_tick) * 1e-9;
    }
    int64_t ns;
    uint64_t counted;
    double ns_per_tick;
};

}  // namespace abccl
