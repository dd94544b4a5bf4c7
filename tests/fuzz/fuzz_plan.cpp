// Plans that may be broken, run in memory that a peer may have spoilt. For libFuzzer, or for alone.cpp.
//
// Every plan is refused with Failure(argument), or runs: all ranks in this thread, on buffers of exactly the declared
// sizes, so that AddressSanitizer sees each byte outside. Some rounds later it is finished, failed or stuck; all is
// well as long as nothing else was touched. The messages to other hosts are answered with bytes of the tape, and by
// the tape a peer spoils what lies in shared memory.
#include <sanitizer/asan_interface.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <optional>

#include "../native/ranks.hpp"
#include "failure.hpp"
#include "plan_case.hpp"
#include "remote.hpp"

using namespace abccl;
using namespace abccl::fuzz;

namespace {

constexpr uint32_t lanes = 2;
constexpr size_t header_bytes = 64;
constexpr size_t most_bytes = 32 << 10;  // of a buffer: longer ones only take longer
constexpr int most_rounds = 100;

void require(bool condition, const char* what) {
    if (condition) return;
    std::fprintf(stderr, "broken: %s\n", what);
    std::abort();
}

// What has been done, of all plans: a fuzzer whose inputs are all refused finds nothing.
struct {
    long refused = 0, run = 0, finished = 0;
} counts;

struct Rank {
    std::unique_ptr<const Plan> plan;
    std::unique_ptr<uint8_t[]> input, output;
    size_t input_bytes = 0;
    const void* from = nullptr;
    void* to = nullptr;
    RemoteQueue remote{header_bytes};  // used by plans with remote peers
    std::unique_ptr<Execution> execution;
    std::vector<RemoteMessage> under_way;
    bool runs = false;
};

std::unique_ptr<const Plan> parse(const PlanParameters& parameters) {
    try {
        return std::make_unique<const Plan>(parameters, lanes, slot);
    } catch (const Failure& failure) {
        require(failure.kind == Kind::argument, "a plan is refused as an argument");
        ++counts.refused;
        return nullptr;
    }
}

std::unique_ptr<uint8_t[]> buffer(size_t bytes) {
    std::unique_ptr<uint8_t[]> made(new uint8_t[bytes]);
    std::memset(made.get(), 1, bytes);  // a bool, too
    return made;
}

// Blocks may lie where they come from, but no block where another comes from.
bool can_be_in_place(const Plan& plan) {
    return std::all_of(plan.extents.begin(), plan.extents.end(),
                       [](const Extent& e) { return e.input < 0 || e.output < 0 || e.input == e.output; });
}

// What a rank offers its peers lies in the slots that it may write, whole.
void check_slots(const Geometry& geometry, uint32_t rank) {
    const uint8_t* base = regions[rank]->base();
    for (uint32_t peer = 0; peer < geometry.size; ++peer)
        for (uint32_t lane = 0; lane < geometry.lanes; ++lane)
            for (uint32_t i = 0; i < geometry.slots; ++i) {
                const auto& d =
                    reinterpret_cast<const Descriptor*>(base + geometry.descriptor(peer, lane))[i % geometry.slots];
                if (d.sequence.load() == 0 || (d.where >= pulled_whole && d.where != inlined)) continue;
                if (d.where == inlined) {
                    require(d.length <= inline_bytes, "what is inlined fits");
                    continue;
                }
                const size_t start = static_cast<size_t>(d.where) * cache_line, end = start + d.length;
                const auto within = [&](size_t slots_at) {
                    for (uint32_t s = 0; s < geometry.slots; ++s, slots_at += geometry.slot_bytes)
                        if (slots_at <= start && end <= slots_at + geometry.slot_bytes) return true;
                    return false;
                };
                require(within(geometry.arena(peer, lane)) || within(geometry.multicast(lane)),
                        "a message lies in a slot");
            }
}

// While it lives, a rank may read of the others' arenas only what they have sent it: AddressSanitizer, which knows
// nothing of shared memory, is told so. For descriptors that nobody has spoilt.
class Fence {
  public:
    Fence(const Geometry& geometry, uint32_t reader) : geometry_(geometry), reader_(reader) {
        for (uint32_t rank = 0; rank < geometry.size; ++rank) {
            if (rank == reader) continue;
            const uint8_t* base = regions[rank]->base();
            ASAN_POISON_MEMORY_REGION(base + geometry.arena_at(), geometry.bytes() - geometry.arena_at());
            for (uint32_t i = 0; i < geometry.channels() * geometry.slots; ++i) allow(rank, i);
        }
    }
    ~Fence() {
        for (uint32_t rank = 0; rank < geometry_.size; ++rank)
            ASAN_UNPOISON_MEMORY_REGION(regions[rank]->base(), geometry_.bytes());
    }

