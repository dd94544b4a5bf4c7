#include "dispatcher.hpp"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <optional>

#include "failure.hpp"
#include "gil.hpp"

namespace py = pybind11;

namespace abccl {
namespace {

constexpr size_t most_bound = 4096;

std::atomic<uint64_t> generation{0};

void in_child() {
    generation.fetch_add(1);
    ProgressThread::forget();
}

// 0: apart; 1: the same start; 2: one lies inside the other, at `offset` bytes; -1: they overlap otherwise.
int64_t overlap(const Array& x, const Array& out) {
    const auto* x_end = x.data + x.count * static_cast<int64_t>(x.itemsize);
    const auto* out_end = out.data + out.count * static_cast<int64_t>(out.itemsize);
    if (x.count <= 0 || out.count <= 0 || x_end <= out.data || out_end <= x.data) return 0;
    if (x.data == out.data) return 1;
    if (x.data > out.data && x_end <= out_end) return 2 + (x.data - out.data);
    if (out.data > x.data && out_end <= x_end) return -2 - (out.data - x.data);
    return -1;
}

// The caller gets the result of his call, whatever the observer makes of it.
void tell(const py::object& observer, const py::object& how) {
    try {
        observer(how);
    } catch (py::error_already_set& error) {
        error.discard_as_unraisable("abccl: an observer");
    }
}

}  // namespace

uint64_t fork_generation() {
    static const bool registered = pthread_atfork(nullptr, nullptr, in_child) == 0;
    (void)registered;
    return generation.load(std::memory_order_relaxed);
}

bool Dispatcher::Key::operator==(const Key& o) const {
    return collective_root == o.collective_root && x_count == o.x_count && out_count == o.out_count &&
           x_dtype == o.x_dtype && out_dtype == o.out_dtype && op == o.op && algorithm == o.algorithm &&
           alias == o.alias;
}

size_t Dispatcher::Hash::operator()(const Key& key) const {
    uint64_t hash = static_cast<uint64_t>(key.collective_root);
    for (uint64_t word : {static_cast<uint64_t>(key.x_count), static_cast<uint64_t>(key.out_count),
                          reinterpret_cast<uint64_t>(key.x_dtype), reinterpret_cast<uint64_t>(key.out_dtype),
                          reinterpret_cast<uint64_t>(key.op), reinterpret_cast<uint64_t>(key.algorithm),
                          static_cast<uint64_t>(key.alias)})
        hash = (hash ^ word) * 0x9E3779B97F4A7C15ull;
    return hash ^ hash >> 32;
}

Dispatcher::Dispatcher(std::shared_ptr<Communicator> communicator, py::object bind, py::object execute, double timeout)
    : communicator_(std::move(communicator)),
      bind_(std::move(bind)),
      execute_(std::move(execute)),
      generation_(fork_generation()) {
    set_timeout(timeout);
}

void Dispatcher::check_generation() const {
    if (generation_ != fork_generation())
        throw Failure(Kind::closed,
                      "this communicator belongs to the parent of this process, which was forked: make one in the "
                      "child with abccl.init(), or start ranks with abccl.spawn()");
}

PyObject* Dispatcher::call(PyObject* const* arguments, Py_ssize_t count) {
    if (count != 7) throw py::type_error("call(collective, x, out, op, root, algorithm, asynchronous)");
    check_generation();
    PyObject *x_object = arguments[1], *out_object = arguments[2];
    const bool asynchronous = PyObject_IsTrue(arguments[6]) == 1;
    Array x, out;
    // Both are looked at whatever the other is: a collective may ignore one of them on this rank.
    bool warm = describe(x_object, x) && (x_object == Py_None || x.plain);
    const bool out_warm =
        out_object == x_object ? (out = x, warm) : describe(out_object, out) && (out_object == Py_None || out.plain);
    warm = warm && out_warm && (out_object == Py_None || out.writable);
    const int64_t alias = warm ? overlap(x, out) : -1;
    const int64_t root = PyLong_Check(arguments[4]) ? PyLong_AsLongLong(arguments[4]) : -1;
    if (PyErr_Occurred()) PyErr_Clear();
    // Arguments that are not plain, and partial overlaps, are for `bind` to judge, each time.
    if (!warm || alias == -1 || root < 0 || root > INT32_MAX) {
        py::object bound = miss(arguments);
        Bound once{nullptr, bound, {}};
        if (py::isinstance<Plan>(bound)) once.plan = bound.cast<std::shared_ptr<Plan>>();
        return run_observed(once, arguments, x, out, asynchronous);
    }
    const Key key{PyLong_AsLong(arguments[0]) << 32 | root,
                  x.count,
                  out.count,
                  x.dtype,
                  out.dtype,
                  arguments[3],
                  arguments[5],
                  alias};
    auto found = bound_.find(key);
    if (found == bound_.end()) {
        py::object bound = miss(arguments);
        if (bound_.size() >= most_bound) bound_.clear();
        Bound kept{nullptr, bound, {}};
        for (PyObject* name : {x.dtype, out.dtype, arguments[3], arguments[5]})
            if (name) kept.names.push_back(py::reinterpret_borrow<py::object>(name));
        if (py::isinstance<Plan>(bound)) kept.plan = bound.cast<std::shared_ptr<Plan>>();
        found = bound_.emplace(key, std::move(kept)).first;
    }
    return run_observed(found->second, arguments, x, out, asynchronous);
}

py::object Dispatcher::miss(PyObject* const* arguments) {
    return bind_(py::handle(arguments[0]), py::handle(arguments[1]), py::handle(arguments[2]), py::handle(arguments[3]),
                 py::handle(arguments[4]), py::handle(arguments[5]));
}

PyObject* Dispatcher::run_observed(const Bound& bound, PyObject* const* arguments, const Array& x, const Array& out,
                                   bool asynchronous) {
    if (observer_.is_none() || !bound.plan) return run(bound, arguments, x, out, asynchronous);
    const Bound kept = bound;  // the observer may call, and what is bound may change
    py::object ended = observer_(kept.plan->parameters.text);
    py::object result;
    try {
        result = py::reinterpret_steal<py::object>(run(kept, arguments, x, out, asynchronous));
    } catch (...) {
        tell(ended, py::bool_(false));  // what the call failed with is what counts
        throw;
    }
    tell(ended, result);
    return result.release().ptr();
}

PyObject* Dispatcher::run(const Bound& bound, PyObject* const* arguments, const Array& x, const Array& out,
                          bool asynchronous) {
    if (!bound.plan) {
        const auto address = [](const Array& array) { return reinterpret_cast<uintptr_t>(array.data); };
        return execute_(bound.other, py::handle(arguments[1]), py::handle(arguments[2]), address(x), address(out),
                        asynchronous)
            .release()
            .ptr();
    }
    if (asynchronous) {
        py::object buffers = py::make_tuple(py::handle(arguments[1]), py::handle(arguments[2]));
        auto work = start(bound.plan, x.data, const_cast<uint8_t*>(out.data), std::move(buffers));
        return py::cast(std::move(work)).release().ptr();
    }
    run(bound.plan, x.data, const_cast<uint8_t*>(out.data));
    Py_RETURN_NONE;
}

void Dispatcher::run(std::shared_ptr<const Plan> plan, const void* input, void* output) {
    check_generation();
    std::optional<WithoutGil> released;
    communicator_->run(std::move(plan), input, output, timeout_, [&released] { released.emplace(); });
}

std::shared_ptr<PendingWork> Dispatcher::start(std::shared_ptr<const Plan> plan, const void* input, void* output,
                                               py::object buffers) {
    check_generation();
    auto work = std::make_shared<PendingWork>();
    work->buffers = std::move(buffers);
    work->communicator = communicator_;
    work->generation = generation_;
    work->work = communicator_->start(std::move(plan), input, output, timeout_);
    let_go();
    pending_.push_back(work);
    return work;
}

void Dispatcher::forget() { bound_.clear(); }

Dispatcher::~Dispatcher() {
    // Buffers must not go before the engine has let go of them.
    if (communicator_ && generation_ == fork_generation()) communicator_->close();
}

// Lets go of the buffers of what has finished.
void Dispatcher::let_go() {
    pending_.erase(std::remove_if(pending_.begin(), pending_.end(),
                                  [](const std::shared_ptr<PendingWork>& work) {
                                      if (!work->work->finished()) return false;
                                      work->buffers = py::none();
                                      return true;
                                  }),
                   pending_.end());
}

PyObject* Dispatcher::guarded_call(Dispatcher& dispatcher, PyObject* const* arguments, Py_ssize_t count) {
    try {
        return dispatcher.call(arguments, count);
    } catch (py::error_already_set& error) {
        error.restore();
    } catch (const std::exception&) {
        // Raised through pybind11's translators, which know the error tree.
        py::detail::try_translate_exceptions();
    }
    return nullptr;
}

namespace {

PyObject* call_dispatcher(PyObject* capsule, PyObject* const* arguments, Py_ssize_t count) {
    auto* dispatcher = static_cast<Dispatcher*>(PyCapsule_GetPointer(capsule, "abccl.dispatcher"));
    return dispatcher ? Dispatcher::guarded_call(*dispatcher, arguments, count) : nullptr;
}

PyMethodDef definition = {"call", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call_dispatcher)),
                          METH_FASTCALL, "call(collective, x, out, op, root, algorithm, asynchronous)"};

}  // namespace

py::object Dispatcher::function(py::object self) {
    // The capsule keeps the dispatcher alive.
    self.inc_ref();
    py::capsule capsule(this, "abccl.dispatcher", [](PyObject* object) {
        auto* owner = static_cast<PyObject*>(PyCapsule_GetContext(object));
        Py_XDECREF(owner);
    });
    PyCapsule_SetContext(capsule.ptr(), self.ptr());
    PyObject* function = PyCFunction_New(&definition, capsule.ptr());
    if (!function) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(function);
}

}  // namespace abccl
