// Channels, engine, mailbox and failures with ranks as threads, so that the sanitizers see both ends.
#include <algorithm>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "failure.hpp"
#include "ranks.hpp"

using namespace abccl;

namespace {

// Whether anything was written to a rank's arenas.
bool staged(const Geometry& geometry) {
    for (auto& region : regions)
        for (size_t i = geometry.arena_at(); i < geometry.bytes(); ++i)
            if (region->base()[i] != 0) return true;
    return false;
}

// One-shot all_reduce: one multicast, one fold of all.
PlanParameters one_shot(int32_t rank, int32_t size, int64_t count, int32_t lanes, int64_t segment) {
    PlanParameters p = blank(rank, size, count, lanes, segment);
    p.table = {count, 0, 0};
    p.names = {"0"};
    p.segments = std::max<int64_t>(1, (count + segment - 1) / segment);
    std::vector<int32_t> peers;
    for (int32_t peer = 0; peer < size; ++peer)
        if (peer != rank) peers.push_back(peer);
    p.code = {0, 5, 1, size - 1};
    p.code.insert(p.code.end(), peers.begin(), peers.end());
    p.code.insert(p.code.end(), {1, 0, 0, 0, 0});
    for (int32_t peer : peers) p.code.insert(p.code.end(), {1, 5, peer, 1, 0});
    p.code.insert(p.code.end(), {2, 1, 0, 0, 0, size});
    int32_t reg = 0;
    for (int32_t source = 0; source < size; ++source) {
        if (source == rank)
            p.code.insert(p.code.end(), {0, 0, 0, 0});
        else
            p.code.insert(p.code.end(), {3, 0, reg++, 0});
    }
    p.code.push_back(5);
    return p;
}

// A plan with nothing to do, as a barrier of one rank.
PlanParameters blank_plan() {
    PlanParameters p = blank(0, 1, 0, 1, 1);
    p.segments = 1;
    return p;
}

using Maker = PlanParameters (*)(int32_t, int32_t, int64_t, int32_t, int64_t);

struct Mode {
    bool streaming, queued;
    int way;  // of Way; -1 copies by `streaming`
    bool registered, in_place;
};

constexpr Mode modes[] = {{false, false, -1, false, false}, {true, false, -1, false, false},
                          {false, true, -1, false, true},   {false, false, 2, true, false},
                          {false, false, 3, true, true},    {false, true, 2, false, false},
                          {false, false, 3, false, true}};

// Memory of the user's: registered or not, for 5 runs at once.
struct Memory {
    Memory(Communicator& c, bool registered, size_t count) : count(count), own(registered ? 0 : 6 * count) {
        if (registered) heap = c.endpoint.heap(1 << 20);
    }
    float* operator[](size_t which) {
        return (heap ? reinterpret_cast<float*>(heap->base()) : own.data()) + which * count;
    }
    size_t count;
    std::vector<float> own;
    std::shared_ptr<Region> heap;
};

void test_all_reduce(Maker make_plan, uint32_t size, int64_t count, uint32_t lanes, const Mode& mode) {
    Ranks ranks = make(size, lanes, slot);
    const size_t elements = static_cast<size_t>(count);
    std::vector<std::vector<float>> inputs(size);
    std::vector<float> sum(elements, 0.0f);
    std::mt19937 random(7);
    for (auto& input : inputs) {
        for (int64_t i = 0; i < count; ++i) input.push_back(static_cast<float>(random() % 1000));
        for (size_t i = 0; i < input.size(); ++i) sum[i] += input[i];
    }
    each(ranks, [&](uint32_t r) {
        Communicator& c = *ranks[r];
        c.endpoint.set_streaming_from(mode.streaming ? inline_bytes + 1 : SIZE_MAX);
        c.endpoint.set_pull(true);
        if (mode.way >= 0) c.endpoint.set_way(mode.way);
        auto plan = std::make_shared<Plan>(make_plan(static_cast<int32_t>(r), static_cast<int32_t>(size), count,
                                                     static_cast<int32_t>(lanes), segment_elements),
                                           lanes, slot);
        Memory memory(c, mode.registered, elements);
        float* input = memory[5];
        std::copy(inputs[r].begin(), inputs[r].end(), input);
        for (size_t run = 0; mode.in_place && run < 5; ++run) std::copy(input, input + elements, memory[run]);
        std::vector<std::shared_ptr<Work>> works;
        for (size_t run = 0; run < 5; ++run) {
            const float* from = mode.in_place ? memory[run] : input;
            if (mode.queued)
                works.push_back(c.start(plan, from, memory[run], patient));
            else
                c.run(plan, from, memory[run], patient);
        }
        for (auto& work : works) {
            expect(work->wait(Clock::now() + patient), "queued work ends");
            work->check();
        }
        for (size_t run = 0; run < 5; ++run)
            expect(std::equal(sum.begin(), sum.end(), memory[run]), "all_reduce gives the sum");
        // Whoever ends must not take away what a peer still reads: a run ends when all have read.
        std::fill(input, input + elements, -1.0f);
    });
    const bool was_staged = staged({size, lanes, 2, slot});
    if (mode.way >= 2) expect(!was_staged, "what is lent is not copied");
    if (mode.way < 0 && size > 1 && count > 5000) expect(was_staged, "what is not lent is copied");
}

// A plan keeps to the way that is forced, in ranks that would else try all; and its runs are timed now and then.
void test_forced(int way) {
    constexpr size_t elements = 20000;  // so long that it would be lent, where it may be, in some windows
    constexpr uint32_t slot_bytes = 64 << 10;
    Ranks ranks = make(2, 2, slot_bytes);
    each(ranks, [&](uint32_t r) {
        Communicator& c = *ranks[r];
        c.endpoint.set_pull(true);
        c.endpoint.adapt();
        auto plan =
            std::make_shared<Plan>(one_shot(static_cast<int32_t>(r), 2, elements, 2, elements / 2), 2, slot_bytes);
        if (way >= 0) plan->protocol.force(Way::of(way));
        Memory memory(c, true, elements);
        for (size_t i = 0; i < elements; ++i) memory[0][i] = static_cast<float>(r + 1);
        for (int run = 0; run < 15; ++run) c.run(plan, memory[0], memory[1], patient);
        expect(way < 0 || !plan->protocol.measures(), "what is forced tries nothing");
        expect(way < 0 || !plan->seen.median(), "of what tries nothing the 16th run is the first to be timed");
        for (int run = 0; run < 200; ++run) c.run(plan, memory[0], memory[1], patient);
        const auto median = plan->seen.median();
        expect(median && *median > 0 && *median < 60, "runs are timed");
        expect(std::all_of(memory[1], memory[2], [](float value) { return value == 3; }), "the sum is right");
    });
    const bool was_staged = staged({2, 2, 2, slot_bytes});
    if (way >= 2) expect(!was_staged, "what is forced to be lent is never copied");
    if (way < 2) expect(was_staged, "what is not forced to be lent is copied, always or in some windows");
}

// Each call is run, with the other plan's behind it.
void test_time() {
    constexpr size_t elements = 100;
    Ranks ranks = make(2, 1, slot);
    each(ranks, [&](uint32_t r) {
        Communicator& c = *ranks[r];
        auto plan = std::make_shared<Plan>(ring(static_cast<int32_t>(r), 2, elements, 1, elements), 1, slot);
        auto barrier = std::make_shared<Plan>(one_shot(static_cast<int32_t>(r), 2, 0, 1, 1), 1, slot);
        std::vector<float> data(elements, 1.0f);
        const auto start = Clock::now();
        const double apart = c.time(plan, data.data(), data.data(), 3, barrier, patient);
        const double chained = c.time(plan, data.data(), data.data(), 4, nullptr, patient);
        const double none = c.time(plan, data.data(), data.data(), 0, nullptr, patient);
        const double all = std::chrono::duration<double>(Clock::now() - start).count();
        expect(data[0] == 128, "all calls were run, none twice");
        expect(apart > 0 && chained > 0 && none < chained && apart + chained + none <= all, "it says how long it took");
    });
}

// Two threads of each rank make the same runs, one of them asynchronously: whoever finds the engine taken queues.
void test_threads() {
    constexpr size_t elements = 1000, runs = 200;
    Ranks ranks = make(2, 2, slot);
    each(ranks, [&](uint32_t r) {
        auto plan = std::make_shared<Plan>(ring(static_cast<int32_t>(r), 2, elements, 2, segment_elements), 2, slot);
        const auto many = [&](bool queued) {
            std::vector<float> input(elements, 1.0f), output(elements);
            for (size_t run = 0; run < runs; ++run) {
                if (queued) {
                    auto work = ranks[r]->start(plan, input.data(), output.data(), patient);
                    expect(work->wait(Clock::now() + patient), "queued work ends");
                } else {
                    ranks[r]->run(plan, input.data(), output.data(), patient);
                }
                expect(output == std::vector<float>(elements, 2.0f), "the sum, whoever runs the plan");
            }
        };
        std::thread other([&] { many(true); });
        many(false);
        other.join();
    });
}

// An all_gather whose blocks go straight to where they belong, in place: with lent ways, all segments in one piece.
PlanParameters gather(int32_t rank, int32_t size, int64_t count, int32_t lanes, int64_t segment) {
    PlanParameters p = blank(rank, size, count, lanes, segment);
    p.straight = true;
    p.output_count = count * size;
    p.segments = std::max<int64_t>(1, (count + segment - 1) / segment);
    for (int32_t b = 0; b < size; ++b) {
        p.table.insert(p.table.end(), {count, b == rank ? 0 : -1, b * count});
        p.names.push_back(std::to_string(b));
    }
    p.code = {0, 9, 1, size - 1};
    for (int32_t peer = 0; peer < size; ++peer)
        if (peer != rank) p.code.push_back(peer);
    p.code.insert(p.code.end(), {1, 0, rank, 0, 0});  // SEND to all
    int32_t reg = 0;
    for (int32_t peer = 0; peer < size; ++peer)
        if (peer != rank) p.code.insert(p.code.end(), {1, 9, peer, 1, peer});  // RECV
    p.code.insert(p.code.end(), {3, 1, rank, 0, 0, 0, rank, 0, 0});            // COPY
    for (int32_t peer = 0; peer < size; ++peer)
        if (peer != rank) p.code.insert(p.code.end(), {3, 1, peer, 0, 0, 3, peer, reg++, 0});
    p.code.push_back(5);
    return p;
}

// Ranks need not agree on the way.
void test_whole_blocks(uint32_t size, int64_t count, uint32_t lanes, bool mixed, bool registered) {
    Ranks ranks = make(size, lanes, slot);
    const size_t elements = static_cast<size_t>(count);
    each(ranks, [&](uint32_t r) {
        Communicator& c = *ranks[r];
        c.endpoint.set_pull(true);
        c.endpoint.set_way(mixed && r % 2 ? 0 : 2 + r % 2);
        auto plan = std::make_shared<Plan>(gather(static_cast<int32_t>(r), static_cast<int32_t>(size), count,
                                                  static_cast<int32_t>(lanes), segment_elements),
                                           lanes, slot);
        Memory input(c, registered, elements);
        std::vector<float> output(elements * size);
        for (int run = 0; run < 5; ++run) {
            for (size_t i = 0; i < elements; ++i) input[0][i] = static_cast<float>(r * 1000 + run + i % 7);
            c.run(plan, input[0], output.data(), patient);
            bool right = true;
            for (size_t i = 0; i < output.size(); ++i)
                right &= output[i] == static_cast<float>(i / elements * 1000 + run + i % elements % 7);
            expect(right, "all_gather gives all parts");
        }
    });
    if (!mixed) expect(!staged({size, lanes, 2, slot}), "whole blocks are not copied");
}

void test_messages() {
    Ranks ranks = make(3, 1, 128);
    each(ranks, [&](uint32_t r) {
        Communicator& c = *ranks[r];
        const uint32_t next = (r + 1) % 3, last = (r + 2) % 3;
        std::vector<std::shared_ptr<Work>> works;
        std::vector<std::vector<uint8_t>> sent, received;
        const size_t sizes[] = {0, 1, 288, 289, inline_bytes + 1, 1000, 5000};
        for (size_t i = 0; i < 7; ++i) {
            sent.emplace_back(sizes[i], static_cast<uint8_t>(r * 7 + i));
            received.emplace_back(sizes[i]);
        }
        for (size_t i = 0; i < 7; ++i)
            works.push_back(c.post_send(next, static_cast<int64_t>(i), sent[i].data(), sizes[i], patient));
        for (size_t i = 7; i-- > 0;)  // in another order than sent: by tag
            works.push_back(c.post_receive(i % 2 ? any_source : static_cast<int32_t>(last), static_cast<int64_t>(i),
                                           received[i].data(), sizes[i], patient));
        ProgressThread::submit(ranks[r]);
        for (auto& work : works) expect(work->wait(Clock::now() + patient), "messages arrive");
        for (size_t i = 0; i < 7; ++i)
            expect(received[i] == std::vector<uint8_t>(sizes[i], static_cast<uint8_t>(last * 7 + i)),
                   "the right bytes");
    });
}

Kind kind_of(const std::function<void()>& call) {
    try {
        call();
    } catch (const Failure& failure) {
        return failure.kind;
    }
    return static_cast<Kind>(0);
}

void test_failures() {
    {
        Ranks ranks = make(3, 1, slot);
        each(ranks, [&](uint32_t r) {
            PlanParameters p = ring(static_cast<int32_t>(r), 3, 1000, 1, segment_elements);
            if (r == 1) p.signature = 78;
            auto plan = std::make_shared<Plan>(p, 1, slot);
            std::vector<float> in(1000), out(1000);
            expect(kind_of([&] { ranks[r]->run(plan, in.data(), out.data(), patient); }) == Kind::mismatch, "mismatch");
        });
    }
    {
        Ranks ranks = make(3, 1, slot);
        each(ranks, [&](uint32_t r) {
            auto plan = std::make_shared<Plan>(ring(static_cast<int32_t>(r), 3, 1000, 1, segment_elements), 1, slot);
            std::vector<float> in(1000), out(1000);
            if (r == 2) return;
            expect(kind_of([&] { ranks[r]->run(plan, in.data(), out.data(), std::chrono::milliseconds(100)); }) ==
                       Kind::deadline,
                   "deadline");
        });
    }
    {
        Ranks ranks = make(2, 1, slot);
        each(ranks, [&](uint32_t r) {
            auto plan = std::make_shared<Plan>(ring(static_cast<int32_t>(r), 2, 1000, 1, segment_elements), 1, slot);
            std::vector<float> in(1000), out(1000);
            if (r == 0)
                ranks[r]->abort(static_cast<uint32_t>(Kind::aborted), "enough");
            else
                expect(kind_of([&] { ranks[r]->run(plan, in.data(), out.data(), patient); }) == Kind::aborted, "abort");
        });
    }
    {
        Ranks ranks = make(2, 1, slot);
        auto plan = std::make_shared<Plan>(ring(1, 2, 1000, 1, segment_elements), 1, slot);
        std::vector<float> in(1000), out(1000);
        ranks[0]->close();
        expect(kind_of([&] { ranks[1]->run(plan, in.data(), out.data(), patient); }) == Kind::peer_lost, "closed peer");
    }
}

// Whatever the code says, the parser refuses it or makes a plan that stays inside its buffers: AddressSanitizer looks
// on while the accepted ones run as far as they get alone.
void test_broken_plans() {
    std::mt19937 random(11);
    int refused = 0, run = 0;
    Ranks ranks = make(3, 1, slot);
    for (int i = 0; i < 20000; ++i) {
        PlanParameters p = i % 2 ? ring(0, 3, 1000, 1, segment_elements) : one_shot(0, 3, 1000, 1, segment_elements);
        for (int change = 0; change < 3; ++change) {
            const size_t at = random() % p.code.size();
            p.code[at] = random() % 3 ? static_cast<int32_t>(random() % 12) - 2 : static_cast<int32_t>(random());
        }
        p.straight = random() % 4 == 0;
        if (random() % 4 == 0) p.code.resize(random() % p.code.size());
        if (random() % 4 == 0)
            p.table[random() % p.table.size()] = static_cast<int64_t>(random()) * (random() % 2 ? 1 : -1);
        try {
            const Plan plan(p, 1, slot);
            if (i % 50 == 0) ranks = make(3, 1, slot);
            std::vector<float> in(1000), out(1000);
            ranks[0]->endpoint.set_pull(true);
            ranks[0]->endpoint.set_way(i % 4);
            Execution execution(ranks[0]->endpoint);
            execution.start(plan, in.data(), out.data());
            ++run;
            for (int tries = 0; tries < 3; ++tries) execution.progress();
        } catch (const Failure& failure) {
            if (failure.kind == Kind::argument) ++refused;
        }
    }
    expect(refused > 10000, "most random changes are refused");
    expect(run > 100, "some are accepted, and run");
}

}  // namespace

