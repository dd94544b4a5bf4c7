#include "protocol.hpp"

namespace abccl {

Way Protocol::next(Way at_first, bool can_lend, size_t run_bytes, size_t arena_bytes) {
    const int ways = can_lend ? Way::count : Way::count / 2;
    if (ways != ways_) {
        const auto expected = expected_;
        *this = Protocol();
        expected_ = expected;
        ways_ = ways;
        if (expected && (can_lend || !expected->lent)) at_first = *expected;
        best_ = current_ = at_first.number();
        // A long run goes through all of the arena by itself.
        const size_t runs = shortest_window + walks * arena_bytes / std::max<size_t>(run_bytes, 1);
        window_ = static_cast<uint32_t>(std::min<size_t>(runs, longest_window));
    }
    // The first window only touches the memory.
    if (run_ == (windows_ == 0 ? shortest_window : window_)) end_window();
    ++run_;
    return Way::of(current_);
}

void Protocol::end_window() {
    if (windows_ > 0) {
        double last[samples];
        for (uint32_t i = 0; i < taken(); ++i) last[i] = last_[(window_ - i) % samples];
        double* median = last + (taken() - 1) / 2;
        std::nth_element(last, median, last + taken());
        // One slow window of the best way does not count: a long run's is one sample.
        const bool goes_on = current_ == best_ && last_best_ != 0;
        cost_[current_] = goes_on ? std::min(*median, last_best_) : *median;
        if (current_ == best_) last_best_ = *median;
        const int before = best_;
        for (int way = 0; way < ways_; ++way)
            if (cost_[way] != 0 && (cost_[best_] == 0 || cost_[way] < 0.9 * cost_[best_])) best_ = way;
        if (best_ != before) last_best_ = 0;
    }
    run_ = 0;
    ++windows_;
    const uint32_t ways = static_cast<uint32_t>(ways_);
    if (expected_ && windows_ <= ways * first_trials)
        current_ = windows_ % first_trials == 0 ? static_cast<int>(windows_ / first_trials - 1) : best_;
    else if (windows_ <= ways)
        current_ = static_cast<int>(windows_ - 1);
    else if (windows_ % trial_every == 0)
        current_ = static_cast<int>(windows_ / trial_every % ways);
    else
        current_ = best_;
}

std::optional<double> Seen::median() const {
    const uint32_t count = std::min(count_.load(std::memory_order_acquire), kept);
    if (count == 0) return std::nullopt;
    double sorted[kept];
    for (uint32_t i = 0; i < count; ++i) sorted[i] = seconds_[i].load(std::memory_order_relaxed);
    std::nth_element(sorted, sorted + count / 2, sorted + count);
    return sorted[count / 2];
}

}  // namespace abccl
