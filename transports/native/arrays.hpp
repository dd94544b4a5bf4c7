// What a call needs to know of a numpy array or torch tensor, read as cheaply as it can be.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>

namespace abccl {

struct Array {
    const uint8_t* data = nullptr;
    int64_t count = -1;         // elements; -1: no array
    PyObject* dtype = nullptr;  // numpy's and torch's dtypes are singletons, so the pointer is a name (borrowed)
    bool plain = false;         // contiguous, in host memory, and all that a warm call relies on
    bool writable = false;
    uint32_t itemsize = 0;
};

// Fills `array` from a numpy array, a torch tensor or None. False: it is something else, or raised; no Python error
// is left set.
bool describe(PyObject* object, Array& array);

}  // namespace abccl