int main() {
    for (Maker maker : {Maker(ring), Maker(one_shot)})
        for (uint32_t size : {1u, 2u, 3u, 4u})
            for (int64_t count : {0, 1, 100, 5001})
                for (uint32_t lanes : {1u, 2u})
                    for (const Mode& mode : modes) {
                        // This one_shot lends what its step changes if that lies in place.
                        if (maker == Maker(one_shot) && (size == 1 || (mode.in_place && mode.way >= 2))) continue;
                        test_all_reduce(maker, size, count, lanes, mode);
                    }
    {
        Ranks ranks = make(1, 1, slot);
        ranks[0]->run(std::make_shared<Plan>(blank_plan(), 1, slot), nullptr, nullptr, patient);
    }
    for (uint32_t size : {2u, 3u, 4u})
        for (int64_t count : {1, 100, 5001})
            for (uint32_t lanes : {1u, 2u, 3u})
                for (bool mixed : {false, true})
                    for (bool registered : {false, true}) test_whole_blocks(size, count, lanes, mixed, registered);
    for (int way = -1; way < Way::count; ++way) test_forced(way);
    test_time();
    test_threads();
    test_messages();
    test_failures();
    test_broken_plans();
    if (failures == 0) std::puts("engine: ok");
    return failures != 0;
}
