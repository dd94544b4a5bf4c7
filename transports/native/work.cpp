#include "work.hpp"

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <climits>

namespace abccl {

bool Work::wait(Deadline deadline, bool ticks) {
    for (int idle = 0; !finished(); ++idle) {
        if (idle < 100) {
            sched_yield();
            continue;
        }
        constexpr std::chrono::nanoseconds longest = std::chrono::milliseconds(20);
        const auto left = deadline == Deadline::max()
                              ? longest
                              : std::min<std::chrono::nanoseconds>(longest, deadline - Clock::now());
        if (left.count() <= 0) return false;
        const timespec tick{0, left.count()};
        syscall(__NR_futex, &state_, FUTEX_WAIT_PRIVATE, 0, &tick, nullptr, 0);
        if (ticks && !finished()) Endpoint::on_tick();
    }
    return true;
}

void Work::set(uint32_t state) {
    ended = Clock::now();
    state_.store(state, std::memory_order_release);
    syscall(__NR_futex, &state_, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

}  // namespace abccl
