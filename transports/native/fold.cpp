// Picks the fold kernels that this CPU can run, and calls them.
#include "fold.hpp"

#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>

#include "fold_table.hpp"

namespace abccl {
namespace {

#ifdef __x86_64__

bool runs(const FoldTable& table) {
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
    if (&table == &fold_avx2) return avx2;
    if (&table == &fold_avx512)
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return true;
}

constexpr const FoldTable* tables[] = {&fold_avx512, &fold_avx2, &fold_baseline};  // best first

#else

bool runs(const FoldTable&) { return true; }

constexpr const FoldTable* tables[] = {&fold_baseline};

#endif

const FoldTable* best() {
    for (const FoldTable* table : tables)
        if (runs(*table)) return table;
    return &fold_baseline;
}

// A constant before static initialisation is through, so another initialiser may fold already.
std::atomic<const FoldTable*> active{&fold_baseline};
[[maybe_unused]] const bool picked = (active.store(best()), true);

[[noreturn]] void refuse(const char* what, Type type) {
    throw std::invalid_argument(std::string(what) + " is not defined for " + name(type));
}

}  // namespace

const FoldTable& fold_table() { return *active.load(std::memory_order_relaxed); }

void fold(Type type, Op op, void* destination, const void* const* sources, int k, size_t count) {
    const FoldKernel kernel = fold_table().fold[static_cast<int>(type)][static_cast<int>(op)];
    if (!kernel) refuse(name(op), type);
    if (k > 1)
        kernel(static_cast<char*>(destination), reinterpret_cast<const char* const*>(sources), k, count);
    else if (destination != sources[0] && count != 0)
        std::memcpy(destination, sources[0], count * size_of(type));
}

void scale(Type type, void* destination, const void* source, double factor, size_t count) {
    const ScaleKernel kernel = fold_table().scale[static_cast<int>(type)];
    if (!kernel) refuse("scaling", type);
    kernel(static_cast<char*>(destination), static_cast<const char*>(source), factor, count);
}

const char* instruction_set() { return fold_table().name; }

bool use_instruction_set(const char* name) {
    for (const FoldTable* table : tables)
        if (std::strcmp(table->name, name) == 0 && runs(*table)) {
            active.store(table);
            return true;
        }
    return false;
}

}  // namespace abccl
