#include "persistent.hpp"

#include "failure.hpp"

namespace py = pybind11;

namespace abccl {

void Persistent::check_idle() {
    if (started_ && !started_->work->finished())
        throw Failure(Kind::argument, plan_->parameters.text + " is under way: wait() for it before it starts again");
}

void Persistent::run() {
    check_idle();
    dispatcher_->run(plan_, input_, output_);
}

void Persistent::start() {
    check_idle();
    started_ = dispatcher_->start(plan_, input_, output_, buffers_);
}

std::shared_ptr<PendingWork> Persistent::started() const {
    if (!started_) throw Failure(Kind::argument, plan_->parameters.text + " has not been started: call start() first");
    return started_;
}

namespace {

PyObject* call(PyObject* self, PyObject* arguments, PyObject* keywords) {
    if (PyTuple_GET_SIZE(arguments) != 0 || keywords) {
        PyErr_SetString(PyExc_TypeError, "a persistent collective is called without arguments: they were given once");
        return nullptr;
    }
    try {
        // What pybind11's cast does, without looking for derived types: the type can not be derived from.
        auto* instance = reinterpret_cast<py::detail::instance*>(self);
        auto* persistent = static_cast<Persistent*>(instance->simple_value_holder[0]);
        if (!persistent) throw Failure(Kind::argument, "a persistent collective is made by comm.all_reduce_init(...)");
        persistent->run();
        Py_RETURN_NONE;
    } catch (py::error_already_set& error) {
        error.restore();
    } catch (const std::exception&) {
        py::detail::try_translate_exceptions();
    }
    return nullptr;
}

}  // namespace

void Persistent::make_callable(PyHeapTypeObject* type) { type->ht_type.tp_call = call; }

}  // namespace abccl
