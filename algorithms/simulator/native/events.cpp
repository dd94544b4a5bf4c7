#include "events.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace abccl::simulator {

namespace {

std::vector<int64_t> units(const std::vector<Level>& levels) {
    std::vector<int64_t> found;
    for (const auto& level : levels) found.push_back(level.unit);
    return found;
}

bool is_cost(double number) { return std::isfinite(number) && number >= 0; }

int64_t ceil_divide(int64_t number, int64_t by) { return (number + by - 1) / by; }

double* earliest(std::vector<double>& times, int64_t group, int32_t number) {
    const auto begin = times.begin() + group * number;
    return &*std::min_element(begin, begin + number);
}

}  // namespace

Engine::Engine(Symmetry symmetry, std::vector<Level> levels, Costs costs, Load load, bool in_place, bool record)
    : symmetry_(symmetry),
      levels_(std::move(levels)),
      costs_(costs),
      load_(load),
      record_(record),
      crowded_(costs.crowd > 0 || (costs.processors > 0 && costs.processors < load.lanes)),
      reader_(symmetry, units(levels_), in_place, costs.slots > 0) {
    const auto& c = costs_;
    for (const double cost : {c.launch, c.send, c.receive, c.copy, c.fold, c.lent, c.lent_fold, load_.block})
        if (!is_cost(cost)) throw std::invalid_argument("a cost of a rank is no number, 0 or more");
    if (c.slots < 0 || c.processors < 0 || c.crowd < 0 || c.cores < 0 || (c.crowd > 0) != (c.cores > 0))
        throw std::invalid_argument("slots, processors and cores are 0 or more");
    if (load_.segments < 1 || load_.lanes < 1 || load_.ties < 1)
        throw std::invalid_argument("there is a segment, a lane and a tie at least");
    if (c.processors) costs_.processors = std::min(c.processors, load_.lanes);
    for (const auto& level : levels_) {
        if (!is_cost(level.alpha) || !is_cost(level.overhead) || !is_cost(level.beta) || !is_cost(level.per_byte))
            throw std::invalid_argument("a cost of a level is no number, 0 or more");
        if (level.unit < 0 || level.links < 0 || level.per < 1)
            throw std::invalid_argument("a level has units and links");
        double slowest = level.beta;
        bool has_links = false;
        for (size_t number = 0; number < levels_.size() && &levels_[number] <= &level; ++number) {
            const auto& passed = levels_[number];
            if (!passed.links || !(passed.through || &passed == &level)) continue;
            has_links = true;
            slowest = std::max(slowest, passed.per_byte);
        }
        has_links_.push_back(has_links);
        per_byte_.push_back(slowest);
        const auto servers = static_cast<size_t>(ceil_divide(symmetry_.period, level.per) * level.links);
        const Links links{std::vector<double>(servers), std::vector<double>(servers)};
        out_.push_back(links);
        in_.push_back(links);
    }
    processors_.resize(static_cast<size_t>(symmetry_.period * c.processors));
    if (c.crowd) cores_.resize(static_cast<size_t>(ceil_divide(symmetry_.period, c.crowd) * c.cores));
}

void Engine::add(const int32_t* code, size_t count) {
    if (static_cast<int64_t>(programs_.size()) == symmetry_.period)
        throw std::invalid_argument("all ranks have their code");
    programs_.push_back(reader_.read(static_cast<int64_t>(programs_.size()), code, count));
}

void Engine::prepare() {
    if (static_cast<int64_t>(programs_.size()) != symmetry_.period)
        throw std::invalid_argument("some ranks lack their code");
    channels_.resize(reader_.receivers().size() * static_cast<size_t>(load_.lanes));
    for (int32_t rank = 0; rank < symmetry_.period; ++rank)
        for (int32_t lane = 0; lane < load_.lanes; ++lane) {
            Actor actor;
            actor.rank = rank;
            actor.lane = lane;
            actor.segment = lane;
            actor.clock = costs_.launch;
            actors_.push_back(actor);
        }
    for (uint32_t index = 0; index < actors_.size(); ++index) push(event_of(actors_[index], index));
    prepared_ = true;
}

