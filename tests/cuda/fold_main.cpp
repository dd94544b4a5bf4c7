// Runs the kernels that do not wait on buffers which are exactly as long as they must be, and holds what comes out
// against plain loops. Meant for the sanitizers. Prints what is wrong and returns 1.
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "kernels.hpp"

namespace {

using Bytes = std::vector<char>;

uint64_t dice = 1;

uint64_t roll(uint64_t sides) {
    dice = dice * 6364136223846793005u + 1442695040888963407u;
    return (dice >> 33) % sides;
}

// Memory of exactly so many bytes, `past` bytes behind a multiple of 64.
class Buffer {
  public:
    Buffer(size_t bytes, size_t past) : bytes_(bytes), memory_(nullptr) {
        void* memory;
        if (posix_memalign(&memory, 64, past + bytes) != 0) abort();
        memory_ = static_cast<char*>(memory), begin_ = memory_ + past;
        for (size_t i = 0; i < bytes; ++i) begin_[i] = static_cast<char>(roll(256));
    }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { free(memory_); }

    char* begin() const { return begin_; }
    Bytes copy() const { return Bytes(begin_, begin_ + bytes_); }

  private:
    size_t bytes_;
    char *memory_, *begin_;
};

void expect(bool right, const std::string& what) {
    if (right) return;
    printf("WRONG: %s\n", what.c_str());
    exit(1);
}

template <class Call>
void launch(const char* kernel, unsigned grid, Call call, unsigned block = abccl::block_threads) {
    void* arguments[] = {&call};
    expect(cpu::launch(kernel, grid, block, arguments), std::string("no kernel ") + kernel);
}

template <class E>
typename E::Value element(const Bytes& bytes, size_t i) {
    typename E::Stored stored;
    memcpy(&stored, bytes.data() + i * sizeof stored, sizeof stored);
    return E::widen(stored);
}

template <class Value>
bool is_nan(Value value) {
    return value != value;
}
template <class T>
bool is_nan(abccl::ComplexValue<T> value) {
    return is_nan(value.real) || is_nan(value.imaginary);
}

// Whether two vectors are alike, NaNs being alike; that of two complex numbers one part may be NaN is not looked at.
template <class E>
bool alike(const Bytes& a, const Bytes& b) {
    for (size_t i = 0; i * sizeof(typename E::Stored) < a.size(); ++i) {
        const auto x = element<E>(a, i), y = element<E>(b, i);
        if (!(is_nan(x) && is_nan(y)) && memcmp(&x, &y, sizeof x) != 0) return false;
    }
    return true;
}

template <class E>
void put(Bytes& bytes, size_t i, typename E::Value value) {
    const typename E::Stored stored = E::narrow(value);
    memcpy(bytes.data() + i * sizeof stored, &stored, sizeof stored);
}

template <class E>
struct Parts {
    static constexpr size_t size = sizeof(typename E::Stored);
};
template <class T>
struct Parts<abccl::Complex<T>> {
    static constexpr size_t size = sizeof(T);
};

// How far behind a multiple of 64 the buffers of a launch begin: nowhere, all alike, each elsewhere.
template <class E>
std::vector<size_t> places(int way, size_t buffers) {
    std::vector<size_t> past(buffers);
    const size_t same = roll(16 / Parts<E>::size);
    for (size_t& one : past) one = Parts<E>::size * (way == 0 ? 0 : way == 1 ? same : roll(16 / Parts<E>::size));
    return past;
}

template <class E>
void check_fold(const char* kernel, int op, size_t count, int k, int way, bool in_place) {
    const size_t bytes = count * sizeof(typename E::Stored);
    const std::vector<size_t> past = places<E>(way, static_cast<size_t>(k) + 1);
    std::vector<Buffer*> sources;
    std::vector<Bytes> given;
    const Buffer apart(bytes, past[0]);
    abccl::Fold call{apart.begin(), count, op, k, {}};
    for (int j = 0; j < k; ++j) {
        sources.push_back(new Buffer(bytes, past[static_cast<size_t>(j) + 1]));
        given.push_back(sources.back()->copy());
        call.source[j] = sources.back()->begin();
    }
    const Buffer& result = in_place ? *sources[static_cast<size_t>(k) / 2] : apart;
    call.destination = result.begin();
    Bytes wanted(bytes);
    abccl::with_operator<E>(op, [&](auto operation) {
        for (size_t i = 0; i < count; ++i) {
            auto total = element<E>(given[0], i);
            for (size_t j = 1; j < given.size(); ++j) total = operation.of(total, element<E>(given[j], i));
            put<E>(wanted, i, total);
        }
    });
    launch(kernel, 1 + static_cast<unsigned>(roll(3)), call);
    const std::string what = std::string(kernel) + " by " + std::to_string(op) + " of " + std::to_string(count) +
                             " x " + std::to_string(k) + " placed " + std::to_string(way) +
                             (in_place ? " in place" : "");
    expect(alike<E>(result.copy(), wanted), what);
    for (size_t j = 0; j < given.size(); ++j) {
        expect(sources[j] == &result || sources[j]->copy() == given[j], what + ": a source was written");
        delete sources[j];
    }
}

const size_t counts[] = {0, 1, 3, 16, 33, 1025, 4099};

// All numbers and ways with few sources, and all numbers of sources with few elements.
template <class E>
void check_folds(const char* kernel) {
    constexpr int ops = 7;
    const auto defined = [](int op) {
        bool is = false;
        abccl::with_operator<E>(op, [&](auto) { is = true; });
        return is;
    };
    for (int op = 0; op < ops; ++op)
        if (defined(op)) {
            for (size_t count : counts)
                for (int way = 0; way < 3; ++way)
                    check_fold<E>(kernel, op, count, 2 + static_cast<int>(roll(2)), way, roll(2) == 0);
            for (int k : {1, 2, 3, 4, 5, 8, 9, 64, 480}) check_fold<E>(kernel, op, 37, k, 1, roll(2) == 0);
        }
}

template <class E>
void check_scales(const char* kernel) {
    using Factor = abccl::Factor<typename E::Value>;
    if constexpr (Factor::defined)
        for (size_t count : counts)
            for (int way = 0; way < 3; ++way) {
                const size_t bytes = count * sizeof(typename E::Stored);
                const std::vector<size_t> past = places<E>(way, 2);
                const Buffer source(bytes, past[0]), destination(bytes, past[1]);
                Bytes wanted(bytes);
                for (size_t i = 0; i < count; ++i)
                    put<E>(wanted, i, Factor::times(element<E>(source.copy(), i), 1.0 / 3));
                launch(kernel, 2, abccl::Scale{destination.begin(), source.begin(), count, 1.0 / 3});
                expect(alike<E>(destination.copy(), wanted), kernel);
            }
}

void check_gather(int pieces) {
    abccl::Gather call{};
    std::vector<Buffer*> from, to;
    for (int i = 0; i < pieces; ++i) {
        const size_t bytes = 1 + roll(i % 5 == 0 ? 3 * abccl::tile_bytes : 70), same = roll(16);
        from.push_back(new Buffer(bytes, same));
        to.push_back(new Buffer(bytes, i % 3 == 0 ? same : roll(16)));
        call.piece[i] = {to.back()->begin(), from.back()->begin(), bytes};
        const size_t tiles =
            (bytes + reinterpret_cast<size_t>(to.back()->begin()) % 16 + abccl::tile_bytes - 1) / abccl::tile_bytes;
        call.first[++call.pieces] = call.first[i] + static_cast<unsigned>(tiles);
    }
    launch("gather", 1 + static_cast<unsigned>(roll(5)), call);
    for (size_t i = 0; i < from.size(); ++i) {
        expect(from[i]->copy() == to[i]->copy(), "gather, piece " + std::to_string(i));
        delete from[i];
        delete to[i];
    }
}

}  // namespace

int main() {
#define CHECK(name, E)             \
    check_folds<E>("fold_" #name); \
    check_scales<E>("scale_" #name);
    ABCCL_KERNELS(CHECK)
    for (int pieces : {1, 2, 3, 7, 128}) check_gather(pieces);
    unsigned word = 0xffffffff;
    launch("tick", 1, abccl::Tick{&word}, 1);
    expect(word == 0, "tick");
    printf("all right\n");
    return 0;
}
