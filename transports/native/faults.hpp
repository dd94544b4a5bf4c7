// Faults that tests inject: at the n-th pass of a point this process dies, stalls, aborts. Costs a load where nothing
// is injected.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>

namespace abccl::faults {

enum class Point : uint32_t { step, wait, create, attach };
enum class Action : uint32_t { none, delay, die, abort, deadline, refuse };

extern std::atomic<bool> in_use;
extern std::atomic<bool> late;  // the present run's deadline has passed, whatever the clock says

// Throws Failure(argument) if there is no such point or action.
void inject(const std::string& point, const std::string& action, uint64_t after, uint32_t milliseconds);
uint64_t passes(const std::string& point);
// What is to be done now. Delays and deaths have been done.
Action hit(Point point);

inline Action pass(Point point) { return in_use.load(std::memory_order_relaxed) ? hit(point) : Action::none; }
inline bool is_late() { return in_use.load(std::memory_order_relaxed) && late.exchange(false); }

}  // namespace abccl::faults
