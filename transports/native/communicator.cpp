#include "communicator.hpp"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <thread>
#include <utility>
#include <vector>

#include "failure.hpp"

namespace abccl {

namespace {

// A run of so few bytes is looked at so often, a microsecond or two, before it counts as one that waits.
constexpr size_t short_bytes = 4096;
constexpr int short_spins = 50;

}  // namespace

void Communicator::check_usable() {
    if (closed()) throw Failure(Kind::closed, "the communicator is closed: make another with abccl.init()");
    try {
        endpoint.check_abort();
    } catch (const Failure& failure) {
        note_failure(failure);
        tell_failure();
        throw Failure(failure.kind, std::string(failure.what()) +
                                        " (since then the communicator is broken: close it and make another)");
    }
}

void Communicator::run(std::shared_ptr<const Plan> plan, const void* input, void* output, Timeout timeout,
                       const BeforeWaiting& before_waiting) {
    check_usable();
    uint32_t idle = 0;
    if (!state_.compare_exchange_strong(idle, busy, std::memory_order_acquire)) {
        before_waiting();
        const std::shared_ptr<Work> work = enqueue(plan, input, output, timeout);
        ProgressThread::submit(shared_from_this());
        try {
            work->wait(Deadline::max());
        } catch (...) {
            settle(plan->parameters.text);
            work->wait(Deadline::max(), false);  // the engine lets go of the buffers
            throw;
        }
        work->check();
        return;
    }
    struct Release {
        Communicator& communicator;
        ~Release() {
            if (communicator.state_.fetch_sub(busy) != busy) communicator.endpoint.ring_self();
        }
    } release{*this};
    drive(*plan, input, output, timeout, before_waiting);
}

double Communicator::time(const std::shared_ptr<const Plan>& plan, const void* input, void* output, uint32_t calls,
                          const std::shared_ptr<const Plan>& between, Timeout timeout) {
    const auto start = Clock::now();
    for (uint32_t call = 0; call < calls; ++call) {
        run(plan, input, output, timeout);
        if (between) run(between, nullptr, nullptr, timeout);
    }
    return std::chrono::duration<double>(Clock::now() - start).count();
}

void Communicator::drive(const Plan& plan, const void* input, void* output, Timeout timeout,
                         const BeforeWaiting& before_waiting) {
    const uint64_t before = endpoint.sequence();
    try {
        execution_.start(plan, input, output);
        const size_t bytes = plan.longest_message * static_cast<size_t>(plan.parameters.segments);
        const int spins = bytes <= short_bytes ? std::min(short_spins, endpoint.patience().spins) : 0;
        for (int spin = 0; spin < spins; ++spin) {
            if (execution_.progress() == Outcome::done) return;
            cpu_relax();
        }
        before_waiting();
        const Deadline deadline = Clock::now() + timeout;
        auto tick = [&] {
            Endpoint::on_tick();
            execution_.publish_wait();
            endpoint.check_collective();
            if (Clock::now() > deadline || faults::is_late()) {
                execution_.publish_wait(true);
                endpoint.fail(static_cast<uint32_t>(Kind::deadline), execution_.blame());
            }
        };
        endpoint.wait([this] { return execution_.progress(); }, tick, endpoint.patience());
    } catch (...) {
        settle(plan.parameters.text);
        if (endpoint.sequence() != before) endpoint.finish(false);
        tell_failure();
        throw;
    }
}

void Communicator::note_failure(const Failure& failure) {
    if (failure.kind == Kind::closed || failure.kind == Kind::argument) return;
    endpoint.recorder().fail(std::string(kind_name(failure.kind)) + ": " + failure.what());
    Told fine = Told::fine;
    told_.compare_exchange_strong(fine, Told::failed);
}

void Communicator::tell_failure() {
    Told failed = Told::failed;
    if (attended_.load(std::memory_order_acquire) && told_.compare_exchange_strong(failed, Told::told)) on_failure_();
}

void Communicator::attend(std::function<void()> on_failure) {
    on_failure_ = std::move(on_failure);
    attended_.store(true, std::memory_order_release);
    tell_failure();
}

template <class Action>
auto Communicator::told(Action action) -> decltype(action()) {
    try {
        return action();
    } catch (const Failure& failure) {
        note_failure(failure);
        tell_failure();
        throw;
    }
}

std::exception_ptr Communicator::settle(const std::string& doing) {
    try {
        throw;
    } catch (const Failure& failure) {
        note_failure(failure);
        return std::current_exception();
    } catch (...) {
        const Failure failure(Kind::aborted, endpoint.name(endpoint.rank()) + " was interrupted in " + doing);
        endpoint.abort(static_cast<uint32_t>(failure.kind), failure.what());
        note_failure(failure);
        return std::make_exception_ptr(failure);
    }
}

std::shared_ptr<Work> Communicator::enqueue(std::shared_ptr<const Plan> plan, const void* input, void* output,
                                            Timeout timeout) {
    auto work = std::make_shared<Work>();
    check_usable();
    std::lock_guard<std::mutex> lock(mutex_);
    state_.fetch_add(queued);
    queue_.push_back(std::make_shared<Task>(Task{std::move(plan), input, output, timeout, work}));
    return work;
}

std::shared_ptr<Work> Communicator::start(std::shared_ptr<const Plan> plan, const void* input, void* output,
                                          Timeout timeout) {
    std::shared_ptr<Work> work = enqueue(std::move(plan), input, output, timeout);
    ProgressThread::submit(shared_from_this());
    return work;
}

std::shared_ptr<Work> Communicator::post_send(uint32_t peer, int64_t tag, const void* data, size_t bytes,
                                              Timeout timeout) {
    check_usable();
    return told([&] {
        auto work = mailbox.post_send(peer, tag, data, bytes, Clock::now() + timeout);
        mailbox.progress();
        return work;
    });
}

std::shared_ptr<Work> Communicator::post_receive(int32_t source, int64_t tag, void* data, size_t bytes,
                                                 Timeout timeout) {
    check_usable();
    return told([&] {
        auto work = mailbox.post_receive(source, tag, data, bytes, Clock::now() + timeout);
        mailbox.progress();
        return work;
    });
}

void Communicator::progress_messages() {
    check_usable();
    told([&] {
        if (mailbox.progress() == Outcome::blocked) mailbox.check();
    });
}

void Communicator::wait_message(Work& work) {
    auto step = [&] {
        if (work.finished()) return Outcome::done;
        const Outcome outcome = mailbox.progress();
        return work.finished() ? Outcome::done : outcome == Outcome::moved ? Outcome::moved : Outcome::blocked;
    };
    auto tick = [&] {
        Endpoint::on_tick();
        mailbox.check();
    };
    try {
        endpoint.wait(step, tick, endpoint.patience());
    } catch (...) {
        mailbox.fail(settle("a send or recv"));
        tell_failure();
        throw;
    }
    work.check();
}

bool Communicator::idle() {
    std::lock_guard<std::mutex> lock(mutex_);
    return queue_.empty() && mailbox.idle();
}

Outcome Communicator::progress() {
    const Outcome outcome = advance();
    tell_failure();
    return outcome;
}

Outcome Communicator::advance() {
    std::lock_guard<std::mutex> engine(engine_);
    bool moved = false;
    try {
        std::shared_ptr<Task> task;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            if (!(state_.load(std::memory_order_acquire) & busy) && !queue_.empty()) task = queue_.front();
        }
        if (task) {
            endpoint.check_abort();
            if (!started_) {
                execution_.start(*task->plan, task->input, task->output);
                task->work->started = Clock::now();
                deadline_ = task->work->started + task->timeout;
                started_ = true;
            }
            const Outcome outcome = execution_.progress();
            moved = outcome != Outcome::blocked;
            if (outcome == Outcome::done) {
                started_ = false;
                {
                    std::lock_guard<std::mutex> lock(mutex_);
                    queue_.pop_front();
                    state_.fetch_sub(queued);
                }
                task->work->succeed();
            }
        }
        const Outcome messages = mailbox.progress();
        moved |= messages == Outcome::moved;
        std::lock_guard<std::mutex> lock(mutex_);
        if (moved) return Outcome::moved;
        return queue_.empty() && messages == Outcome::done ? Outcome::done : Outcome::blocked;
    } catch (...) {
        fail_all(settle("its progress thread"));
        return Outcome::done;
    }
}

