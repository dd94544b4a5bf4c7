// Plans whose messages leave the host, with ranks as threads: two hosts, and mailboxes between them.
#include <deque>
#include <map>
#include <mutex>
#include <random>
#include <tuple>

#include "failure.hpp"
#include "ranks.hpp"
#include "remote.hpp"

using namespace abccl;

namespace {

constexpr size_t header = 64;

// From, to, lane. A message that was sent waits for its receive, as long as it takes.
class Network {
  public:
    void send(uint32_t from, uint32_t to, const RemoteMessage& message) {
        std::lock_guard<std::mutex> lock(mutex_);
        mail_[{from, to, message.lane}].emplace_back(message.data, message.data + message.bytes);
    }
    bool receive(uint32_t from, uint32_t to, const RemoteMessage& message) {
        std::lock_guard<std::mutex> lock(mutex_);
        auto& box = mail_[{from, to, message.lane}];
        if (box.empty()) return false;
        expect(box.front().size() == message.bytes, "a message is as long as it was expected to be");
        std::copy(box.front().begin(), box.front().end(), message.data);
        box.pop_front();
        return true;
    }

  private:
    std::mutex mutex_;
    std::map<std::tuple<uint32_t, uint32_t, uint32_t>, std::deque<std::vector<uint8_t>>> mail_;
};

struct Layout {
    std::vector<std::vector<uint32_t>> hosts;

