#include "execution.hpp"

#include <algorithm>
#include <utility>

#include "copy.hpp"
#include "failure.hpp"
#include "fold.hpp"

namespace abccl {
namespace {

// Shorter messages are not worth a wait for their readers.
constexpr size_t lend_from = 8192;

// Who waits for less is not worth telling of.
constexpr auto long_wait = std::chrono::milliseconds(15);

// A run on so few bytes is over before a stamp of its beginning matters.
constexpr uint64_t short_bytes = 4096;

// Outputs of all ranks that together are longer stay in no cache that cores share: of 32 MiB here, and few have more.
constexpr size_t uncached_from = 32 << 20;

// Of a fold past the cache: the sum is made in the first-level cache, and goes to memory from there.
constexpr size_t tile_bytes = 8192;

}  // namespace

void Execution::start(const Plan& plan, const void* input, void* output) {
    if (plan.parameters.remotes != 0 && !remote_)
        throw Failure(Kind::argument, "a plan with remote peers wants somebody who carries messages to them");
    const Geometry& geometry = endpoint_.geometry();
    if (static_cast<uint32_t>(plan.parameters.size) != geometry.size ||
        static_cast<uint32_t>(plan.parameters.rank) != endpoint_.rank() ||
        static_cast<uint32_t>(plan.parameters.lanes) > geometry.lanes || plan.longest_message > geometry.slot_bytes)
        throw Failure(Kind::argument, "a plan runs on the communicator that it was made for, and this is another");
    plan_ = &plan;
    input_ = static_cast<const uint8_t*>(input);
    output_ = static_cast<uint8_t*>(output);
    Recorder& recorder = endpoint_.recorder();
    plan.text_number = recorder.text(plan.text_number, plan.parameters.text, plan.bytes);
    records_steps_ = recorder.wants_steps(plan.longest_message);
    blocked_ = false;
    waits_since_.reset();
    const uint64_t number = endpoint_.enter(plan.parameters.signature, plan.parameters.text, plan.text_number);
    // Of a short run the stamp may wait until its messages have left; a long one would have done half its work.
    if (records_steps_ || plan.bytes > short_bytes) recorder.started(number);
    base_signature_ = plan.parameters.signature ^ static_cast<uint32_t>(number * 0x9E3779B97F4A7C15ull >> 32);
    streaming_from_ = endpoint_.streaming_from();
    const bool registered = endpoint_.in_heap(input) || endpoint_.in_heap(output);
    const std::optional<Way> forced = endpoint_.way() ? Way::of(*endpoint_.way()) : plan.protocol.forced();
    lend_from_ = forced ? inline_bytes + 1 : lend_from;
    const bool can_lend = plan.lends && plan.longest_message >= lend_from_ && (registered || endpoint_.pulls());
    const bool adapts = endpoint_.adapts() && !forced && plan.longest_message > inline_bytes;
    measures_ = false;
    way_ = {can_lend && registered, plan.longest_message >= streaming_from_};
    // All ranks count alike, so they take the same lanes; in turn, so that all of the arena is used (see Cursor).
    first_lane_ = static_cast<uint32_t>(number % endpoint_.geometry().lanes);
    if (adapts) {
        const size_t run_bytes = plan.longest_message * static_cast<size_t>(plan.parameters.segments);
        way_ = plan.protocol.next(way_, can_lend, run_bytes, endpoint_.geometry().to_peer());
        measures_ = plan.protocol.measures() || (plan.receives && plan.protocol.is_short());
    }
    if (plan.seen.samples()) measures_ = true;
    if (measures_) started_ = Clock::now();
    if (forced) {
        way_ = *forced;
        way_.lent = way_.lent && can_lend;
    }
    if (way_.lent && !registered && !may_be_pulled(plan, input, output)) way_.lent = false;
    read_lent_ = false;
    // What was staged past the cache should be in the cache as the caller finds it, if it fits.
    const size_t outputs =
        static_cast<size_t>(plan.parameters.output_count) * plan.itemsize * endpoint_.geometry().size;
    output_past_cache_ = way_.lent ? way_.streaming : outputs >= uncached_from;
    if (adapts || forced) streaming_from_ = way_.streaming ? inline_bytes + 1 : SIZE_MAX;
    // What is registered is mapped: it has no calls to save. What is reclaimed must be watched segment by segment.
    whole_ = plan.parameters.straight && plan.parameters.segments > 1 && plan.reclaims.empty() && way_.lent &&
             endpoint_.pulls() && !endpoint_.in_heap(input);
    if (plan.parameters.straight) arrived_.assign(plan.rows.size(), 0);
    const size_t needed = plan.scratch_bytes() + cache_line;
    if (needed > scratch_bytes_) {
        scratch_.reset(new uint8_t[needed]);
        scratch_bytes_ = needed;
    }
    const uint32_t lanes = static_cast<uint32_t>(plan.parameters.lanes);
    const size_t lane_bytes = plan.scratch_bytes() / lanes;
    uint8_t* aligned =
        reinterpret_cast<uint8_t*>(Geometry::round_up(reinterpret_cast<size_t>(scratch_.get()), cache_line));
    if (lanes_.size() < lanes) lanes_.resize(lanes);
    unfinished_ = 0;
    for (uint32_t l = 0; l < lanes; ++l) {
        Lane& lane = lanes_[l];
        lane.segment = l;
        lane.row = 0;
        lane.filled = 0;
        lane.scratch = aligned + lane_bytes * l;
        const size_t registers = static_cast<size_t>(plan.parameters.registers);
        if (lane.registers.size() < registers) lane.registers.resize(registers);
        lane.parts.resize(plan.step_parts);
        if (way_.lent) lane.lent.assign(plan.peers.size(), 0);
        if (l < plan.parameters.segments && !plan.rows.empty()) ++unfinished_;
    }
    if (remote_) remote_->begin(lanes);
    spans_.resize(plan.max_parts);
    sources_.resize(plan.max_parts);
}

Outcome Execution::progress() {
    bool moved = false;
    const uint32_t lanes = static_cast<uint32_t>(plan_->parameters.lanes);
    for (uint32_t l = 0; l < lanes; ++l)
        if (unfinished_ != 0 && lanes_[l].segment < plan_->parameters.segments && run(l)) moved = true;
    if (unfinished_ == 0) {
        // Who lent may have given up and changed what was read.
        if (read_lent_) endpoint_.check_abort();
        // Whoever receives sees a foreign signature; whoever only sends would not notice.
        if (!plan_->receives) {
            std::atomic_thread_fence(std::memory_order_seq_cst);  // of two such, one sees the other
            for (uint32_t peer : plan_->peers)
                if (!is_remote(peer)) endpoint_.compare(peer);
        }
        if (measures_) took(std::chrono::duration<double>(Clock::now() - started_).count());
        endpoint_.finish();
        return Outcome::done;
    }
    endpoint_.recorder().started(endpoint_.sequence());
    if (!moved && !blocked_) pass(faults::Point::wait);
    blocked_ = !moved;
    return moved ? Outcome::moved : Outcome::blocked;
}

void Execution::pass(faults::Point point) {
    if (faults::pass(point) == faults::Action::abort)
        endpoint_.fail(static_cast<uint32_t>(Kind::aborted), endpoint_.name(endpoint_.rank()) + ": an injected fault");
}

void Execution::took(double seconds) {
    const Plan& plan = *plan_;
    if (plan.receives) {
        endpoint_.tell_time(plan.parameters.signature, static_cast<float>(seconds));
    } else {
        for (uint32_t peer : plan.peers)
            if (!is_remote(peer)) seconds = std::max(seconds, endpoint_.time_of(peer, plan.parameters.signature));
    }
    plan.protocol.took(seconds);
    if (plan.protocol.at_best()) plan.seen.add(seconds);
}

bool Execution::run(uint32_t lane_index) {
    Lane& lane = lanes_[lane_index];
    const Plan& plan = *plan_;
    const Row* rows = plan.rows.data();
    const size_t count = plan.rows.size();
    bool moved = false;
    for (;; ++lane.row, moved = true) {
        if (lane.row == count) {
            const bool last = lane.segment + plan.parameters.lanes >= plan.parameters.segments;
            // The user's memory is the user's again when all have read it.
            if (last && way_.lent && unread(lane_index, lane)) return moved;
            if (last && remote_ && remote_->leaving(lane_index) != 0) return moved;
            lane.row = 0;
            lane.segment += plan.parameters.lanes;
            if (last) {
                --unfinished_;
                return true;
            }
        }
        const Row& row = rows[lane.row];
        const bool uses_messages = row.instruction >= Instruction::fold && row.instruction <= Instruction::release;
        if (uses_messages && remote_ && remote_->awaited(lane_index) != 0) return moved;
        switch (row.instruction) {
            case Instruction::send:
                if (!send(row, lane_index, lane)) return moved;
                break;
            case Instruction::recv:
                if (!receive(row, lane_index, lane)) return moved;
                break;
            case Instruction::fold: {
                const int64_t elements = plan.elements(row.destination.block, lane.segment);
                if (elements != 0) fold(row, lane, static_cast<size_t>(elements));
                break;
            }
            case Instruction::copy: {
                const int64_t elements = plan.elements(row.destination.block, lane.segment);
                const uint8_t* from = address(plan.operands[row.first], lane);
                write(row.destination, lane, static_cast<size_t>(elements) * plan.itemsize, from);
                break;
            }
            case Instruction::scale: {
                const int64_t elements = plan.elements(row.destination.block, lane.segment);
                if (elements != 0)
                    scale(plan.parameters.type, address(row.destination, lane), address(plan.operands[row.first], lane),
                          plan.parameters.factor, static_cast<size_t>(elements));
                break;
            }
            case Instruction::release:
                release(lane_index, lane);
                if (records_steps_)
                    endpoint_.recorder().step(
                        endpoint_.sequence(), lane_index, lane.segment, row.tag,
                        row.reg < 0 ? nobody
                                    : static_cast<int32_t>(endpoint_.user_rank(static_cast<uint32_t>(row.reg))));
                pass(faults::Point::step);
                break;
            case Instruction::reclaim:
                if (way_.lent && unread(lane_index, lane)) return moved;
                break;
        }
    }
}

bool Execution::may_be_pulled(const Plan& plan, const void* input, const void* output) {
    const size_t read = static_cast<size_t>(plan.parameters.input_count) * plan.itemsize;
    const size_t written = static_cast<size_t>(plan.parameters.output_count) * plan.itemsize;
    const Probed now{input, output, read, written};
    if (now == probed_) return true;
    if (!endpoint_.readable(input, read) || !endpoint_.readable(output, written)) return false;
    probed_ = now;
    return true;
}

size_t Execution::block_bytes(int32_t block, const Lane& lane, bool whole) const {
    const int64_t elements =
        whole ? plan_->extents[static_cast<size_t>(block)].count : plan_->elements(block, lane.segment);
    return static_cast<size_t>(elements) * plan_->itemsize;
}

size_t Execution::message_bytes(const Row& row, const Lane& lane, bool whole) const {
    size_t bytes = 0;
    for (uint32_t i = 0; i < row.count; ++i) bytes += block_bytes(plan_->operands[row.first + i].block, lane, whole);
    return bytes;
}

void Execution::write(const Operand& destination, const Lane& lane, size_t bytes, const uint8_t* from) {
    uint8_t* to = address(destination, lane);
    if (bytes == 0 || to == from) return;
    if (output_past_cache_ && destination.place == Place::output)
        copy_streaming(to, from, bytes);
    else
        abccl::copy(to, from, bytes);
}

void Execution::fold(const Row& row, const Lane& lane, size_t elements) {
    const PlanParameters& parameters = plan_->parameters;
    const int sources = static_cast<int>(row.count);
    for (uint32_t i = 0; i < row.count; ++i) sources_[i] = address(plan_->operands[row.first + i], lane);
    const bool past_the_cache = way_.lent && way_.streaming && row.destination.place == Place::output;
    uint8_t* to = address(row.destination, lane);
    if (!past_the_cache) {
        abccl::fold(parameters.type, parameters.op, to, sources_.data(), sources, elements);
        return;
    }
    alignas(cache_line) uint8_t tile[tile_bytes];
    const size_t most = tile_bytes / plan_->itemsize;
    for (size_t done = 0; done < elements; done += most) {
        const size_t now = std::min(most, elements - done), bytes = now * plan_->itemsize;
        abccl::fold(parameters.type, parameters.op, tile, sources_.data(), sources, now);
        copy_streaming(to + done * plan_->itemsize, tile, bytes);
        for (uint32_t i = 0; i < row.count; ++i) sources_[i] = static_cast<const uint8_t*>(sources_[i]) + bytes;
    }
}

bool Execution::send(const Row& row, uint32_t lane_index, Lane& lane) {
    const Plan& plan = *plan_;
    size_t bytes = whole_ ? message_bytes(row, lane, true) : 0;
    const bool whole = whole_ && row.lends && row.count <= lent_parts && bytes >= lend_from_ && bytes <= UINT32_MAX;
    if (!whole) bytes = message_bytes(row, lane, false);
    if (lane.segment > 0 && (whole || bytes == 0)) return true;
    for (uint32_t i = 0; i < row.count; ++i) {
        const Operand& part = plan.operands[row.first + i];
        const size_t part_bytes = block_bytes(part.block, lane, whole);
        spans_[i] = {part_bytes ? address(part, lane) : nullptr, part_bytes};
    }
    if (is_remote(plan.peers[row.peers])) return send_remote(row, lane_index, lane, bytes);
    if (way_.lent && row.lends && bytes >= lend_from_ && endpoint_.can_lend(spans_.data(), row.count)) {
        numbers_.resize(row.readers);
        if (!endpoint_.try_lend(&plan.peers[row.peers], row.readers, channel(lane_index), signature(row, lane.segment),
                                spans_.data(), row.count, bytes, whole, numbers_.data()))
            return false;
        for (uint32_t i = 0; i < row.readers; ++i) lane.lent[row.peers + i] = is_lent | numbers_[i];
        return true;
    }
    return endpoint_.try_send(&plan.peers[row.peers], row.readers, channel(lane_index), signature(row, lane.segment),
                              spans_.data(), row.count, bytes, streaming_from_);
}

bool Execution::receive(const Row& row, uint32_t lane_index, Lane& lane) {
    const Plan& plan = *plan_;
    const uint32_t peer = plan.peers[row.peers];
    const size_t number = static_cast<size_t>(&row - plan.rows.data());
    const bool arrived = plan.parameters.straight && arrived_[number];
    size_t bytes = message_bytes(row, lane, false);
    Register& reg = lane.registers[static_cast<size_t>(row.reg)];
    reg.peer = peer;
    reg.first = row.part;
    reg.holds = !arrived && (bytes != 0 || lane.segment == 0);
    if (is_remote(peer)) return receive_remote(row, lane_index, lane, bytes);
    const Descriptor* descriptor = nullptr;
    const uint8_t* data = nullptr;
    bool whole = false;
    if (reg.holds) {
        descriptor = endpoint_.try_receive(peer, channel(lane_index));
        if (!descriptor) return false;
        if (descriptor->signature != signature(row, lane.segment))
            endpoint_.mismatch(peer, " (a message has the wrong signature)");
        whole = descriptor->where == pulled_whole;
        const bool pulls = whole || descriptor->where == pulled;
        if ((whole && !plan.parameters.straight) || (pulls && row.count > lent_parts))
            endpoint_.mismatch(peer, " (a lent message came where none can be)");
        read_lent_ = read_lent_ || pulls || descriptor->where == direct;
        if (whole) bytes = message_bytes(row, lane, true);
        if (descriptor->length != bytes)
            endpoint_.mismatch(peer, " (a message of " + std::to_string(descriptor->length) + " bytes came where " +
                                         std::to_string(bytes) + " were expected)");
        if (descriptor->where == pulled && !row.straight)
            data = landing(reg, bytes);
        else if (descriptor->where == inlined || descriptor->where < pulled_whole)
            data = endpoint_.payload(peer, *descriptor);
    }
    for (uint32_t i = 0; i < row.count; ++i) {
        const int32_t block = plan.operands[row.first + i].block;
        const size_t part_bytes = block_bytes(block, lane, false);
        const uint8_t*& part = lane.parts[reg.first + i];
        part = data;
        if (data)
            data += part_bytes;
        else if (descriptor && descriptor->where == direct)
            part = endpoint_.direct_part(peer, *descriptor, i, part_bytes);
        else if (descriptor || arrived)
            part = address({Place::output, block, 0, 0}, lane);
        spans_[i] = {part, whole ? block_bytes(block, lane, true) : part_bytes};
    }
    if (whole || (descriptor && descriptor->where == pulled))
        endpoint_.pull(peer, *descriptor, spans_.data(), row.count);
    if (whole) arrived_[number] = 1;
    lane.filled = static_cast<size_t>(row.reg) + 1;
    return true;
}

bool Execution::send_remote(const Row& row, uint32_t lane_index, const Lane& lane, size_t bytes) {
    // All sends of a step find room: so what waits here waits for earlier steps, whose sends end by themselves.
    if (remote_->leaving(lane_index) + row.readers > 2 * plan_->most_remote) return false;
    const uint32_t buffer = remote_->take_buffer(bytes);
    uint8_t* to = remote_->parts(buffer);
    for (uint32_t i = 0; i < row.count; to += spans_[i++].bytes) abccl::copy(to, spans_[i].data, spans_[i].bytes);
    const size_t number = static_cast<size_t>(&row - plan_->rows.data());
    for (uint32_t i = 0; i < row.readers; ++i)
        remote_->post(true, plan_->peers[row.peers + i], lane_index, number, lane.segment, buffer, bytes);
    return true;
}

// Does not wait: all messages of a step must be expected at once.
bool Execution::receive_remote(const Row& row, uint32_t lane_index, Lane& lane, size_t bytes) {
    Register& reg = lane.registers[static_cast<size_t>(row.reg)];
    if (reg.holds) {
        const uint32_t buffer = remote_->take_buffer(bytes);
        const uint8_t* data = remote_->parts(buffer);
        for (uint32_t i = 0; i < row.count; ++i) {
            lane.parts[reg.first + i] = data;
            data += block_bytes(plan_->operands[row.first + i].block, lane, false);
        }
        const size_t number = static_cast<size_t>(&row - plan_->rows.data());
        remote_->post(false, reg.peer, lane_index, number, lane.segment, buffer, bytes);
        reg.remote = buffer;
        reg.holds = false;
    }
    lane.filled = static_cast<size_t>(row.reg) + 1;
    return true;
}

uint8_t* Execution::landing(Register& reg, size_t bytes) {
    if (reg.landing_bytes < bytes + cache_line) {
        reg.landing.reset(new uint8_t[bytes + cache_line]);
        reg.landing_bytes = bytes + cache_line;
    }
    const size_t start = reinterpret_cast<size_t>(reg.landing.get());
    return reg.landing.get() + (Geometry::round_up(start, cache_line) - start);
}

std::optional<Execution::Unread> Execution::unread(uint32_t lane_index, const Lane& lane) const {
    const auto of = [&](size_t row) -> std::optional<Unread> {
        const Row& send = plan_->rows[row];
        for (uint32_t i = send.peers; send.lends && i < send.peers + send.readers; ++i) {
            const uint32_t peer = plan_->peers[i];
            if (lane.lent[i] != 0 &&
                !endpoint_.has_read(peer, channel(lane_index), static_cast<uint32_t>(lane.lent[i])))
                return Unread{row, peer};
        }
        return std::nullopt;
    };
    const bool at_end = lane.row == plan_->rows.size();
    const size_t count = at_end ? plan_->rows.size() : plan_->rows[lane.row].count;
    for (size_t i = 0; i < count; ++i)
        if (auto found = of(at_end ? i : plan_->reclaims[plan_->rows[lane.row].first + i])) return found;
    return std::nullopt;
}

const RemoteMessage* Execution::remote_message(uint32_t lane_index, const Lane& lane) const {
    if (!remote_) return nullptr;
    if (lane.row < plan_->rows.size()) {
        const Row& row = plan_->rows[lane.row];
        const bool exchanges = row.instruction == Instruction::send || row.instruction == Instruction::recv;
        if (row.instruction == Instruction::reclaim || (exchanges && !is_remote(plan_->peers[row.peers])))
            return nullptr;
    }
    return remote_->first_pending(lane_index);
}

void Execution::release(uint32_t lane_index, Lane& lane) {
    for (size_t r = 0; r < lane.filled; ++r) {
        Register& reg = lane.registers[r];
        if (reg.holds) endpoint_.release(reg.peer, channel(lane_index));
        if (reg.remote >= 0) remote_->give_back(static_cast<uint32_t>(std::exchange(reg.remote, -1)));
    }
    lane.filled = 0;
}

uint8_t* Execution::address(const Operand& operand, const Lane& lane) const {
    const Plan& plan = *plan_;
    const Extent& extent = plan.extents[static_cast<size_t>(operand.block)];
    const int64_t start = lane.segment * plan.parameters.segment;
    switch (operand.place) {
        case Place::input:
            // Only ever read: plans do not write to the input.
            return const_cast<uint8_t*>(input_) + static_cast<size_t>(extent.input + start) * plan.itemsize;
        case Place::output:
            return output_ + static_cast<size_t>(extent.output + start) * plan.itemsize;
        case Place::scratch:
            return lane.scratch +
                   static_cast<size_t>(operand.index) * static_cast<size_t>(plan.parameters.segment) * plan.itemsize;
        case Place::message:
            break;
    }
    const Register& reg = lane.registers[static_cast<size_t>(operand.index)];
    return const_cast<uint8_t*>(lane.parts[reg.first + static_cast<uint32_t>(operand.part)]);
}

Execution::Wait Execution::waits_for() const {
    const Plan& plan = *plan_;
    uint64_t moved = 0;  // grows with each row of each lane
    for (uint32_t l = 0; l < static_cast<uint32_t>(plan.parameters.lanes); ++l)
        moved += static_cast<uint64_t>(lanes_[l].segment) * (plan.rows.size() + 1) + lanes_[l].row;
    for (uint32_t l = 0; l < static_cast<uint32_t>(plan.parameters.lanes); ++l) {
        const Lane& lane = lanes_[l];
        if (lane.segment >= plan.parameters.segments) continue;
        if (const RemoteMessage* message = remote_message(l, lane)) {
            const int step = plan.step_of(message->row) + 1;
            return {moved, step, message->peer,
                    "waits at step " + std::to_string(step) + (message->sends ? " for its block " : " for block ") +
                        plan.blocks_of(message->row) + (message->sends ? " to reach " : " from ") +
                        endpoint_.name(message->peer)};
        }
        if (lane.row == plan.rows.size() || plan.rows[lane.row].instruction == Instruction::reclaim) {
            const auto found = unread(l, lane);
            if (!found) continue;  // it has just been read
            return {moved, 0, found->peer,
                    "waits for " + endpoint_.name(found->peer) + " to read block " + plan.blocks_of(found->row) +
                        " of step " + std::to_string(plan.step_of(found->row) + 1)};
        }
        const Row& row = plan.rows[lane.row];
        const bool sending = row.instruction == Instruction::send;
        const uint32_t peer = plan.peers[row.peers];
        const int step = plan.step_of(lane.row) + 1;
        return {moved, step, peer,
                "waits at step " + std::to_string(step) + (sending ? " for room to send block " : " for block ") +
                    plan.blocks_of(lane.row) + (sending ? " to " : " from ") + endpoint_.name(peer)};
    }
    return {moved, 0, std::nullopt, "waits for nothing"};
}

std::string Execution::blame() const {
    const Wait wait = waits_for();
    std::string text = endpoint_.title() + ": " + endpoint_.name(endpoint_.rank()) + " " + wait.text;
    if (!wait.peer || is_remote(*wait.peer)) return text;
    // Whom it waits for may itself wait for a rank that has not come.
    return text + ", " + endpoint_.status(*wait.peer) + endpoint_.stragglers(*wait.peer);
}

void Execution::publish_wait(bool at_once) {
    const auto now = Clock::now();
    if (!waits_since_) waits_since_ = now;
    if (!at_once && now < *waits_since_ + long_wait) return;
    const Wait wait = waits_for();
    const int32_t peer = wait.peer ? static_cast<int32_t>(endpoint_.user_rank(*wait.peer)) : nobody;
    endpoint_.recorder().waits(endpoint_.sequence(), wait.moved, wait.step, peer, wait.text);
}

}  // namespace abccl
