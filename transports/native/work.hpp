// An asynchronous operation as its waiters see it.
#pragma once

#include <atomic>
#include <exception>
#include <string>

#include "endpoint.hpp"

namespace abccl {

class Work {
  public:
    bool finished() const { return state_.load(std::memory_order_acquire) != 0; }
    // The rank that a finished receive came from.
    uint32_t source = 0;
    // A receive whose message may never come: nobody is lost if its peer goes.
    std::atomic<bool> standing{false};

    // When the engine took it up, and when it let go of it. Written by the engine, read once finished.
    Deadline started{}, ended{};

    void succeed() { set(1); }
    void fail(std::exception_ptr error) {
        error_ = std::move(error);
        set(2);
    }
    // Rethrows the operation's error, if it failed. Only once finished.
    void check() const {
        if (error_) std::rethrow_exception(error_);
    }
    // Waits until finished, without a lock held. False if the deadline came first. Calls `on_tick` now and then.
    bool wait(Deadline deadline, bool ticks = true);

  private:
    void set(uint32_t state);
    std::atomic<uint32_t> state_{0};
    std::exception_ptr error_;
};

}  // namespace abccl
