#include "faults.hpp"

#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <thread>

#include "failure.hpp"

namespace abccl::faults {
namespace {

constexpr std::array<const char*, 4> points = {"step", "wait", "create", "attach"};
constexpr std::array<const char*, 6> actions = {"", "delay", "die", "abort", "deadline", "refuse"};

template <size_t n>
uint32_t number_of(const std::string& word, const std::array<const char*, n>& words) {
    const auto found = std::find(words.begin(), words.end(), word);
    if (found == words.end()) throw Failure(Kind::argument, "faults: there is no '" + word + "'");
    return static_cast<uint32_t>(found - words.begin());
}

struct Armed {
    std::atomic<uint32_t> point{0}, action{0};
    std::atomic<uint64_t> after{0};
    std::atomic<uint32_t> milliseconds{0};
} armed;

std::array<std::atomic<uint64_t>, points.size()> counted;

}  // namespace

std::atomic<bool> in_use{false}, late{false};

void inject(const std::string& point, const std::string& action, uint64_t after, uint32_t milliseconds) {
    const uint32_t what = number_of(action, actions);
    armed.action.store(0);
    armed.point.store(what == 0 ? 0 : number_of(point, points));
    armed.after.store(after);
    armed.milliseconds.store(milliseconds);
    for (auto& count : counted) count.store(0);
    late.store(false);
    in_use.store(true);
    armed.action.store(what);
}

uint64_t passes(const std::string& point) { return counted[number_of(point, points)].load(); }

Action hit(Point point) {
    const uint64_t pass = counted[static_cast<uint32_t>(point)].fetch_add(1);
    if (armed.point.load() != static_cast<uint32_t>(point) || pass != armed.after.load()) return Action::none;
    const Action action = static_cast<Action>(armed.action.exchange(0));
    if (action == Action::die) kill(getpid(), SIGKILL);
    if (action == Action::delay) std::this_thread::sleep_for(std::chrono::milliseconds(armed.milliseconds.load()));
    if (action == Action::deadline) late.store(true);
    return action;
}

}  // namespace abccl::faults
