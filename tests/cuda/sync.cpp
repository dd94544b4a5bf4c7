// Runs launches of the kernels that wait for each other, all ranks at the same time, on memory as a device would have
// it: an image that is mapped at its own addresses. tests/spin_on_cpu.py writes it.
//
//     sync IMAGE SEED
//
// Ranks take their launches in order. Memory that nobody has allocated is poisoned under AddressSanitizer. As a shared
// library it has `run_kernel`, which makes one launch.

#include "threads.hpp"
// The kernels.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>

#include "interpreter.cu"
#include "shots.cu"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace {

using Kernel = void (*)(void** arguments);

template <class T>
const T& argument(void** arguments, int index) {
    return *static_cast<const T*>(arguments[index]);
}

template <void (*kernel)(abccl::Calls, unsigned)>
void run(void** a) {
    kernel(argument<abccl::Calls>(a, 0), argument<unsigned>(a, 1));
}

template <void (*kernel)(abccl::Calls, unsigned, abccl::Reduction)>
void run(void** a) {
    kernel(argument<abccl::Calls>(a, 0), argument<unsigned>(a, 1), argument<abccl::Reduction>(a, 2));
}

const std::map<std::string, Kernel> kernels = {
#define KNOWN(name, Element)                                                                \
    {"interpret_" #name, run<interpret_##name>}, {"one_shot_" #name, run<one_shot_##name>}, \
        {"two_shot_" #name, run<two_shot_##name>},
    ABCCL_KERNELS(KNOWN)
#undef KNOWN
};

// The image begins with this; then the regions, then the launches, as tests/spin_on_cpu.py writes them.
struct Head {
    uint64_t base, nbytes, regions, launches, ranks;
};
struct Region {
    uint64_t address, nbytes;
};
struct Launch {
    uint64_t rank, grid, threads;
    char kernel[40];
    abccl::Calls calls;
    alignas(8) char arguments[40];
};

}  // namespace

// 0, or 1 if there is no kernel of that name. Blocks have at most two threads.
extern "C" int run_kernel(const char* name, int grid, int block, void** arguments) {
    const auto found = kernels.find(name);
    if (found == kernels.end()) return 1;
    cpu::launch(static_cast<unsigned>(grid), block > 2 ? 2 : static_cast<unsigned>(block), 1,
                [&] { found->second(arguments); });
    return 0;
}

int main(int argc, char** argv) {
    if (argc != 3) {
        fprintf(stderr, "usage: sync IMAGE SEED\n");
        return 2;
    }
    const int file = open(argv[1], O_RDWR);
    Head head;
    if (file < 0 || pread(file, &head, sizeof head, 0) != sizeof head) {
        perror(argv[1]);
        return 2;
    }
    void* const wanted = reinterpret_cast<void*>(head.base);
    char* const memory = static_cast<char*>(
        mmap(wanted, head.nbytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED_NOREPLACE, file, 0));
    if (memory != wanted) {
        perror("sync: mapping the image");
        return 2;
    }
    const Region* const table = reinterpret_cast<const Region*>(memory + sizeof head);
    const std::vector<Region> regions(table, table + head.regions);
    const Launch* const list = reinterpret_cast<const Launch*>(table + head.regions);
    const std::vector<Launch> launches(list, list + head.launches);
#ifdef __SANITIZE_ADDRESS__
    ASAN_POISON_MEMORY_REGION(memory, head.nbytes);
    for (const Region& region : regions)
        ASAN_UNPOISON_MEMORY_REGION(reinterpret_cast<char*>(region.address), region.nbytes);
#endif
    const auto seed = static_cast<uint32_t>(strtoul(argv[2], nullptr, 10));
    std::vector<std::thread> ranks;
    for (uint64_t rank = 0; rank < head.ranks; ++rank)
        ranks.emplace_back([&, rank] {
            uint32_t number = seed + static_cast<uint32_t>(rank) * 65537;
            for (Launch launch : launches) {
                if (launch.rank != rank) continue;
                const Kernel kernel = kernels.at(launch.kernel);
                void* arguments[] = {&launch.calls, launch.arguments, launch.arguments + 8};
                cpu::launch(static_cast<unsigned>(launch.grid), static_cast<unsigned>(launch.threads), ++number,
                            [&] { kernel(arguments); });
            }
        });
    for (std::thread& rank : ranks) rank.join();
#ifdef __SANITIZE_ADDRESS__
    ASAN_UNPOISON_MEMORY_REGION(memory, head.nbytes);
#endif
    return 0;
}
