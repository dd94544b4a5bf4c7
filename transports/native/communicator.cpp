#include "communicator.hpp"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <thread>
#include <vector>

#include "failure.hpp"

namespace abccl {

void Communicator::check_usable() const {
    if (closed()) throw Failure(Kind::closed, "the communicator is closed: make another with abccl.init()");
    try {
        endpoint.check_abort();
    } catch (const Failure& failure) {
        throw Failure(failure.kind, std::string(failure.what()) +
                                        " (since then the communicator is broken: close it and make another)");
    }
}

void Communicator::run(std::shared_ptr<const Plan> plan, const void* input, void* output, Timeout timeout) {
    std::shared_ptr<Work> queued;
    {
        std::lock_guard<std::mutex> lock(mutex_);
        check_usable();
        if (busy_ || !queue_.empty())
            queued = enqueue(plan, input, output, timeout);
        else
            busy_ = true;
    }
    if (queued) {
        ProgressThread::submit(shared_from_this());
        queued->wait(Deadline::max());
        queued->check();
        return;
    }
    struct Release {
        Communicator& communicator;
        ~Release() {
            std::lock_guard<std::mutex> lock(communicator.mutex_);
            communicator.busy_ = false;
        }
    } release{*this};
    drive(*plan, input, output, timeout);
}

void Communicator::drive(const Plan& plan, const void* input, void* output, Timeout timeout) {
    try {
        execution_.start(plan, input, output);
        if (execution_.progress() == Outcome::done) return;
        const Deadline deadline = Clock::now() + timeout;
        auto tick = [&] {
            Endpoint::on_tick();
            endpoint.check_collective();
            if (Clock::now() > deadline) endpoint.fail(static_cast<uint32_t>(Kind::deadline), execution_.blame());
        };
        endpoint.wait([this] { return execution_.progress(); }, tick, endpoint.patience());
    } catch (const Failure&) {
        throw;
    } catch (...) {
        endpoint.abort(static_cast<uint32_t>(Kind::aborted),
                       "rank " + std::to_string(endpoint.rank()) + " was interrupted in " + plan.parameters.text);
        throw;
    }
}

std::shared_ptr<Work> Communicator::enqueue(std::shared_ptr<const Plan> plan, const void* input, void* output,
                                            Timeout timeout) {
    auto work = std::make_shared<Work>();
    queue_.push_back(std::make_shared<Task>(Task{std::move(plan), input, output, Clock::now() + timeout, work}));
    return work;
}

std::shared_ptr<Work> Communicator::start(std::shared_ptr<const Plan> plan, const void* input, void* output,
                                          Timeout timeout) {
    std::shared_ptr<Work> work;
    {
        std::lock_guard<std::mutex> lock(mutex_);
        check_usable();
        work = enqueue(std::move(plan), input, output, timeout);
    }
    ProgressThread::submit(shared_from_this());
    return work;
}

std::shared_ptr<Work> Communicator::post_send(uint32_t peer, int64_t tag, const void* data, size_t bytes,
                                              Timeout timeout) {
    check_usable();
    auto work = mailbox.post_send(peer, tag, data, bytes);
    messages_deadline_.store((Clock::now() + timeout).time_since_epoch().count(), std::memory_order_relaxed);
    mailbox.progress();
    return work;
}

std::shared_ptr<Work> Communicator::post_receive(int32_t source, int64_t tag, void* data, size_t bytes,
                                                 Timeout timeout) {
    check_usable();
    auto work = mailbox.post_receive(source, tag, data, bytes);
    messages_deadline_.store((Clock::now() + timeout).time_since_epoch().count(), std::memory_order_relaxed);
    mailbox.progress();
    return work;
}

void Communicator::progress_messages() {
    check_usable();
    if (mailbox.progress() == Outcome::blocked) mailbox.check();
}

void Communicator::wait_message(Work& work, Timeout timeout) {
    auto step = [&] {
        if (work.finished()) return Outcome::done;
        const Outcome outcome = mailbox.progress();
        return work.finished() ? Outcome::done : outcome == Outcome::moved ? Outcome::moved : Outcome::blocked;
    };
    const Deadline deadline = Clock::now() + timeout;
    auto tick = [&] {
        Endpoint::on_tick();
        mailbox.check();
        if (Clock::now() > deadline) endpoint.fail(static_cast<uint32_t>(Kind::deadline), mailbox.blame());
    };
    try {
        endpoint.wait(step, tick, endpoint.patience());
    } catch (...) {
        endpoint.abort(static_cast<uint32_t>(Kind::aborted),
                       "rank " + std::to_string(endpoint.rank()) + " was interrupted in a send or recv");
        mailbox.fail(std::current_exception());
        throw;
    }
    work.check();
}

Outcome Communicator::progress() {
    std::lock_guard<std::mutex> engine(engine_);
    bool moved = false;
    try {
        std::shared_ptr<Task> task;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            if (!busy_ && !queue_.empty()) task = queue_.front();
        }
        if (task) {
            endpoint.check_abort();
            if (!started_) execution_.start(*task->plan, task->input, task->output);
            started_ = true;
            const Outcome outcome = execution_.progress();
            moved = outcome != Outcome::blocked;
            if (outcome == Outcome::done) {
                started_ = false;
                {
                    std::lock_guard<std::mutex> lock(mutex_);
                    queue_.pop_front();
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
        fail_all(std::current_exception());
        return Outcome::done;
    }
}

void Communicator::tick() {
    std::lock_guard<std::mutex> engine(engine_);
    try {
        endpoint.check_abort();
        mailbox.check();
        const Clock::time_point now = Clock::now();
        if (started_) {
            endpoint.check_collective();
            if (now > queue_.front()->deadline)
                endpoint.fail(static_cast<uint32_t>(Kind::deadline), execution_.blame());
        } else if (now.time_since_epoch().count() > messages_deadline_.load(std::memory_order_relaxed) &&
                   mailbox.progress() == Outcome::blocked) {
            std::unique_lock<std::mutex> lock(mutex_);
            const bool idle = queue_.empty();
            lock.unlock();
            if (idle) endpoint.fail(static_cast<uint32_t>(Kind::deadline), mailbox.blame());
        }
    } catch (...) {
        fail_all(std::current_exception());
    }
}

void Communicator::fail_all(std::exception_ptr error) {
    std::deque<std::shared_ptr<Task>> tasks;
    {
        std::lock_guard<std::mutex> lock(mutex_);
        tasks.swap(queue_);
    }
    started_ = false;
    for (auto& task : tasks) task->work->fail(error);
    mailbox.fail(error);
}

void Communicator::abort(uint32_t kind, const std::string& reason) { endpoint.abort(kind, reason); }

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
        {
            std::unique_lock<std::mutex> lock(q.mutex);
            for (auto& done : finished) {
                // Work may have been submitted since it was found done: it is looked at again below.
                if (done->closed() || done->progress() == Outcome::done)
                    q.active.erase(std::remove(q.active.begin(), q.active.end(), done), q.active.end());
            }
            finished.clear();
            active.clear();
            q.submitted.wait(lock, [&] { return !q.active.empty(); });
            active = q.active;
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
            if (active[0]->progress() == Outcome::blocked) sleeper.sleep(20);
        } else {
            usleep(100);
        }
        if (idle % 16 == 0 || active.size() == 1)
            for (auto& communicator : active) communicator->tick();
    }
}

}  // namespace

void ProgressThread::submit(const std::shared_ptr<Communicator>& communicator) {
    Queue& q = *queue();
    std::lock_guard<std::mutex> lock(q.mutex);
    if (std::find(q.active.begin(), q.active.end(), communicator) == q.active.end()) {
        for (auto& other : q.active) other->endpoint.ring_self();
        q.active.push_back(communicator);
    }
    communicator->endpoint.ring_self();
    if (!q.running) {
        q.running = true;
        std::thread([&q] { progress_forever(q); }).detach();
    }
    q.submitted.notify_one();
}

void ProgressThread::forget() { queue() = new Queue(); }

}  // namespace abccl
