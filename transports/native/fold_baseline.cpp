// The fold kernels for every CPU of the architecture (SSE2 on x86-64, Neon on aarch64).
#define ABCCL_ISA baseline
#include "fold_kernels.inc"

namespace abccl {
constexpr FoldTable fold_baseline = baseline::make_table("baseline");
}
