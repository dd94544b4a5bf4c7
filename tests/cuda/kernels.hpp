// The kernels that do not wait, for the CPU, by name.
#pragma once

#include "shim.hpp"
// The kernels.
#include "gather.cu"
#include "kernels.cu"

namespace cpu {

using Run = void (*)(unsigned grid, unsigned block, void** arguments);

// A kernel takes one argument, a structure.
template <class Call, void (*kernel)(Call)>
void run(unsigned grid, unsigned block, void** arguments) {
    const Call& call = *static_cast<const Call*>(arguments[0]);
    serial(grid, block, [&] { kernel(call); });
}

struct Known {
    const char* name;
    Run run;
};

inline const Known known[] = {
#define ABCCL_KNOWN(name, E) \
    {"fold_" #name, run<abccl::Fold, fold_##name>}, {"scale_" #name, run<abccl::Scale, scale_##name>},
    ABCCL_KERNELS(ABCCL_KNOWN)
#undef ABCCL_KNOWN
        {"gather", run<abccl::Gather, gather>},
    {"tick", run<abccl::Tick, tick>},
};

// Runs the kernel of that name; false if there is none.
inline bool launch(const char* name, unsigned grid, unsigned block, void** arguments) {
    for (const Known& kernel : known)
        if (strcmp(kernel.name, name) == 0) {
            kernel.run(grid, block, arguments);
            return true;
        }
    return false;
}

}  // namespace cpu
