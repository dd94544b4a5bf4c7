#include "shortcut.hpp"

#include <structmember.h>

#include <algorithm>

#include "dispatcher.hpp"

namespace py = pybind11;

namespace abccl {
namespace {

constexpr Py_ssize_t slot_count = 4;  // x, out, op, root

struct Shortcut {
    PyObject_HEAD vectorcallfunc vectorcall;
    PyObject* function;
    PyObject* collective;
    PyObject* defaults;
    Py_ssize_t slots[slot_count];
    Py_ssize_t most, required;  // positional arguments, without self
};

// The dispatcher of a communicator; null if it is none, or not ready.
Dispatcher* dispatcher_of(PyObject* communicator) {
    static PyObject* const name = PyUnicode_InternFromString("_dispatcher");
    static PyTypeObject* const type = reinterpret_cast<PyTypeObject*>(py::type::of<Dispatcher>().ptr());
    PyObject* found = PyObject_GetAttr(communicator, name);
    if (!found) {
        PyErr_Clear();
        return nullptr;
    }
    void* dispatcher = nullptr;
    if (Py_TYPE(found) == type)
        dispatcher = reinterpret_cast<py::detail::instance*>(found)->get_value_and_holder().value_ptr();
    Py_DECREF(found);  // the communicator keeps it
    return static_cast<Dispatcher*>(dispatcher);
}

PyObject* call(PyObject* self, PyObject* const* arguments, size_t flagged_count, PyObject* keywords) {
    const auto* shortcut = reinterpret_cast<Shortcut*>(self);
    const Py_ssize_t given = PyVectorcall_NARGS(flagged_count) - 1;
    const bool direct = !keywords && given >= shortcut->required && given <= shortcut->most;
    Dispatcher* dispatcher = direct ? dispatcher_of(arguments[0]) : nullptr;
    if (!dispatcher) return PyObject_Vectorcall(shortcut->function, arguments, flagged_count, keywords);
    PyObject* values[slot_count];
    for (Py_ssize_t i = 0; i < slot_count; ++i) {
        const Py_ssize_t slot = shortcut->slots[i];
        values[i] = slot < 0       ? Py_None
                    : slot < given ? arguments[1 + slot]
                                   : PyTuple_GET_ITEM(shortcut->defaults, slot - shortcut->required);
    }
    static PyObject* const zero = PyLong_FromLong(0);
    if (shortcut->slots[slot_count - 1] < 0) values[slot_count - 1] = zero;
    PyObject* const all[] = {shortcut->collective, values[0], values[1], values[2], values[3], Py_None, Py_False};
    return Dispatcher::guarded_call(*dispatcher, all, 7);
}

PyObject* create(PyTypeObject* type, PyObject* arguments, PyObject*) {
    PyObject *function, *collective, *defaults;
    Py_ssize_t slots[slot_count];
    if (!PyArg_ParseTuple(arguments, "OO(nnnn)O!", &function, &collective, &slots[0], &slots[1], &slots[2], &slots[3],
                          &PyTuple_Type, &defaults))
        return nullptr;
    const Py_ssize_t most = *std::max_element(slots, slots + slot_count) + 1;
    if (PyTuple_GET_SIZE(defaults) > most) {
        PyErr_SetString(PyExc_ValueError, "Shortcut: more defaults than positions");
        return nullptr;
    }
    auto* self = reinterpret_cast<Shortcut*>(type->tp_alloc(type, 0));
    if (!self) return nullptr;
    self->vectorcall = call;
    self->function = Py_NewRef(function);
    self->collective = Py_NewRef(collective);
    self->defaults = Py_NewRef(defaults);
    std::copy(slots, slots + slot_count, self->slots);
    self->most = most;
    self->required = most - PyTuple_GET_SIZE(defaults);
    return reinterpret_cast<PyObject*>(self);
}

void destroy(PyObject* self) {
    auto* shortcut = reinterpret_cast<Shortcut*>(self);
    PyTypeObject* type = Py_TYPE(self);
    Py_XDECREF(shortcut->function);
    Py_XDECREF(shortcut->collective);
    Py_XDECREF(shortcut->defaults);
    type->tp_free(self);
    Py_DECREF(type);
}

PyObject* bind(PyObject* self, PyObject* object, PyObject*) {
    return object && object != Py_None ? PyMethod_New(self, object) : Py_NewRef(self);
}

PyObject* wrapped(PyObject* self) { return Py_NewRef(reinterpret_cast<Shortcut*>(self)->function); }

// Its name, documentation and signature are the function's.
PyObject* attribute(PyObject* self, PyObject* name) {
    if (PyUnicode_CompareWithASCIIString(name, "__wrapped__") == 0) return wrapped(self);
    return PyObject_GetAttr(reinterpret_cast<Shortcut*>(self)->function, name);
}

PyObject* documentation(PyObject* self, void*) {
    return PyObject_GetAttrString(reinterpret_cast<Shortcut*>(self)->function, "__doc__");
}

// help() looks for the documentation past `attribute`.
PyGetSetDef computed[] = {{"__doc__", documentation, nullptr, nullptr, nullptr}, {}};

PyMemberDef members[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(Shortcut, vectorcall), READONLY, nullptr},
    {nullptr, 0, 0, 0, nullptr},
};

template <class Function>
void* pointer(Function* function) {
    return reinterpret_cast<void*>(function);
}

PyType_Slot type_slots[] = {
    {Py_tp_new, pointer(create)},
    {Py_tp_dealloc, pointer(destroy)},
    {Py_tp_call, pointer(PyVectorcall_Call)},
    {Py_tp_members, members},
    {Py_tp_descr_get, pointer(bind)},
    {Py_tp_getattro, pointer(attribute)},
    {Py_tp_getset, computed},
    {0, nullptr},
};

PyType_Spec spec = {"abccl.transports._native.Shortcut", sizeof(Shortcut), 0,
                    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_METHOD_DESCRIPTOR, type_slots};

}  // namespace

void add_shortcut(py::module_& module) {
    module.attr("Shortcut") = py::reinterpret_steal<py::object>(PyType_FromSpec(&spec));
}

}  // namespace abccl
