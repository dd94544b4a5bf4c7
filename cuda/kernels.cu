// fold_<type> and scale_<type>: what the native core does on the CPU (transports/native/fold.hpp), on a device.
#include "fold.cuh"

namespace abccl {

constexpr int sources_at_most = 480;  // what a launch may take is 4,096 bytes

struct Fold {
    char* destination;
    u64 count;
    i32 op, sources;
    const char* source[sources_at_most];
};

struct Scale {
    char* destination;
    const char* source;
    u64 count;
    double factor;
};

}  // namespace abccl

// Two blocks at least on a multiprocessor: else the compiler takes it upon itself to spill for the sake of more.
#define ABCCL_FOLD_AND_SCALE(name, E)                                                                            \
    extern "C" __global__ void __launch_bounds__(abccl::block_threads, 2)                                        \
        fold_##name(const __grid_constant__ abccl::Fold call) {                                                  \
        abccl::fold<E>(call.op, call.destination, call.source, call.sources, call.count, blockIdx.x, gridDim.x); \
    }                                                                                                            \
    extern "C" __global__ void __launch_bounds__(abccl::block_threads, 2)                                        \
        scale_##name(const __grid_constant__ abccl::Scale call) {                                                \
        abccl::scale<E>(call.destination, call.source, call.factor, call.count, blockIdx.x, gridDim.x);          \
    }
ABCCL_KERNELS(ABCCL_FOLD_AND_SCALE)
