// The flight recorder and the hooks for tests, as Python sees them.
#pragma once

#include <pybind11/pybind11.h>

#include "communicator.hpp"

namespace abccl {

// Adds what belongs to the module, and to the class of communicators.
void add_flight(pybind11::module_& module);
void add_flight(pybind11::class_<Communicator, std::shared_ptr<Communicator>>& communicator);

}  // namespace abccl