  private:
    void allow(uint32_t rank, uint32_t which) {
        const uint8_t* base = regions[rank]->base();
        const auto& d = reinterpret_cast<const Descriptor*>(base + geometry_.descriptor(reader_, 0))[which];
        const size_t start = static_cast<size_t>(d.where) * cache_line;
        if (d.where == inlined && d.length <= inline_bytes)
            ASAN_POISON_MEMORY_REGION(d.payload + d.length, inline_bytes - d.length);
        else if (start + d.length <= geometry_.bytes())
            ASAN_UNPOISON_MEMORY_REGION(base + start, d.length);
    }

    Geometry geometry_;
    uint32_t reader_;
};

// A peer that has gone mad writes what it likes into its region. (Not its pid: the core reads that process's memory.)
void spoil(const Geometry& geometry, Input& tape) {
    const uint32_t rank = tape.take<uint8_t>() % geometry.size, peer = tape.take<uint8_t>() % geometry.size;
    const uint32_t lane = tape.take<uint8_t>() % geometry.channels(), which = tape.take<uint8_t>();
    const uint32_t value = tape.take<uint32_t>();
    uint8_t* base = regions[rank]->base();
    Control& control = *reinterpret_cast<Control*>(base);
    Descriptor& d =
        reinterpret_cast<Descriptor*>(base + geometry.descriptor(peer, lane))[(which >> 4) % geometry.slots];
    auto* words = reinterpret_cast<uint32_t*>(d.payload);
    switch (which & 15) {
        case 0:
        case 1:
            d.where = value;
            break;
        case 2:
            d.where = inlined - value % 4;
            break;
        case 3:
        case 4:
            d.length = value;
            break;
        case 5:
            d.length = value % 320;
            break;
        case 6:
            d.sequence.store(d.sequence.load() + value % 3);
            break;
        case 7:
        case 8:
            words[value % 4] = value;
            break;
        case 9:
            words[value % (inline_bytes / 4)] = UINT32_MAX;
            break;
        case 10:
            control.abort.store(value % (1 << 27));
            break;
        case 11:
            control.heap_bytes.store(value);
            control.heap_fd = static_cast<int32_t>(value % 8);
            break;
        case 12:
            control.entered.store(value);
            control.finished.store(value / 2);
            break;
        case 13:
            reinterpret_cast<Tail*>(base + geometry.tail(peer, lane))->value.store(value);
            break;
        case 14:
            control.took.store(uint64_t{77} << 32 | value);
            break;
        default:
            d.signature = value;
    }
}

// The user's own messages, on channels of their own: from each rank to the next, some to be received by a third call.
struct Letters {
    Letters(Ranks& ranks, Input& tape) : group(ranks) {
        for (uint32_t r = 0; ranks.size() > 1 && r < 2 * ranks.size(); ++r) {
            const uint32_t from = r % static_cast<uint32_t>(ranks.size());
            const uint32_t to = (from + 1) % static_cast<uint32_t>(ranks.size());
            const size_t bytes = tape.take<uint16_t>() % (3 * slot);
            const int64_t tag = tape.take<uint8_t>() % 3;
            buffers.push_back(buffer(bytes));
            works.push_back(ranks[from]->mailbox.post_send(to, tag, buffers.back().get(), bytes, Deadline::max()));
            buffers.push_back(buffer(bytes));
            works.push_back(ranks[to]->mailbox.post_receive(tag == 2 ? any_source : static_cast<int32_t>(from),
                                                            tag == 1 ? any_tag : tag, buffers.back().get(), bytes,
                                                            Deadline::max()));
        }
    }
    void progress(uint32_t rank) { group[rank]->mailbox.progress(); }