bool Engine::run(int64_t events) {
    if (!prepared_) prepare();
    const int64_t limit = events_ + events;
    while (!heap_.empty() && events_ < limit && wrong_.empty()) {
        const Event event = pop();
        if (event.is_message)
            arrive(event.index, event.time);
        else
            resume(event.index);
    }
    return heap_.empty() || !wrong_.empty();
}

void Engine::resume(uint32_t index) {
    Actor& actor = actors_[index];
    const Program& program = programs_[static_cast<size_t>(actor.rank)];
    while (actor.segment < load_.segments) {
        if (actor.position == program.size()) {
            actor.position = 0;
            actor.segment = program.empty() ? load_.segments : actor.segment + load_.lanes;
            continue;
        }
        const Operation& operation = program[actor.position];
        const double bytes = operation.blocks * load_.block;
        switch (operation.kind) {
            case Operation::credit: {
                Channel& there = channels_[channel(actor, operation)];
                if (there.sent >= costs_.slots) {
                    if (there.released.empty()) {
                        there.sender = index;
                        return;
                    }
                    const double latency = levels_[static_cast<size_t>(operation.level)].alpha;
                    wait_until(actor, take(there.released).time + latency, operation.peer);
                }
                ++there.sent;
                break;
            }
            case Operation::put: {
                const double cost = operation.lends && costs_.lends ? 0 : costs_.send;
                if (!work(actor, index, Slice::send, bytes * cost, bytes, -1)) return;
                break;
            }
            case Operation::post:
                if (!resume_post(actor, index, operation)) return;
                break;
            case Operation::take:
                if (!resume_take(actor, index, operation)) return;
                break;
            case Operation::receive: {
                const bool lent = actor.registers[static_cast<size_t>(operation.index)];
                if (!work(actor, index, Slice::receive, bytes * (lent ? costs_.lent : costs_.receive), bytes, -1))
                    return;
                break;
            }
            case Operation::fold: {
                const bool lent = actor.registers[static_cast<size_t>(operation.index)];
                if (!work(actor, index, Slice::fold, bytes * (lent ? costs_.lent_fold : costs_.fold), bytes, -1))
                    return;
                break;
            }
            case Operation::copy:
                if (!work(actor, index, Slice::copy, bytes * costs_.copy, bytes, -1)) return;
                break;
            case Operation::release:
                release(actor);
                break;
        }
        ++actor.position;
        ++events_;
        ++done_;
    }
}

// What a message keeps its sender busy, then the message itself, when nobody is earlier at the links.
bool Engine::resume_post(Actor& actor, uint32_t index, const Operation& operation) {
    const auto level = static_cast<size_t>(operation.level);
    if (!actor.begun) {
        if (!work(actor, index, Slice::send, levels_[level].overhead, 0, operation.peer)) return false;
        actor.begun = true;
    }
    if (has_links_[level] && !is_earliest(actor, index)) {
        push(event_of(actor, index));
        return false;
    }
    actor.begun = false;
    post(actor, operation);
    return true;
}

bool Engine::resume_take(Actor& actor, uint32_t index, const Operation& operation) {
    if (!actor.begun) {
        const uint32_t where = channel(actor, operation);
        if (channels_[where].arrived.empty()) {
            channels_[where].receiver = index;
            return false;
        }
        const Entry entry = take(channels_[where].arrived);
        if (entry.blocks != operation.blocks) {
            wrong_ = "rank " + std::to_string(actor.rank) + " wants " + std::to_string(operation.blocks) +
                     " blocks from rank " + std::to_string(operation.peer) + ", which sent " +
                     std::to_string(entry.blocks);
            return false;
        }
        wait_until(actor, entry.time, operation.peer);
        actor.registers.push_back(entry.lent);
        actor.taken.push_back(where);
        actor.begun = true;
    }
    const double overhead = levels_[static_cast<size_t>(operation.level)].overhead;
    if (!work(actor, index, Slice::receive, overhead, 0, operation.peer)) return false;
    actor.begun = false;
    return true;
}

