// A fuzzer without libFuzzer, for any compiler: the inputs of some folders, then changes of them, always the same ones.
//
//     fuzz_plan CHANGES FOLDER...
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);
extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t most, unsigned seed);
extern "C" long report_fuzzing();  // says what was done; returns how much was refused

namespace {

using Bytes = std::vector<uint8_t>;

constexpr size_t most = 1 << 16;
constexpr unsigned seconds = 20;  // for one input

Bytes now;  // what runs

// Where the sanitizer ends the process, and where the alarm does: what was run is kept.
void keep() {
    const std::string file = "crash-" + std::to_string(getpid());
    std::ofstream(file, std::ios::binary)
        .write(reinterpret_cast<const char*>(now.data()), static_cast<long>(now.size()));
    std::fprintf(stderr, "the input is in %s\n", file.c_str());
}

void attempt(const Bytes& bytes) {
    now = bytes;
    alarm(seconds);
    LLVMFuzzerTestOneInput(now.data(), now.size());
    alarm(0);
}

}  // namespace

extern "C" void __sanitizer_set_death_callback(void (*callback)()) __attribute__((weak));

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t) {
    static std::mt19937 random(5);
    if (size) data[random() % size] = static_cast<uint8_t>(random());
    return size;
}

int main(int count, char** words) {
    if (count < 3) {
        std::fprintf(stderr, "usage: %s CHANGES FOLDER...\n", words[0]);
        return 2;
    }
    if (__sanitizer_set_death_callback) __sanitizer_set_death_callback(keep);
    for (int signal : {SIGALRM, SIGABRT})
        std::signal(signal, [](int number) {
            std::fprintf(stderr, number == SIGALRM ? "an input took too long\n" : "aborted\n");
            keep();
            _exit(1);
        });
    std::vector<std::filesystem::path> files;
    for (int i = 2; i < count; ++i)
        for (const auto& entry : std::filesystem::directory_iterator(words[i])) files.push_back(entry.path());
    std::sort(files.begin(), files.end());
    std::vector<Bytes> inputs;
    for (const auto& file : files) {
        std::ifstream opened(file, std::ios::binary);
        inputs.emplace_back(std::istreambuf_iterator<char>(opened), std::istreambuf_iterator<char>());
        attempt(inputs.back());
    }
    if (inputs.empty() || report_fuzzing() != 0) {
        std::fprintf(stderr, "wanted are inputs, of which none is refused\n");
        return 2;
    }
    std::mt19937 random(7);
    const long changes = std::atol(words[1]);
    for (long i = 0; i < changes; ++i) {
        Bytes bytes = inputs[random() % inputs.size()];
        size_t size = bytes.size();
        bytes.resize(most);

        for (uint32_t times = 1 + random() % 3; times > 0; --times)
            size = LLVMFuzzerCustomMutator(bytes.data(), size, most, static_cast<unsigned>(random()));
        bytes.resize(size);
        attempt(bytes);
    }
    report_fuzzing();
    std::printf("fuzz: ok, %zu inputs and %ld changes of them\n", inputs.size(), changes);
}
