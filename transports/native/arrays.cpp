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

// DLPack's table of C functions, which frameworks offer since its version 1.3: it tells of a tensor what several calls
// of methods would, at the price of one. Laid out as the specification says (dmlc/dlpack, include/dlpack/dlpack.h).
namespace dlpack {

struct Tensor {
    uint8_t* data;
    int32_t device_type, device_id;
    int32_t ndim;
    uint8_t type_code, type_bits;
    uint16_t type_lanes;
    int64_t *shape, *strides;
    uint64_t byte_offset;
};

struct Exchange {
    uint32_t major, minor;
    void *previous, *allocate, *managed_from, *managed_to;
    int (*tensor_from)(void* object, Tensor* tensor);  // borrowed: valid while the object is
    void* work_stream;
};

constexpr int32_t cpu = 1;

const Exchange* exchange_of(PyTypeObject* type) {
    PyObject* capsule = PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__");
    void* table = capsule ? PyCapsule_GetPointer(capsule, "dlpack_exchange_api") : nullptr;
    Py_XDECREF(capsule);  // the type keeps it
    PyErr_Clear();
    auto* exchange = static_cast<const Exchange*>(table);
    return exchange && exchange->major == 1 && exchange->tensor_from ? exchange : nullptr;
}

}  // namespace dlpack

// The same as `describe_tensor` below for what is most common: real numbers, of torch's own tensor type.
bool describe_quickly(PyObject* object, Array& array) {
    static const dlpack::Exchange* const exchange = dlpack::exchange_of(names().tensor);
    static PyObject* dtypes[256][256] = {};  // by code and bits; torch keeps its dtypes for ever
    dlpack::Tensor tensor;
    if (!exchange || exchange->tensor_from(object, &tensor) != 0) {
        PyErr_Clear();
        return false;
    }
    constexpr uint8_t complex = 5;
    if (tensor.device_type != dlpack::cpu || tensor.type_lanes != 1 || tensor.type_code == complex) return false;
    array.data = tensor.data + tensor.byte_offset;
    array.count = 1;
    array.plain = true;
    for (int32_t i = tensor.ndim; i-- > 0;) {
        // An axis of one element may have any stride.
        if (tensor.strides && tensor.shape[i] != 1 && tensor.strides[i] != array.count) array.plain = false;
        array.count *= tensor.shape[i];
    }
    array.plain = array.plain || array.count == 0;
    array.writable = true;
    array.itemsize = tensor.type_bits / 8u;
    PyObject*& dtype = dtypes[tensor.type_code][tensor.type_bits];
    if (!dtype) dtype = PyObject_GetAttr(object, names().dtype);
    if (!dtype) PyErr_Clear();
    array.dtype = dtype;
    if (array.plain) array.plain = number(PyObject_CallMethodNoArgs(object, names().is_neg)) == 0;
    return dtype != nullptr;
}

bool describe_tensor(PyObject* object, Array& array) {
    Names& n = names();
    if (Py_TYPE(object) == n.tensor && describe_quickly(object, array)) return true;
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