    Ranks& group;
    std::vector<std::unique_ptr<uint8_t[]>> buffers;
    std::vector<std::shared_ptr<Work>> works;
};

// Carries messages between hosts, or leaves them for later.
void carry(Rank& rank, Input& tape) {
    for (const RemoteMessage& message : rank.remote.take()) rank.under_way.push_back(message);
    std::vector<RemoteMessage> later;
    for (const RemoteMessage& message : rank.under_way) {
        if (tape.take<uint8_t>() % 4 == 3) {
            later.push_back(message);
            continue;
        }
        uint8_t sum = 0;
        for (size_t i = 0; i < message.bytes; ++i) sum ^= message.data[i];
        std::memset(message.data, 1, message.bytes);
        message.data[0] = sum;
        rank.remote.complete(message.id);
    }
    rank.under_way = std::move(later);
}

void run(const Case& given, std::vector<Rank>& ranks) {
    const uint32_t size = static_cast<uint32_t>(ranks.size());
    const Geometry geometry{size, lanes, 2, slot};
    Ranks group = make(size, lanes, slot);
    Input tape(given.tape.data(), given.tape.size());
    bool spoilt = false;
    for (uint32_t r = 0; r < size; ++r) {
        Endpoint& endpoint = group[r]->endpoint;
        endpoint.set_pull(true);
        endpoint.set_streaming_from(given.way & 32 ? 1 : SIZE_MAX);
        if (given.way % 8 == 0) endpoint.adapt();
        if (given.way % 8 >= 1 && given.way % 8 <= 4) endpoint.set_way(given.way % 8 - 1);
        Rank& rank = ranks[r];
        if (!rank.plan) continue;
        const size_t in = static_cast<size_t>(rank.plan->parameters.input_count) * rank.plan->itemsize;
        const size_t out = static_cast<size_t>(rank.plan->parameters.output_count) * rank.plan->itemsize;
        const bool in_place = given.way & 16 && can_be_in_place(*rank.plan);
        rank.input_bytes = in_place ? 0 : in;
        rank.input = buffer(rank.input_bytes);
        rank.output = buffer(in_place ? std::max(in, out) : out);
        rank.from = in_place ? rank.output.get() : rank.input.get();
        rank.to = rank.output.get();
        if (given.way & 8) {
            uint8_t* heap = endpoint.heap(4 * most_bytes)->base();
            std::memset(heap, 1, 2 * most_bytes);
            rank.from = heap;
            rank.to = in_place ? heap : heap + most_bytes;
        }
        rank.execution = std::make_unique<Execution>(endpoint, rank.plan->parameters.remotes ? &rank.remote : nullptr);
    }
    std::unique_ptr<Letters> letters;
    try {
        if (given.way & 64) letters = std::make_unique<Letters>(group, tape);
    } catch (const Failure&) {
    }
    for (int again = 0; again < 2; ++again) {
        for (Rank& rank : ranks) try {
                rank.runs = false;
                rank.under_way.clear();
                if (!rank.plan) continue;
                rank.execution->start(*rank.plan, rank.from, rank.to);
                rank.runs = true;
                ++counts.run;
            } catch (const Failure&) {
            }
        int idle = 0;
        for (int round = 0; round < most_rounds && idle < 3; ++round) {
            ++idle;
            for (uint32_t r = 0; r < size; ++r) {
                Rank& rank = ranks[r];
                try {
                    std::optional<Fence> fence;
                    if (!spoilt) fence.emplace(geometry, r);
                    if (letters) letters->progress(r);
                    if (!rank.runs) continue;
                    const Outcome outcome = rank.execution->progress();
                    if (outcome == Outcome::done) {
                        rank.runs = false;
                        ++counts.finished;
                    }
                    if (outcome == Outcome::blocked) rank.execution->blame();
                    if (outcome != Outcome::blocked || !rank.under_way.empty()) idle = 0;
                    carry(rank, tape);
                    group[r]->endpoint.check_collective();
                } catch (const Failure& failure) {
                    require(failure.kind >= Kind::argument && failure.kind <= Kind::aborted, "a failure has a kind");
                    rank.runs = false;
                }
                if (!spoilt) check_slots(geometry, r);
            }
            if (tape.left() >= 8 && tape.take<uint8_t>() & 1) {
                spoil(geometry, tape);
                spoilt = true;
            }
        }
        for (const Rank& rank : ranks)
            for (size_t i = 0; rank.plan && rank.from == rank.input.get() && i < rank.input_bytes; ++i)
                require(rank.input[i] == 1, "an input stays as it is");
        for (const Rank& rank : ranks)
            if (rank.runs) return;  // stuck: the memory may still be read, and there is no other run
    }
}

}  // namespace

extern "C" long report_fuzzing() {
    std::printf("plans: %ld refused, %ld runs, %ld to the end\n", counts.refused, counts.run, counts.finished);
    return counts.refused;
}

extern "C" const char* __asan_default_options() { return "max_allocation_size_mb=256:allocator_may_return_null=0"; }

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    const Case given = Case::decode(data, size);
    std::vector<Rank> ranks(given.plans.size());
    bool any = false;
    for (size_t r = 0; r < ranks.size(); ++r) {
        ranks[r].plan = parse(given.plans[r]);
        if (!ranks[r].plan) continue;
        const PlanParameters& p = ranks[r].plan->parameters;
        const auto itemsize = static_cast<int64_t>(ranks[r].plan->itemsize);
        const auto most = static_cast<int64_t>(most_bytes) / itemsize;
        if (p.input_count > most || p.output_count > most) ranks[r].plan.reset();
        any |= ranks[r].plan != nullptr;
    }
    if (any) run(given, ranks);
    return 0;
}

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t most);

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t most, unsigned seed) {
    Mutator mutator(seed);
    if (mutator.below(8) == 0) return LLVMFuzzerMutate(data, size, most);
    Case found = Case::decode(data, size);
    mutator.change(found);
    const std::vector<uint8_t> encoded = found.encode();
    if (encoded.size() > most) return size;
    std::copy(encoded.begin(), encoded.end(), data);
    return encoded.size();
}
