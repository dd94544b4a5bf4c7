// The kernels that do not wait, as a shared library: see tests/kernels_on_cpu.py.
#include "kernels.hpp"

// 0, or 1 if there is no kernel of that name.
extern "C" int run_kernel(const char* name, int grid, int block, void** arguments) {
    return cpu::launch(name, static_cast<unsigned>(grid), static_cast<unsigned>(block), arguments) ? 0 : 1;
}
