#include "clock.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <fstream>
#include <limits>
#include <string>

namespace abccl {
namespace {

constexpr int64_t long_enough = 100'000'000;  // nanoseconds, for a rate

// When this process began.
const ClockPair beginning = ClockPair::now();

}  // namespace

#if defined(__x86_64__)
bool has_steady_counter() {
    unsigned a, b, c, d;
    if (!__get_cpuid(0x80000007, &a, &b, &c, &d) || !(d & 1u << 8)) return false;
    // The kernel watches it, and takes another clock if it finds it unsteady.
    std::string source;
    std::ifstream("/sys/devices/system/clocksource/clocksource0/current_clocksource") >> source;
    return source.empty() || source == "tsc" || source == "kvm-clock" || source.rfind("hyperv", 0) == 0;
}
#endif

ClockPair ClockPair::now() {
    ClockPair best{};
    uint64_t narrowest = std::numeric_limits<uint64_t>::max();
    // The scheduler may come between the two.
    for (int attempt = 0; attempt < 5; ++attempt) {
        const uint64_t before = ticks();
        const int64_t ns = monotonic_ns();
        const uint64_t width = ticks() - before;
        if (width >= narrowest) continue;
        narrowest = width;
        best = {ns, before + width / 2};
    }
    return best;
}

ClockReading ClockReading::now(int64_t earlier_ns, uint64_t earlier_counted) {
    const ClockPair now = ClockPair::now();
    ClockPair earlier{earlier_ns, earlier_counted};
    if (now.ns - earlier.ns < long_enough) earlier = beginning;
    const uint64_t counted = now.counted - earlier.counted;
    return {now.ns, now.counted,
            counted ? static_cast<double>(now.ns - earlier.ns) / static_cast<double>(counted) : 1.0};
}

}  // namespace abccl
