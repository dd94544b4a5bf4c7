// A Python method with a shortcut: called by position alone, it goes to the dispatcher without the interpreter.
#pragma once

#include <pybind11/pybind11.h>

namespace abccl {

// Adds the type `Shortcut` to a module: Shortcut(function, collective, slots, defaults). It stands in a class for
// `function`, a method whose object has its Dispatcher as `_dispatcher`. A call that passes nothing by keyword, and no
// more positional arguments than `slots` names, runs dispatcher.call(collective, x, out, op, root, None, False) at
// once; any other runs the function, which means the same. `slots` are the positions of x, out, op and root, from 0, or
// -1 for what is None (for root: 0); `defaults` are those of the function's last positions.
void add_shortcut(pybind11::module_& module);

}  // namespace abccl
