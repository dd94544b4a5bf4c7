// An execution that its caller drives from Python, who carries the messages between hosts.
#pragma once

#include <pybind11/pybind11.h>

namespace abccl {

void add_driven(pybind11::module_& m);

}  // namespace abccl