void Communicator::tick() {
    look();
    tell_failure();
}

void Communicator::look() {
    std::lock_guard<std::mutex> engine(engine_);
    try {
        endpoint.check_abort();
        mailbox.check();
        if (started_) {
            execution_.publish_wait();
            endpoint.check_collective();
            if (Clock::now() > deadline_ || faults::is_late()) {
                execution_.publish_wait(true);
                endpoint.fail(static_cast<uint32_t>(Kind::deadline), execution_.blame());
            }
        }
    } catch (...) {
        fail_all(settle("its progress thread"));
    }
}

void Communicator::fail_all(std::exception_ptr error) {
    std::deque<std::shared_ptr<Task>> tasks;
    {
        std::lock_guard<std::mutex> lock(mutex_);
        tasks.swap(queue_);
        state_.fetch_sub(queued * static_cast<uint32_t>(tasks.size()));
    }
    if (std::exchange(started_, false)) endpoint.finish(false);
    for (auto& task : tasks) task->work->fail(error);
    mailbox.fail(error);
}

void Communicator::abort(uint32_t kind, const std::string& reason) {
    endpoint.abort(kind, reason);
    try {
        endpoint.check_abort();  // the first abort's words; of a closed one none
    } catch (const Failure& failure) {
        note_failure(failure);
    }
    tell_failure();
}

