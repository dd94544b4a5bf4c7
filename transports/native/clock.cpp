#include "clock.hpp"

namespace abccl {
namespace {

struct Anchor {
    int64_t ns = monotonic_ns();
    uint64_t counted = ticks();
};
// When this process began, so that the rate is known well when somebody asks.
const Anchor anchor;

}  // namespace

ClockReading ClockReading::now() {
    ClockReading reading{monotonic_ns(), ticks(), 1.0};
    const uint64_t counted = reading.counted - anchor.counted;
    if (counted != 0) reading.ns_per_tick = static_cast<double>(reading.ns - anchor.ns) / static_cast<double>(counted);
    return reading;
}

}  // namespace abccl
