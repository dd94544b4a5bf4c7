// One rank's communicator: runs collectives in their callers' threads, or in order on the process's progress thread.
#pragma once

#include <deque>
#include <memory>
#include <mutex>
#include <string>

#include "endpoint.hpp"
#include "execution.hpp"
#include "failure.hpp"
#include "mailbox.hpp"
#include "work.hpp"

namespace abccl {

using Timeout = std::chrono::nanoseconds;

// A number of seconds as people give it. Endless and not a number mean ten years: sums with it do not overflow.
inline Timeout seconds(double value) {
    constexpr double most = 10 * 365 * 86400.0;
    return Timeout(static_cast<int64_t>((value >= 0 && value < most ? value : value < 0 ? 0 : most) * 1e9));
}

class Communicator : public std::enable_shared_from_this<Communicator> {
  public:
    Communicator(uint32_t rank, Geometry geometry, std::shared_ptr<Region> own)
        : endpoint(rank, geometry, std::move(own)), mailbox(endpoint), execution_(endpoint) {}

    // Runs the plan; returns when this rank's part is done. With nothing queued it runs in the calling thread. Calls
    // `before_waiting` once it is to take longer than a microsecond or two.
    using BeforeWaiting = std::function<void()>;
    void run(
        std::shared_ptr<const Plan> plan, const void* input, void* output, Timeout timeout,
        const BeforeWaiting& before_waiting = [] {});
    // Runs the plan so many times, and after each `between`, if there is one, which works on no data. Returns the
    // seconds that all took.
    double time(const std::shared_ptr<const Plan>& plan, const void* input, void* output, uint32_t calls,
                const std::shared_ptr<const Plan>& between, Timeout timeout);
    // Queues the plan behind what is queued already. The buffers must live until the work is finished.
    std::shared_ptr<Work> start(std::shared_ptr<const Plan> plan, const void* input, void* output, Timeout timeout);

    std::shared_ptr<Work> post_send(uint32_t peer, int64_t tag, const void* data, size_t bytes, Timeout timeout);
    std::shared_ptr<Work> post_receive(int32_t source, int64_t tag, void* data, size_t bytes, Timeout timeout);
    // Progresses sends and receives in the calling thread until the work is finished.
    void wait_message(Work& work);
    // Moves sends and receives along without waiting, for callers who poll.
    void progress_messages();

    // Whether nothing is queued or pending. Cheap.
    bool idle();
    // For the progress thread: a look at everything queued, without waiting; done when nothing is left.
    Outcome progress();
    // For the progress thread, now and then: raises what is wrong, in every work that is queued.
    void tick();
    void abort(uint32_t kind, const std::string& reason);
    void close();
    bool closed() const { return closed_.load(std::memory_order_acquire); }
    // Calls `on_failure` once, from any thread and without locks held, when this rank has learnt that the group is
    // broken; at once if it has. To be called once, by who does not hold the GIL.
    void attend(std::function<void()> on_failure);
    // For who runs plans on the endpoint by himself: this has ended the present one, or all.
    void note_failure(const Failure& failure);
    void tell_failure();

    Endpoint endpoint;
    Mailbox mailbox;

  private:
    struct Task {
        std::shared_ptr<const Plan> plan;
        const void* input;
        void* output;
        Timeout timeout;
        std::shared_ptr<Work> work;
    };
    void check_usable();
    void fail_all(std::exception_ptr error);
    std::shared_ptr<Work> enqueue(std::shared_ptr<const Plan> plan, const void* input, void* output, Timeout timeout);
    void drive(const Plan& plan, const void* input, void* output, Timeout timeout, const BeforeWaiting& before_waiting);
    // Aborts the group if what was thrown is not a failure that all ranks learn of anyway: an interrupt, say. To be
    // called while handling it.
    std::exception_ptr settle(const std::string& doing);
    Outcome advance();
    void look();

    // A caller's thread may take the engine only from 0, the progress thread only when no caller has it.
    static constexpr uint32_t busy = 1, queued = 2;
    std::atomic<uint32_t> state_{0};           // `busy` while a caller runs a plan, plus `queued` for each in the queue
    std::mutex mutex_;                         // of the queue
    std::deque<std::shared_ptr<Task>> queue_;  // the front one is running once `started_`
    std::mutex engine_;                        // held by whoever runs a plan from the queue
    bool started_ = false;
    Deadline deadline_{};  // of the running plan of the queue
    std::atomic<bool> closed_{false};
    // What the action returns; what it throws is noted and told.
    template <class Action>
    auto told(Action action) -> decltype(action());
    std::function<void()> on_failure_;
    std::atomic<bool> attended_{false};
    enum class Told : uint32_t { fine, failed, told };
    std::atomic<Told> told_{Told::fine};
    Execution execution_;
};

// Moves every communicator's queued work along. One thread a process, started by the first asynchronous call.
class ProgressThread {
  public:
    static void submit(const std::shared_ptr<Communicator>& communicator);
    // In a forked child there is no thread: forget it.
    static void forget();
};

}  // namespace abccl
