// Checks the event engine of the simulator: times worked out by hand, and codes that are none.
#include <cmath>
#include <cstdio>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "events.hpp"

using namespace abccl::simulator;

namespace {

int failures = 0;

void check(bool ok, const std::string& what) {
    if (!ok && ++failures <= 20) std::printf("FAILED: %s\n", what.c_str());
}

void check_near(double found, double wanted, const std::string& what) {
    check(std::abs(found - wanted) <= 1e-12 * std::abs(wanted), what + ": " + std::to_string(found));
}

using Code = std::vector<int32_t>;

// The numbers of algorithms/plan.py, for messages of one block.
Code send(int32_t peer) { return {0, 7, 0, 1, peer, 1, 0, 0, 0, 0}; }
Code receive(int32_t peer) {
    return {1, 7, peer, 1, 0, 2, 1, 0, 0, 0, 1, 3, 0, 0, 0, 5};
}  // a fold of input and message

Code operator+(Code first, const Code& second) {
    first.insert(first.end(), second.begin(), second.end());
    return first;
}

const Costs free_of_cost{0, 0, 0, 0, 0, 0, 0, false, 0, 0, 0, 0};

Engine engine(const std::vector<Code>& codes, Level level, Costs costs, Load load, bool record = false) {
    const auto size = static_cast<int64_t>(codes.size());
    Engine made({size, size, false}, {level}, costs, load, true, record);
    for (const auto& code : codes) made.add(code.data(), code.size());
    return made;
}

// alpha 1, overhead 0.25, beta 0.5 per byte, messages of 4 bytes, a fold of 2 per byte.
const Level line{0, 1, 0.25, 0.5, 1, 0, 0, false};
const Load four_bytes{4, 1, 1, 1};

void test_one_message() {
    Costs costs = free_of_cost;
    costs.launch = 3;
    costs.send = 0.125;
    costs.fold = 2;
    Engine one = engine({send(1), receive(0)}, line, costs, four_bytes);
    check(one.run(1000), "two ranks end");
    check_near(one.ends()[0], 3 + 0.5 + 0.25, "the sender's end");
    check_near(one.seconds(), 3 + 0.5 + 0.25 + 1 + 2 + 0.25 + 8, "the receiver's end");
    check(one.messages() == 1 && one.problem().empty() && one.progress() == 1, "one message, and all done");
}

void test_links_are_shared_in_order() {
    // Ranks 0 and 1 send to 2; its one link in carries a byte in a second, and so do theirs out.
    const Level shared{0, 1, 0, 0.5, 1, 1, 1, false};
    const std::vector<Code> codes{send(2), send(2), receive(1) + receive(0)};
    Engine one = engine(codes, shared, free_of_cost, four_bytes, true);
    check(one.run(1000), "three ranks end");
    check_near(one.seconds(), 1 + 8, "the second message waits for the first");
    check_near(one.busiest_links()[0], 8, "the link in is busy all the time");
    double first = 0, last = 0;
    for (const Slice& slice : one.slices())
        if (slice.kind == Slice::message) (slice.rank == 0 ? first : last) = slice.end;
    check(first == 5 && last == 9, "rank 0 comes first");

    Level two = shared;
    two.links = 2;
    Engine both = engine(codes, two, free_of_cost, four_bytes);
    both.run(1000);
    check_near(both.seconds(), 1 + 4, "two links carry two messages");
}

void test_slots() {
    // Two messages where there is room for one: the second goes when the first has been released, a latency later.
    Costs costs = free_of_cost;
    costs.slots = 1;
    costs.fold = 2;
    Engine one = engine({send(1) + send(1), receive(0) + receive(0)}, {0, 1, 0, 0, 1, 0, 0, false}, costs, four_bytes);
    check(one.run(1000), "two ranks end");
    check_near(one.ends()[0], 1 + 8 + 1, "the sender waits");
    check_near(one.seconds(), 1 + 8 + 1 + 1 + 8, "and so does the receiver");
}

void test_cores() {
    // Two pairs; all four ranks share a core, on which a fold takes 8 s.
    Costs costs = free_of_cost;
    costs.fold = 2;
    costs.crowd = 4;
    costs.cores = 1;
    Engine one = engine({send(1), receive(0), send(3), receive(2)}, {0, 1, 0, 0, 1, 0, 0, false}, costs, four_bytes);
    check(one.run(1000), "four ranks end");
    check_near(one.seconds(), 1 + 8 + 8, "one fold after the other");
}

void test_lanes_and_segments() {
    Costs costs = free_of_cost;
    costs.fold = 2;
    Load load{1, 4, 2, 1};
    Engine all = engine({send(1), receive(0)}, {0, 1, 0, 0, 1, 0, 0, false}, costs, load);
    all.run(1000);
    check_near(all.seconds(), 1 + 2 * 2, "two lanes at once, two segments each");
    costs.processors = 1;
    Engine one = engine({send(1), receive(0)}, {0, 1, 0, 0, 1, 0, 0, false}, costs, load);
    one.run(1000);
    check_near(one.seconds(), 1 + 4 * 2, "one processor for all lanes");
}

void test_stuck() {
    Engine one = engine({receive(1), receive(0)}, line, free_of_cost, four_bytes);
    check(one.run(1000), "nothing can happen");
    check(one.problem() == "rank 0 waits for rank 1 to send", one.problem());
    Engine other = engine({send(1) + send(1), receive(0)}, line, free_of_cost, four_bytes);
    check(other.run(1000) && other.problem() == "rank 1 does not take a message that was sent to it", other.problem());
    const Code two_blocks{1, 7, 0, 2, 0, 1, 5};
    Engine third = engine({send(1), two_blocks}, line, free_of_cost, four_bytes);
    check(third.run(1000) && third.problem() == "rank 1 wants 2 blocks from rank 0, which sent 1", third.problem());
}

// Messages of a channel stay in order, also where their heads are there at the same time, and none overtakes another.
void test_order() {
    const Level links{0, 1, 0, 0, 1, 16, 1, false};
    const Code three_blocks{0, 7, 0, 1, 1, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0};
    const Code take_three{1, 7, 0, 3, 0, 1, 2, 5};
    const Code take_one{1, 7, 0, 1, 0, 5};
    Load load{1, 4, 1, 1};
    Engine one =
        engine({send(1) + three_blocks + send(1), take_one + take_three + take_one}, links, free_of_cost, load);
    check(one.run(1000) && one.problem().empty(), one.problem());
    Engine two = engine({three_blocks + send(1), take_three + take_one}, links, free_of_cost, {1, 1, 1, 1}, true);
    two.run(1000);
    for (const Slice& slice : two.slices())
        if (slice.kind == Slice::message) check_near(slice.end, 1 + 3, "the short message comes after the long one");
}

// Two nodes of two ranks in two racks: what goes from rack to rack passes the slow link of the node, too.
void test_through() {
    const auto levels = [](bool through) {
        return std::vector<Level>{
            {2, 1, 0, 0, 1, 0, 0, false}, {4, 1, 0, 0, 2, 1, 3, through}, {0, 1, 0, 0, 4, 1, 2, false}};
    };
    for (const bool through : {false, true}) {
        Engine one({8, 8, false}, levels(through), free_of_cost, four_bytes, true, false);
        const std::vector<Code> codes{send(4), {}, {}, {}, receive(0), {}, {}, {}};
        for (const auto& code : codes) one.add(code.data(), code.size());
        one.run(1000);
        check_near(one.seconds(), 1 + 4 * (through ? 3 : 2), "the slowest link on the way");
        check_near(one.busiest_links()[1], through ? 12 : 0, "the node's link");
    }
}

// Four lanes and two processors: a fold takes 8 s, and the third lane waits for the first that is free.
void test_processors() {
    Costs costs = free_of_cost;
    costs.fold = 2;
    costs.processors = 2;
    Engine one = engine({send(1), receive(0)}, {0, 1, 0, 0, 1, 0, 0, false}, costs, {4, 4, 4, 1});
    one.run(1000);
    check_near(one.seconds(), 1 + 2 * 8, "two folds each");
    costs.processors = 2147483647;
    Engine all = engine({send(1), receive(0)}, {0, 1, 0, 0, 1, 0, 0, false}, costs, {4, 4, 4, 1});
    all.run(1000);
    check_near(all.seconds(), 1 + 8, "one fold each");
}

// Of two at the same time at a link, who is first does not depend on their numbers but on their places in the tile.
void test_ties() {
    const Level shared{0, 0, 0, 0, 4, 1, 1, false};
    for (const int64_t ties : {4, 2}) {
        // Ranks 1 and 2 send at once; by places in tiles of two, 2 is 0 and comes first.
        Engine one({4, 4, false}, {shared}, free_of_cost, {4, 1, 1, ties}, true, true);
        const std::vector<Code> codes{{}, send(3), send(3), receive(1) + receive(2)};
        for (const auto& code : codes) one.add(code.data(), code.size());
        one.run(1000);
        for (const Slice& slice : one.slices())
            if (slice.kind == Slice::message)
                check_near(slice.start, (slice.rank == 1) == (ties == 4) ? 0 : 4, "ties of " + std::to_string(ties));
    }
}

// Codes that are cut or changed are refused or run; a sanitizer sees what they read.
void test_wrong_codes() {
    std::mt19937 random(1);
    const Code right = send(1) + receive(1) + Code{3, 1, 0, 0, 0, 0, 0, 0, 0, 6, 1, 0, 4, 0, 0, 0, 0, 1, 0, 0, 0};
    int refused = 0;
    for (int trial = 0; trial < 20000; ++trial) {
        Code wrong = right;
        for (unsigned change = random() % 3 + 1; change; --change) {
            const int32_t values[] = {-1, 0, 1, 2, 3, 4, 5, 6, 7, 1 << 30, -(1 << 30), 2147483647};
            wrong[random() % wrong.size()] = values[random() % 12];
        }
        wrong.resize(random() % 4 ? wrong.size() : random() % wrong.size());
        try {
            Costs costs = free_of_cost;
            costs.slots = static_cast<int32_t>(random() % 2);
            engine({wrong, send(0) + receive(0)}, line, costs, {4, 3, 2, 1}).run(10000);
        } catch (const std::invalid_argument&) {
            ++refused;
        }
    }
    check(refused > 5000, "wrong codes are refused: " + std::to_string(refused));
}

void test_wrong_numbers() {
    const auto refused = [](auto change) {
        Level level = line;
        Costs costs = free_of_cost;
        Load load = four_bytes;
        Symmetry symmetry{4, 2, false};
        change(level, costs, load, symmetry);
        try {
            Engine(symmetry, {level}, costs, load, true, false);
        } catch (const std::invalid_argument&) {
            return true;
        }
        return false;
    };
    check(!refused([](auto&, auto&, auto&, auto&) {}), "right numbers are taken");
    check(refused([](auto& level, auto&, auto&, auto&) { level.alpha = -1; }), "a negative alpha");
    check(refused([](auto& level, auto&, auto&, auto&) { level.per = 0; }), "links of nobody");
    check(refused([](auto&, auto& costs, auto&, auto&) { costs.fold = std::nan(""); }), "a gamma that is no number");
    check(refused([](auto&, auto& costs, auto&, auto&) { costs.crowd = 2; }), "a crowd without cores");
    check(refused([](auto&, auto&, auto& load, auto&) { load.lanes = 0; }), "no lane");
    check(refused([](auto&, auto&, auto&, auto& symmetry) { symmetry.period = 3; }), "a period that does not divide");
    check(refused([](auto&, auto&, auto&, auto& symmetry) { symmetry = {6, 2, true}; }), "a mirror of six");
}

}  // namespace

int main() {
    test_one_message();
    test_links_are_shared_in_order();
    test_slots();
    test_cores();
    test_lanes_and_segments();
    test_stuck();
    test_order();
    test_through();
    test_processors();
    test_ties();
    test_wrong_codes();
    test_wrong_numbers();
    std::printf(failures ? "%d failures\n" : "ok\n", failures);
    return failures != 0;
}
