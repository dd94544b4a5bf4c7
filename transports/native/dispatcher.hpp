// The warm path of every call: from Python arguments to a bound plan by one lookup, and into the engine.
#pragma once

#include <pybind11/pybind11.h>

#include <chrono>
#include <memory>
#include <unordered_map>
#include <vector>

#include "arrays.hpp"
#include "communicator.hpp"

namespace abccl {

// A handle on an asynchronous operation, as Python sees it. Keeps its buffers alive.
struct PendingWork {
    std::shared_ptr<Work> work;
    pybind11::object buffers;
    std::shared_ptr<Communicator> communicator;
    uint64_t generation;  // of the process that it belongs to
};

// Calls `bind(collective, x, out, op, root, algorithm)` when it sees arguments for the first time. What bind returns
// is kept and run for all later calls that look the same: a Plan in the native engine; anything else by
// `execute(bound, x, out, x address, out address, asynchronous)`. Bind refuses bad arguments by raising.
class Dispatcher {
  public:
    Dispatcher(std::shared_ptr<Communicator> communicator, pybind11::object bind, pybind11::object execute,
               double timeout);

    ~Dispatcher();
    Dispatcher(const Dispatcher&) = delete;
    Dispatcher& operator=(const Dispatcher&) = delete;

    // (collective, x, out, op, root, algorithm, asynchronous) -> None or a work
    PyObject* call(PyObject* const* arguments, Py_ssize_t count);
    // The same; raises C++'s exceptions as Python's.
    static PyObject* guarded_call(Dispatcher& dispatcher, PyObject* const* arguments, Py_ssize_t count);
    // The same as a Python function that takes its arguments by position at C's price.
    pybind11::object function(pybind11::object self);

    // Runs the plan in the calling thread, without the GIL.
    void run(std::shared_ptr<const Plan> plan, const void* input, void* output);
    // Queues the plan; the buffers stay alive until it is finished.
    std::shared_ptr<PendingWork> start(std::shared_ptr<const Plan> plan, const void* input, void* output,
                                       pybind11::object buffers);

    void set_timeout(double seconds) { timeout_ = abccl::seconds(seconds); }
    // From now on every call of a native plan is told: `observer(text)` before it starts; what that returned is called
    // with the work after it has started, with None after it has run, or with False after it failed. None ends it.
    void set_observer(pybind11::object observer) { observer_ = std::move(observer); }
    // Binds everything anew from now on: an algorithm has changed.
    void forget();

  private:
    struct Key {
        int64_t collective_root, x_count, out_count;
        PyObject *x_dtype, *out_dtype, *op, *algorithm;
        int64_t alias;  // how the two buffers overlap
        bool operator==(const Key& other) const;
    };
    struct Hash {
        size_t operator()(const Key& key) const;
    };
    struct Bound {
        std::shared_ptr<const Plan> plan;  // or:
        pybind11::object other;
        std::vector<pybind11::object> names;  // what the key's pointers point to stays alive
    };

    pybind11::object miss(PyObject* const* arguments);
    PyObject* run(const Bound& bound, PyObject* const* arguments, const Array& x, const Array& out, bool asynchronous);
    PyObject* run_observed(const Bound& bound, PyObject* const* arguments, const Array& x, const Array& out,
                           bool asynchronous);
    void check_generation() const;
    void let_go();

    std::shared_ptr<Communicator> communicator_;
    pybind11::object bind_, execute_, observer_ = pybind11::none();
    Timeout timeout_;
    std::unordered_map<Key, Bound, Hash> bound_;
    std::vector<std::shared_ptr<PendingWork>> pending_;  // buffers of what is under way
    uint64_t generation_;
};

// Grows in a forked child: what belongs to another generation must not be used.
uint64_t fork_generation();

}  // namespace abccl