    // All ranks as a host's core numbers them: its own first.
    std::vector<uint32_t> order(uint32_t host) const {
        std::vector<uint32_t> found = hosts[host];
        for (const auto& other : hosts)
            if (other != hosts[host]) found.insert(found.end(), other.begin(), other.end());
        return found;
    }
};

// The peers of a ring's code, and the rank itself, by the host's numbers.
PlanParameters divided(PlanParameters p, const std::vector<uint32_t>& order, uint32_t near) {
    const auto number = [&](int32_t rank) {
        return static_cast<int32_t>(std::find(order.begin(), order.end(), rank) - order.begin());
    };
    for (size_t at = 0; at < p.code.size();) {
        switch (static_cast<Instruction>(p.code[at])) {
            case Instruction::send:
                p.code[at + 4] = number(p.code[at + 4]);
                if (p.code[at + 4] >= static_cast<int32_t>(near)) p.code[at + 2] = 0;  // lends nothing
                at += 10;
                break;
            case Instruction::recv:
                p.code[at + 2] = number(p.code[at + 2]);
                at += 5;
                break;
            case Instruction::fold:
                at += 14;
                break;
            case Instruction::copy:
                at += 9;
                break;
            case Instruction::reclaim:
                at += 3;
                break;
            default:
                at += 1;
        }
    }
    p.rank = number(p.rank);
    p.remotes = p.size - static_cast<int32_t>(near);
    p.size = static_cast<int32_t>(near);
    return p;
}

void drive(Execution& execution, RemoteQueue& remote, Endpoint& endpoint, Network& network, uint32_t rank,
           const std::vector<uint32_t>& order) {
    std::vector<RemoteMessage> awaited;
    for (;;) {
        const Outcome outcome = execution.progress();
        if (outcome == Outcome::done) return;
        endpoint.check_abort();
        for (const RemoteMessage& message : remote.take()) {
            if (!message.sends) {
                awaited.push_back(message);
                continue;
            }
            network.send(rank, order[message.peer], message);
            remote.complete(message.id);
        }
        const size_t before = awaited.size();
        awaited.erase(std::remove_if(awaited.begin(), awaited.end(),
                                     [&](const RemoteMessage& message) {
                                         if (!network.receive(order[message.peer], rank, message)) return false;
                                         remote.complete(message.id);
                                         return true;
                                     }),
                      awaited.end());
        if (outcome == Outcome::blocked && awaited.size() == before) std::this_thread::yield();
    }
}

void test_all_reduce(const Layout& layout, int64_t count, uint32_t lanes) {
    const uint32_t size = static_cast<uint32_t>(layout.order(0).size());
    Network network;
    std::vector<std::thread> threads;
    std::vector<Ranks> hosts;
    std::vector<std::vector<float>> values(size);
    for (uint32_t r = 0; r < size; ++r)
        for (int64_t i = 0; i < count; ++i) values[r].push_back(static_cast<float>((i * 7 + r * 3) % 5));
    for (const auto& members : layout.hosts) hosts.push_back(make(static_cast<uint32_t>(members.size()), lanes, slot));
    for (uint32_t h = 0; h < hosts.size(); ++h)
        for (uint32_t i = 0; i < hosts[h].size(); ++i)
            threads.emplace_back([&, h, i] {
                const uint32_t rank = layout.hosts[h][i], near = static_cast<uint32_t>(hosts[h].size());
                const std::vector<uint32_t> order = layout.order(h);
                PlanParameters p = ring(static_cast<int32_t>(rank), static_cast<int32_t>(size), count,
                                        static_cast<int32_t>(lanes), segment_elements);
                const Plan plan(divided(std::move(p), order, near), lanes, slot);
                RemoteQueue remote(header);
                Endpoint& endpoint = hosts[h][i]->endpoint;
                Execution execution(endpoint, &remote);
                for (int round = 0; round < 3; ++round) {
                    std::vector<float> out(static_cast<size_t>(count), -1);
                    execution.start(plan, values[rank].data(), out.data());
                    drive(execution, remote, endpoint, network, rank, order);
                    bool right = true;
                    for (int64_t at = 0; at < count; ++at) {
                        float sum = 0;
                        for (uint32_t r = 0; r < size; ++r) sum += values[r][static_cast<size_t>(at)];
                        right &= out[static_cast<size_t>(at)] == sum;
                    }
                    expect(right, "all_reduce over hosts");
                }
            });
    for (auto& thread : threads) thread.join();
}

// What a random change leaves of a plan is refused, or runs without touching memory that is not its own.
void test_broken_plans() {
    std::mt19937 random(13);
    const std::vector<uint32_t> order = {0, 1, 2, 3};
    int refused = 0, run = 0;
    for (int i = 0; i < 5000; ++i) {
        PlanParameters p = divided(ring(0, 4, 1000, 1, segment_elements), order, 2);
        for (int change = 0; change < 2; ++change)
            p.code[random() % p.code.size()] = static_cast<int32_t>(random() % 12) - 2;
        if (random() % 4 == 0) p.remotes = static_cast<int32_t>(random() % 4) - 1;
        try {
            const Plan plan(p, 1, slot);
            Ranks ranks = make(2, 1, slot);
            std::vector<float> in(1000), out(1000);
            RemoteQueue remote(header);
            Execution execution(ranks[0]->endpoint, &remote);
            execution.start(plan, in.data(), out.data());
            ++run;
            for (int tries = 0; tries < 6; ++tries) {
                execution.progress();
                for (const RemoteMessage& message : remote.take()) remote.complete(message.id);
            }
        } catch (const Failure& failure) {
            if (failure.kind == Kind::argument) ++refused;
        }
    }
    expect(refused > 1000, "most random changes are refused");
    expect(run > 50, "some are accepted, and run");
}

void test_a_plan_with_nobody_to_carry() {
    Ranks ranks = make(2, 1, slot);
    const Plan plan(divided(ring(0, 4, 100, 1, segment_elements), {0, 1, 2, 3}, 2), 1, slot);
    Execution execution(ranks[0]->endpoint);
    bool refused = false;
    try {
        execution.start(plan, nullptr, nullptr);
    } catch (const Failure& failure) {
        refused = failure.kind == Kind::argument;
    }
    expect(refused, "a plan with remote peers is refused by who can not carry");
}

}  // namespace

int main() {
    for (const Layout& layout : {Layout{{{0, 1}, {2, 3}}}, Layout{{{0, 2}, {1, 3}}}, Layout{{{0, 1}, {2}, {3}}},
                                 Layout{{{0}, {1}, {2}}}, Layout{{{0, 1, 2}, {3, 4}}}})
        for (int64_t count : {0, 1, 100, 5001})
            for (uint32_t lanes : {1u, 2u}) test_all_reduce(layout, count, lanes);
    test_broken_plans();
    test_a_plan_with_nobody_to_carry();
    if (failures == 0) std::puts("remote: ok");
    return failures != 0;
}
