// How a plan's longer messages travel, and how the plan finds out which way is the fastest.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>

namespace abccl {

// A choice of each rank for each run.
struct Way {
    static constexpr int count = 4;

    bool lent;       // read where they lie, if both ends can; else copied into the sender's arena
    bool streaming;  // what is written for the peer to read goes past the cache

    int number() const { return lent * 2 + streaming; }
    static Way of(int number) { return {number >= 2, number % 2 == 1}; }
};

// Decides on the way by how long the plan's runs took. Which is the fastest depends on what the ranks' cores share, and
// a hypervisor may move them at any time; the wrong choice was seen to cost 5 times. What a way leaves in the caches
// slows the next one down at first, so ways are measured in windows of runs, by the median of the last few. All
// are tried in the first windows, or in every fourth where one was expected to be the fastest; and one of them in every
// 32nd later on. Ranks make the same runs, so those with messages of one length try together; they need not agree.
class Protocol {
  public:
    // The way to begin with, as somebody knows the ranks; before the first run.
    void expect(Way way) { expected_ = way; }
    // The only way, where it can be taken.
    void force(Way way) { forced_ = way; }
    std::optional<Way> forced() const { return forced_; }
    // The way of the next run, in which `run_bytes` go to a peer through its `arena_bytes`.
    Way next(Way at_first, bool can_lend, size_t run_bytes, size_t arena_bytes);
    // Whether `took` is to be told of this run; a look at the clock is not free.
    bool measures() const { return windows_ > 0 && run_ > window_ - taken(); }
    // Whether windows have so few runs that each must be timed by those who others go by.
    bool is_short() const { return window_ <= samples + 1; }
    void took(double seconds) { last_[run_ % samples] = seconds; }
    // Whether this run takes the best way, and is no trial of another.
    bool at_best() const { return current_ == best_; }

  private:
    static constexpr uint32_t shortest_window = 2, longest_window = 256, samples = 5, trial_every = 32,
                              first_trials = 4;
    static constexpr size_t walks = 2;  // through the arena in a window

    uint32_t taken() const { return std::min(samples, window_ - 1); }
    void end_window();

    std::optional<Way> expected_, forced_;
    uint32_t window_ = 0;  // runs; 0 before the first
    uint32_t run_ = 0;     // of the window, from 1
    uint32_t windows_ = 0;
    int ways_ = 0, best_ = 0, current_ = 0;
    double last_[samples] = {};     // seconds of the window's last runs
    double cost_[Way::count] = {};  // seconds; 0: not known
    double last_best_ = 0;          // of the last window of the best way
};

// What a plan's last runs took, for whoever asks, from any thread.
class Seen {
  public:
    // Whether this run of a plan that need not find a way is to be timed: one in 16.
    bool samples() { return ++runs_ % sample_every == 0; }
    void add(double seconds) {
        const uint32_t count = count_.load(std::memory_order_relaxed);
        seconds_[count % kept].store(seconds, std::memory_order_relaxed);
        count_.store(count + 1, std::memory_order_release);
    }
    // Seconds; none before a run was timed.
    std::optional<double> median() const;

  private:
    static constexpr uint32_t kept = 9, sample_every = 16;
    uint32_t runs_ = 0;
    std::atomic<uint32_t> count_{0};
    std::atomic<double> seconds_[kept] = {};
};

}  // namespace abccl
