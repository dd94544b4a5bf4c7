// Checks that a plan finds the fastest way, follows when another becomes the fastest, and is not misled by a slow run.
#include <cstdio>

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

}  // namespace

int main() {
    test_finds_the_fastest();
    test_follows();
    test_is_not_misled();
    test_stays_within();
    if (failures == 0) std::puts("protocol: ok");
    return failures != 0;
}