// Keeps the rank busy; false if others want a processor or a core earlier, and it must be tried again.
bool Engine::work(Actor& actor, uint32_t index, Slice::Kind kind, double seconds, double bytes, int32_t peer) {
    if (seconds <= 0) {
        if (peer >= 0)
            keep(actor, kind, actor.clock, bytes, peer);  // a message has its moment, though it costs nothing
        return true;
    }
    double start = actor.clock;
    if (crowded_) {
        if (!is_earliest(actor, index)) {
            push(event_of(actor, index));
            return false;
        }
        double* processor = costs_.processors ? earliest(processors_, actor.rank, costs_.processors) : nullptr;
        double* core = costs_.crowd ? earliest(cores_, actor.rank / costs_.crowd, costs_.cores) : nullptr;
        for (const double* server : {processor, core})
            if (server) start = std::max(start, *server);
        for (double* server : {processor, core})
            if (server) *server = start + seconds;
    }
    actor.clock = start + seconds;
    actor.busy += seconds;
    keep(actor, kind, start, bytes, peer);
    return true;
}

void Engine::wait_until(Actor& actor, double time, int32_t peer) {
    if (time <= actor.clock) return;
    const double start = actor.clock;
    actor.clock = time;
    keep(actor, Slice::wait, start, 0, peer);
}

void Engine::post(Actor& actor, const Operation& operation) {
    uint32_t number;
    if (free_messages_.empty()) {
        number = static_cast<uint32_t>(in_flight_.size());
        in_flight_.emplace_back();
    } else {
        number = free_messages_.back();
        free_messages_.pop_back();
    }
    Message& message = in_flight_[number];
    message.channel = channel(actor, operation);
    message.sender = actor.rank;
    message.receiver = reader_.receivers()[static_cast<size_t>(operation.index)];
    message.lane = actor.lane;
    message.segment = actor.segment;
    message.peer = operation.peer;
    message.blocks = operation.blocks;
    message.level = operation.level;
    message.lent = operation.lends && costs_.lends;
    message.bytes = operation.blocks * load_.block;
    message.start = pass(out_, actor.rank, operation.level, actor.clock, message.bytes);
    ++messages_;
    const double head = message.start + levels_[static_cast<size_t>(operation.level)].alpha;
    if (has_links_[static_cast<size_t>(operation.level)])
        push({head, static_cast<uint64_t>(actor.segment), event_of(actor, 0).order, number, true});
    else
        arrive(number, head);
}

// A message's head is at the receiver's side.
void Engine::arrive(uint32_t number, double time) {
    const Message message = in_flight_[number];
    free_messages_.push_back(number);
    const auto level = static_cast<size_t>(message.level);
    Channel& there = channels_[message.channel];
    time = pass(in_, message.receiver, message.level, time, message.bytes) + message.bytes * per_byte_[level];
    there.latest = std::max(there.latest, time);
    put(there.arrived, {there.latest, none, message.blocks, message.lent});
    ++events_;
    if (record_)
        slices_.push_back({message.sender, message.lane, message.segment, message.peer, Slice::message, message.start,
                           there.latest, message.bytes});
    wake(there.receiver, there.latest);
}

// The slots of what a step has received are free again; their senders know a latency later.
void Engine::release(Actor& actor) {
    if (costs_.slots)
        for (const uint32_t where : actor.taken) {
            Channel& there = channels_[where];
            put(there.released, {actor.clock, none, 0, false});
            wake(there.sender, actor.clock);
        }
    actor.taken.clear();
    actor.registers.clear();
}

// Whoever waits here, if anybody does, goes on at that time.
void Engine::wake(uint32_t& waiting, double time) {
    if (waiting == none) return;
    Event event = event_of(actors_[waiting], waiting);
    event.time = std::max(event.time, time);
    push(event);
    waiting = none;
}

// A message takes a link of each level on its side, the first that is free, and all at the same time. Returns when.
double Engine::pass(std::vector<Links>& links, int64_t rank, int16_t level, double time, double bytes) {
    if (!has_links_[static_cast<size_t>(level)]) return time;
    const auto last = static_cast<size_t>(level);
    const auto each = [&](auto&& visit) {
        for (size_t number = 0; number <= last; ++number) {
            const auto& one = levels_[number];
            if (one.links && (one.through || number == last))
                visit(links[number], *earliest(links[number].free, rank / one.per, one.links), one);
        }
    };
    each([&](Links&, const double& free, const Level&) { time = std::max(time, free); });
    each([&](Links& there, double& free, const Level& one) {
        free = time + bytes * one.per_byte;
        there.busy[static_cast<size_t>(&free - there.free.data())] += bytes * one.per_byte;
    });
    return time;
}

