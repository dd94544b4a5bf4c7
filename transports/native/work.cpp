#include "work.hpp"

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>

namespace abccl {

bool Work::wait(Deadline deadline) {
    for (int idle = 0; !finished(); ++idle) {
        if (idle < 100) {
            sched_yield();
            continue;
        }
        const timespec tick{0, 20 * 1000000L};
        syscall(__NR_futex, &state_, FUTEX_WAIT_PRIVATE, 0, &tick, nullptr, 0);
        if (finished()) break;
        Endpoint::on_tick();
        if (Clock::now() > deadline) return false;
    }
    return true;
}

void Work::set(uint32_t state) {
    state_.store(state, std::memory_order_release);
    syscall(__NR_futex, &state_, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

}  // namespace abccl
