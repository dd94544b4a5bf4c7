// Checks that a plan finds the fastest way, follows when another becomes the fastest, and is not misled by a slow run.
#include <algorithm>
#include <cstdio>
#include <iterator>
#include <random>

#include "../../transports/native/protocol.hpp"

using namespace abccl;

namespace {

int failures = 0;

void expect(bool condition, const char* what) {
    if (condition) return;
    ++failures;
    std::fprintf(stderr, "failed: %s\n", what);
}

constexpr size_t arena = 2 << 20;

struct Plan {
    Protocol protocol;
    double costs[Way::count];
    size_t run_bytes;
    bool can_lend = true;
    int cold = 0;  // runs of a way before it takes what it costs
    int last = -1, same = 0;
    int looks = 0;

    int run(double disturbance = 1) {
        const int way = protocol.next(Way::of(0), can_lend, run_bytes, arena).number();
        same = way == last ? same + 1 : 0;
        last = way;
        if (protocol.measures()) {
            ++looks;
            protocol.took(costs[way] * disturbance * (same < cold ? 3 : 1));
        }
        return way;
    }
    // How many of so many runs went `way`.
    int count(int way, int runs) {
        int found = 0;
        for (int i = 0; i < runs; ++i) found += run() == way;
        return found;
    }
};

void test_finds_the_fastest() {
    for (size_t run_bytes : {size_t{256}, size_t{8} << 10, size_t{1} << 20, size_t{32} << 20})
        for (int fastest = 0; fastest < Way::count; ++fastest) {
            Plan plan{{}, {4, 4, 4, 4}, run_bytes};
            plan.costs[fastest] = 2;
            plan.cold = 1;
            plan.count(0, 5 * 256 + 1);
            const int runs = 64 * 256;
            expect(plan.count(fastest, runs) > runs * 9 / 10, "most runs go the fastest way");
            expect(plan.looks < runs || run_bytes > arena, "few short runs are timed");
        }
}

void test_follows() {
    Plan plan{{}, {1, 2, 3, 4}, size_t{1} << 20};
    plan.count(0, 200);
    expect(plan.count(0, 100) > 90, "it starts with the fastest");
    plan.costs[0] = 8;  // at once: what it takes is known
    plan.count(0, 20);
    expect(plan.count(1, 100) > 90, "it leaves a way that has become slow");
    plan.costs[3] = 0.5;  // that another has become fast is found by trying it
    plan.count(0, 5 * 32 * 10);
    expect(plan.count(3, 100) > 90, "it finds a way that has become fast");
}

void test_is_not_misled() {
    for (size_t run_bytes : {size_t{1} << 20, size_t{64} << 20}) {
        Plan plan{{}, {2, 1, 3, 3}, run_bytes};
        plan.count(0, 200);
        int others = 0;
        for (int i = 0; i < 1000; ++i) others += plan.run(i % 7 == 0 ? 100 : 1) != 1;
        expect(others < 100, "single slow runs do not count");
    }
}

void test_stays_within() {
    Plan plan{{}, {4, 5, 1, 2}, size_t{32} << 20};
    plan.count(0, 100);
    expect(plan.count(2, 100) > 90, "it lends");
    plan.can_lend = false;
    for (int i = 0; i < 1000; ++i) expect(plan.run() < 2, "it forgets what is no longer possible");
}

// The first windows: one that touches the memory, then four for each way.
constexpr int first_runs(int window) { return 2 + 16 * window; }

void test_begins_as_expected() {
    constexpr int window = 6;  // for runs of half an arena
    for (int expected = 0; expected < Way::count; ++expected) {
        Plan plan{{}, {4, 4, 4, 4}, arena / 2};
        plan.costs[expected] = 2;
        plan.protocol.expect(Way::of(expected));
        for (int i = 0; i < 2 + 3 * window; ++i) expect(plan.run() == expected, "it begins with what is expected");
        int runs[Way::count] = {};
        for (int i = 0; i < first_runs(window) - 2 - 3 * window; ++i) ++runs[plan.run()];
        for (int way = 0; way < Way::count; ++way) {
            expect(runs[way] >= window, "it tries every way soon");
            expect(way == expected || runs[way] == window, "it tries the others in every fourth window only");
        }
        expect(plan.count(expected, 100) > 90, "it stays with what was expected, and is the fastest");
    }
}

void test_expects_in_vain() {
    for (int expected = 0; expected < Way::count; ++expected)
        for (int fastest = 0; fastest < Way::count; ++fastest) {
            Plan plan{{}, {4, 4, 4, 4}, arena / 2};
            plan.costs[fastest] = 2;
            plan.protocol.expect(Way::of(expected));
            plan.count(0, first_runs(6));
            expect(plan.count(fastest, 100) > 90, "it ends with the fastest, whatever was expected");
        }
    Plan plan{{}, {2, 4, 1, 1}, arena / 2};
    plan.can_lend = false;
    plan.protocol.expect(Way::of(3));
    expect(plan.run() == 0, "it begins as it would if what is expected is not possible");
    for (int i = 0; i < 1000; ++i) expect(plan.run() < 2, "it does nothing that is not possible");
    plan.can_lend = true;
    expect(plan.run() == 3, "what was expected holds again when it has become possible");
}

void test_force() {
    Protocol protocol;
    expect(!protocol.forced(), "nothing is forced at first");
    for (int way = 0; way < Way::count; ++way) {
        protocol.force(Way::of(way));
        expect(protocol.forced() && protocol.forced()->number() == way, "what is forced is known");
    }
    expect(!protocol.measures(), "nothing is measured before a run");
}

void test_at_best() {
    Plan plan{{}, {1, 2, 2, 2}, arena / 2};
    int trials = 0, others = 0;
    for (int i = 0; i < 32 * 6 * 10; ++i) {
        const int way = plan.run();
        if (i < 200) continue;
        trials += !plan.protocol.at_best();
        others += way != 0;
    }
    expect(others > 0 && trials == others, "a trial is no run of the best way");
}

void test_seen() {
    Seen seen;
    expect(!seen.median(), "no median before a run was timed");
    int timed = 0, longest = 0, last = 0;
    for (int run = 1; run <= 1600; ++run) {
        if (!seen.samples()) continue;
        ++timed;
        if (timed > 1) longest = std::max(longest, run - last);
        last = run;
        expect(timed > 1 || run == 16, "the first to be timed is the 16th");
    }
    expect(timed == 100 && longest == 16, "one run in 16 is timed");
    expect(!seen.median(), "no median before a time is told");
    seen.add(5);
    expect(seen.median() == 5.0, "the median of one");
    for (double seconds : {1.0, 9.0, 2.0, 8.0}) seen.add(seconds);
    expect(seen.median() == 5.0, "the median of five");
    for (int i = 0; i < 4; ++i) seen.add(100);
    expect(seen.median() == 9.0, "the median of nine");
    for (int i = 0; i < 5; ++i) seen.add(0.5);
    expect(seen.median() == 0.5, "only the last nine count");
    std::mt19937 random(5);
    double last_nine[] = {1, 2, 3, 4, 5, 6, 7, 8, 9};
    for (int i = 0; i < 100; ++i) {
        std::shuffle(std::begin(last_nine), std::end(last_nine), random);
        for (double seconds : last_nine) seen.add(seconds);
        expect(seen.median() == 5.0, "the median in whatever order");
    }
}

}  // namespace

int main() {
    test_finds_the_fastest();
    test_follows();
    test_is_not_misled();
    test_stays_within();
    test_begins_as_expected();
    test_expects_in_vain();
    test_force();
    test_at_best();
    test_seen();
    if (failures == 0) std::puts("protocol: ok");
    return failures != 0;
}
