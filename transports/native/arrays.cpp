#include "arrays.hpp"

namespace py = pybind11;

namespace abccl {
namespace {

// Interned attribute names and torch's tensor type, found once.
struct Names {
    PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
    PyObject* numel = PyUnicode_InternFromString("numel");
    PyObject* dtype = PyUnicode_InternFromString("dtype");
    PyObject* is_contiguous = PyUnicode_InternFromString("is_contiguous");
    PyObject* is_cpu = PyUnicode_InternFromString("is_cpu");
    PyObject* itemsize = PyUnicode_InternFromString("itemsize");
    PyObject* is_complex = PyUnicode_InternFromString("is_complex");
    PyObject* is_conj = PyUnicode_InternFromString("is_conj");
    PyObject* is_neg = PyUnicode_InternFromString("is_neg");
    PyTypeObject* tensor = nullptr;
};

Names& names() {
    static auto* instance = new Names();
    return *instance;
}

PyTypeObject* tensor_type() {
    Names& n = names();
    if (!n.tensor) {
        PyObject* torch = PyDict_GetItemString(PyImport_GetModuleDict(), "torch");
        PyObject* type = torch ? PyObject_GetAttrString(torch, "Tensor") : nullptr;
        if (!type) PyErr_Clear();
        n.tensor = reinterpret_cast<PyTypeObject*>(type);
    }
    return n.tensor;
}

// The integer or truth value of a method's result or an attribute; -1 after an error, which is cleared.
int64_t number(PyObject* object) {
    if (!object) {
        PyErr_Clear();
        return -1;
    }
    const int64_t value = PyLong_AsLongLong(object);
    Py_DECREF(object);
    if (value == -1 && PyErr_Occurred()) PyErr_Clear();
    return value;
}

bool describe_tensor(PyObject* object, Array& array) {
    Names& n = names();
    if (number(PyObject_GetAttr(object, n.is_cpu)) != 1) return false;
    PyObject* address = PyObject_CallMethodNoArgs(object, n.data_ptr);
    if (!address) {
        PyErr_Clear();
        return false;
    }
    array.data = static_cast<const uint8_t*>(PyLong_AsVoidPtr(address));
    Py_DECREF(address);
    array.count = number(PyObject_CallMethodNoArgs(object, n.numel));
    array.plain = number(PyObject_CallMethodNoArgs(object, n.is_contiguous)) == 1;
    array.writable = true;
    PyObject* dtype = PyObject_GetAttr(object, n.dtype);
    if (!dtype) {
        PyErr_Clear();
        return false;
    }
    array.dtype = dtype;
    Py_DECREF(dtype);  // torch keeps its dtypes for ever
    array.itemsize = static_cast<uint32_t>(number(PyObject_GetAttr(dtype, n.itemsize)));
    // A lazily conjugated or negated view has other values than its memory.
    if (array.plain) array.plain = number(PyObject_CallMethodNoArgs(object, n.is_neg)) == 0;
    if (array.plain && number(PyObject_GetAttr(dtype, n.is_complex)) == 1)
        array.plain = number(PyObject_CallMethodNoArgs(object, n.is_conj)) == 0;
    return array.count >= 0;
}

}  // namespace

bool describe(PyObject* object, Array& array) {
    if (object == Py_None) return true;
    const auto& numpy = py::detail::npy_api::get();
    if (numpy.PyArray_Check_(object)) {
        auto* proxy = py::detail::array_proxy(object);
        array.data = reinterpret_cast<const uint8_t*>(proxy->data);
        array.count = 1;
        for (int i = 0; i < proxy->nd; ++i) array.count *= proxy->dimensions[i];
        array.plain = proxy->flags & py::detail::npy_api::NPY_ARRAY_C_CONTIGUOUS_;
        array.writable = proxy->flags & py::detail::npy_api::NPY_ARRAY_WRITEABLE_;
        array.dtype = proxy->descr;
        array.itemsize = static_cast<uint32_t>(py::reinterpret_borrow<py::dtype>(proxy->descr).itemsize());
        return true;
    }
    PyTypeObject* tensor = tensor_type();
    if (tensor && PyType_IsSubtype(Py_TYPE(object), tensor)) return describe_tensor(object, array);
    return false;
}

}  // namespace abccl