bool Engine::is_earliest(const Actor& actor, uint32_t index) const {
    return heap_.empty() || !(heap_.front() < event_of(actor, index));
}

Engine::Event Engine::event_of(const Actor& actor, uint32_t index) const {
    const auto local = static_cast<uint64_t>((actor.rank % load_.ties) * load_.lanes + actor.lane);
    return {actor.clock, static_cast<uint64_t>(actor.segment), static_cast<uint64_t>(actor.position) << 32 | local,
            index, false};
}

void Engine::push(const Event& event) {
    heap_.push_back(event);
    std::push_heap(heap_.begin(), heap_.end(), [](const Event& a, const Event& b) { return b < a; });
}

Engine::Event Engine::pop() {
    std::pop_heap(heap_.begin(), heap_.end(), [](const Event& a, const Event& b) { return b < a; });
    const Event event = heap_.back();
    heap_.pop_back();
    return event;
}

void Engine::put(Queue& queue, const Entry& entry) {
    uint32_t number;
    if (free_entries_.empty()) {
        number = static_cast<uint32_t>(entries_.size());
        entries_.push_back(entry);
    } else {
        number = free_entries_.back();
        free_entries_.pop_back();
        entries_[number] = entry;
    }
    (queue.empty() ? queue.first : entries_[queue.last].next) = number;
    queue.last = number;
}

Engine::Entry Engine::take(Queue& queue) {
    const uint32_t number = queue.first;
    queue.first = entries_[number].next;
    free_entries_.push_back(number);
    return entries_[number];
}

uint32_t Engine::channel(const Actor& actor, const Operation& operation) const {
    return static_cast<uint32_t>(operation.index * load_.lanes + actor.lane);
}

void Engine::keep(const Actor& actor, Slice::Kind kind, double start, double bytes, int32_t peer) {
    if (record_) slices_.push_back({actor.rank, actor.lane, actor.segment, peer, kind, start, actor.clock, bytes});
}

std::string Engine::problem() const {
    if (!wrong_.empty()) return wrong_;
    for (const auto& actor : actors_)
        if (actor.segment < load_.segments) {
            const auto& operation = programs_[static_cast<size_t>(actor.rank)][actor.position];
            return "rank " + std::to_string(actor.rank) + " waits for rank " + std::to_string(operation.peer) +
                   (operation.kind == Operation::take ? " to send" : " to receive");
        }
    for (size_t number = 0; number < channels_.size(); ++number)
        if (!channels_[number].arrived.empty())
            return "rank " + std::to_string(reader_.receivers()[number / static_cast<size_t>(load_.lanes)]) +
                   " does not take a message that was sent to it";
    return "";
}

double Engine::progress() const {
    double total = 0;
    for (const auto& program : programs_) total += static_cast<double>(program.size());
    return total > 0 ? static_cast<double>(done_) / (total * static_cast<double>(load_.segments)) : 1;
}

double Engine::seconds() const {
    const auto found = ends();
    return found.empty() ? 0 : *std::max_element(found.begin(), found.end());
}

std::vector<double> Engine::ends() const {
    std::vector<double> found(programs_.size());
    for (const auto& actor : actors_) {
        auto& end = found[static_cast<size_t>(actor.rank)];
        end = std::max(end, actor.clock);
    }
    return found;
}

std::vector<double> Engine::busiest_links() const {
    std::vector<double> found;
    for (size_t level = 0; level < levels_.size(); ++level) {
        double most = 0;
        for (const auto* links : {&out_[level], &in_[level]})
            for (const double busy : links->busy) most = std::max(most, busy);
        found.push_back(most);
    }
    return found;
}

double Engine::busiest_rank() const {
    const double processors = costs_.processors ? std::min(costs_.processors, load_.lanes) : load_.lanes;
    std::vector<double> busy(programs_.size());
    for (const auto& actor : actors_) busy[static_cast<size_t>(actor.rank)] += actor.busy / processors;
    return busy.empty() ? 0 : *std::max_element(busy.begin(), busy.end());
}

}  // namespace abccl::simulator
