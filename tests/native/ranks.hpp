// Ranks as threads, and a plan for them: what the tests of the native core share.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "communicator.hpp"

namespace abccl {
inline std::atomic<int> failures{0};

inline void expect(bool condition, const char* what) {
    if (condition) return;
    ++failures;
    std::fprintf(stderr, "failed: %s\n", what);
}

using Ranks = std::vector<std::shared_ptr<Communicator>>;

// Slots and segments that are longer than what travels with a descriptor, so that messages lie in the arena or are
// lent.
constexpr uint32_t slot = 1024;
constexpr int64_t segment_elements = 200;
static_assert(segment_elements * sizeof(float) > 2 * inline_bytes, "segments are not inlined");

inline std::vector<std::shared_ptr<Region>> regions;  // of the ranks made last

inline Ranks make(uint32_t size, uint32_t lanes, uint32_t slot_bytes) {
    const Geometry geometry{size, lanes, 2, slot_bytes};
    Ranks ranks;
    regions.clear();
    for (uint32_t r = 0; r < size; ++r) {
        regions.push_back(Region::create(geometry.bytes()));
        ranks.push_back(std::make_shared<Communicator>(r, geometry, regions[r]));
        ranks[r]->endpoint.announce(r + 7);
    }
    for (uint32_t r = 0; r < size; ++r)
        for (uint32_t peer = 0; peer < size; ++peer)
            if (peer != r)
                ranks[r]->endpoint.attach(peer, Region::attach(getpid(), regions[peer]->fd(), geometry.bytes()),
                                          peer + 7);
    for (auto& rank : ranks) rank->endpoint.set_patience({20, 20});
    return ranks;
}

inline void each(Ranks& ranks, const std::function<void(uint32_t)>& body) {
    std::vector<std::thread> threads;
    for (uint32_t r = 0; r < ranks.size(); ++r) threads.emplace_back([&, r] { body(r); });
    for (auto& thread : threads) thread.join();
}

constexpr Timeout patient = std::chrono::seconds(60);

inline PlanParameters blank(int32_t rank, int32_t size, int64_t count, int32_t lanes, int64_t segment) {
    PlanParameters p;
    p.rank = rank;
    p.size = size;
    p.input_count = p.output_count = count;
    p.scratch = 0;
    p.registers = size;
    p.lanes = lanes;
    p.type = Type::f32;
    p.op = Op::sum;
    p.factor = 1;
    p.signature = 77;
    p.text = "test";
    p.segment = segment;
    return p;
}

// Ring all_reduce, as algorithms/plan.py lowers it.
inline PlanParameters ring(int32_t rank, int32_t size, int64_t count, int32_t lanes, int64_t segment) {
    PlanParameters p = blank(rank, size, count, lanes, segment);
    const int64_t chunk = (count + size - 1) / size;
    for (int32_t b = 0; b < size; ++b) {
        const int64_t start = std::min<int64_t>(b * chunk, count), end = std::min(start + chunk, count);
        p.table.insert(p.table.end(), {end - start, start, start});
        p.names.push_back(std::to_string(b));
    }
    p.segments = std::max<int64_t>(1, (chunk + segment - 1) / segment);
    const int32_t left = (rank + size - 1) % size, right = (rank + 1) % size;
    if (size == 1) p.code = {3, 1, 0, 0, 0, 0, 0, 0, 0};
    for (int32_t hop = 1; hop < size; ++hop) {
        const int32_t out = (rank - hop + 2 * size) % size, in = (rank - hop - 1 + 2 * size) % size;
        p.code.insert(p.code.end(), {0, out, 1, 1, right, 1, hop > 1, out, 0, 0});   // SEND
        p.code.insert(p.code.end(), {1, in, left, 1, in});                           // RECV
        p.code.insert(p.code.end(), {2, 1, in, 0, 0, 2, 0, in, 0, 0, 3, in, 0, 0});  // FOLD
        p.code.push_back(5);
    }
    for (int32_t hop = 0; hop < size - 1; ++hop) {
        const int32_t out = (rank - hop + size) % size, in = (rank - hop - 1 + 2 * size) % size;
        p.code.insert(p.code.end(), {0, out, 1, 1, right, 1, 1, out, 0, 0});
        p.code.insert(p.code.end(), {6, 1, hop});  // RECLAIM what sent this block before
        p.code.insert(p.code.end(), {1, in, left, 1, in});
        p.code.insert(p.code.end(), {3, 1, in, 0, 0, 3, in, 0, 0});  // COPY
        p.code.push_back(5);
    }
    return p;
}

}  // namespace abccl