void Communicator::close() {
    if (closed_.exchange(true)) return;
    endpoint.close();
    std::lock_guard<std::mutex> engine(engine_);
    fail_all(
        std::make_exception_ptr(Failure(Kind::closed, "the communicator was closed while this operation was pending")));
}

namespace {

struct Queue {
    std::mutex mutex;
    std::condition_variable submitted;
    std::vector<std::shared_ptr<Communicator>> active;
    std::atomic<uint64_t> submissions{0};
    bool running = false;
};

// Never destroyed: the thread may outlive static destruction.
Queue*& queue() {
    static Queue* instance = new Queue();
    return instance;
}

void progress_forever(Queue& q) {
    std::vector<std::shared_ptr<Communicator>> active, finished;
    int idle = 0;
    for (;;) {
        uint64_t seen;
        {
            std::unique_lock<std::mutex> lock(q.mutex);
            for (auto& done : finished) {
                // Work may have been submitted since it was found done.
                if (done->closed() || done->idle())
                    q.active.erase(std::remove(q.active.begin(), q.active.end(), done), q.active.end());
            }
        }
        // Not under the lock: the last owner's destructor takes the GIL, and who has that may want the lock.
        finished.clear();
        active.clear();
        {
            std::unique_lock<std::mutex> lock(q.mutex);
            q.submitted.wait(lock, [&] { return !q.active.empty(); });
            active = q.active;
            seen = q.submissions.load(std::memory_order_relaxed);
        }
        bool moved = false;
        for (auto& communicator : active) {
            const Outcome outcome = communicator->closed() ? Outcome::done : communicator->progress();
            moved |= outcome == Outcome::moved;
            if (outcome == Outcome::done) finished.push_back(communicator);
        }
        if (moved || !finished.empty()) {
            idle = 0;
            continue;
        }
        const Patience patience = Endpoint::short_patience();
        if (++idle < patience.spins + patience.yields) {
            sched_yield();
            continue;
        }
        if (active.size() == 1) {
            Endpoint::Sleeper sleeper(active[0]->endpoint);
            const bool nothing_new = q.submissions.load(std::memory_order_seq_cst) == seen;
            if (nothing_new && active[0]->progress() == Outcome::blocked) sleeper.sleep(20);
        } else {
            // Nobody can sleep on several doorbells: ever longer naps, and a short one after all that moved.
            usleep(std::min(100u << std::min(idle / 256, 5), 2000u));
        }
        if (idle % 16 == 0 || active.size() == 1)
            for (auto& communicator : active) communicator->tick();
    }
}

}  // namespace

void ProgressThread::submit(const std::shared_ptr<Communicator>& communicator) {
    Queue& q = *queue();
    std::lock_guard<std::mutex> lock(q.mutex);
    if (!q.running) {
        std::thread([&q] { progress_forever(q); }).detach();
        q.running = true;
    }
    if (std::find(q.active.begin(), q.active.end(), communicator) == q.active.end()) q.active.push_back(communicator);
    q.submissions.fetch_add(1, std::memory_order_seq_cst);
    for (auto& active : q.active) active->endpoint.ring_self();
    q.submitted.notify_one();
}

void ProgressThread::forget() { queue() = new Queue(); }

}  // namespace abccl
