#include "execution.hpp"

#include "copy.hpp"
#include "fold.hpp"

namespace abccl {
namespace {

// Shorter messages are not worth two looks at the clock.
constexpr size_t adaptive_from = 8192;

}  // namespace

void Execution::start(const Plan& plan, const void* input, void* output) {
    plan_ = &plan;
    input_ = static_cast<const uint8_t*>(input);
    output_ = static_cast<uint8_t*>(output);
    const uint64_t number = endpoint_.enter(plan.parameters.signature, plan.parameters.text);
    base_signature_ = plan.parameters.signature ^ static_cast<uint32_t>(number * 0x9E3779B97F4A7C15ull >> 32);
    streaming_from_ = endpoint_.streaming_from();
    adapts_ = endpoint_.adapts() && plan.longest_message >= adaptive_from;
    if (adapts_) {
        streaming_from_ = plan.protocol.next(plan.longest_message >= streaming_from_) ? adaptive_from / 2 : SIZE_MAX;
        started_ = Clock::now();
    }
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
        lane.registers.resize(static_cast<size_t>(plan.parameters.registers));
        lane.offsets.resize(static_cast<size_t>(plan.parameters.registers) * plan.max_parts);
        if (l < plan.parameters.segments && !plan.rows.empty()) ++unfinished_;
    }
    spans_.resize(plan.max_parts);
    sources_.resize(plan.max_parts);
}

Outcome Execution::progress() {
    bool moved = false;
    const uint32_t lanes = static_cast<uint32_t>(plan_->parameters.lanes);
    for (uint32_t l = 0; l < lanes; ++l)
        if (unfinished_ != 0 && lanes_[l].segment < plan_->parameters.segments && run(l)) moved = true;
    if (unfinished_ == 0) {
        // Whoever receives sees a foreign signature; whoever only sends would not notice.
        if (!plan_->receives) {
            std::atomic_thread_fence(std::memory_order_seq_cst);  // of two such, one sees the other
            for (uint32_t peer : plan_->peers) endpoint_.compare(peer);
        }
        if (adapts_) plan_->protocol.took(std::chrono::duration<double>(Clock::now() - started_).count());
        adapts_ = false;
        endpoint_.finish();
        return Outcome::done;
    }
    return moved ? Outcome::moved : Outcome::blocked;
}

bool Execution::run(uint32_t lane_index) {
    Lane& lane = lanes_[lane_index];
    const Plan& plan = *plan_;
    const Row* rows = plan.rows.data();
    const size_t count = plan.rows.size();
    bool moved = false;
    for (;; ++lane.row, moved = true) {
        if (lane.row == count) {
            lane.row = 0;
            lane.segment += plan.parameters.lanes;
            if (lane.segment >= plan.parameters.segments) {
                --unfinished_;
                return true;
            }
        }
        const Row& row = rows[lane.row];
        switch (row.instruction) {
            case Instruction::send:
                if (!send(row, lane_index, lane)) return moved;
                break;
            case Instruction::recv:
                if (!receive(row, lane_index, lane)) return moved;
                break;
            case Instruction::fold: {
                const int64_t elements = plan.elements(row.destination.block, lane.segment);
                if (elements == 0) break;
                for (uint32_t i = 0; i < row.count; ++i) sources_[i] = address(plan.operands[row.first + i], lane);
                fold(plan.parameters.type, plan.parameters.op, address(row.destination, lane), sources_.data(),
                     static_cast<int>(row.count), static_cast<size_t>(elements));
                break;
            }
            case Instruction::copy: {
                const int64_t elements = plan.elements(row.destination.block, lane.segment);
                uint8_t* to = address(row.destination, lane);
                const uint8_t* from = address(plan.operands[row.first], lane);
                if (elements != 0 && to != from) abccl::copy(to, from, static_cast<size_t>(elements) * plan.itemsize);
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
                break;
        }
    }
}

size_t Execution::message_elements(const Row& row, int64_t segment) const {
    int64_t elements = 0;
    for (uint32_t i = 0; i < row.count; ++i) elements += plan_->elements(plan_->operands[row.first + i].block, segment);
    return static_cast<size_t>(elements);
}

bool Execution::send(const Row& row, uint32_t lane_index, const Lane& lane) {
    const Plan& plan = *plan_;
    size_t bytes = 0;
    for (uint32_t i = 0; i < row.count; ++i) {
        const Operand& part = plan.operands[row.first + i];
        const size_t part_bytes = static_cast<size_t>(plan.elements(part.block, lane.segment)) * plan.itemsize;
        spans_[i] = {part_bytes ? address(part, lane) : nullptr, part_bytes};
        bytes += part_bytes;
    }
    if (bytes == 0 && lane.segment > 0) return true;
    return endpoint_.try_send(&plan.peers[row.peers], row.readers, lane_index, signature(row, lane.segment),
                              spans_.data(), row.count, bytes, streaming_from_);
}

bool Execution::receive(const Row& row, uint32_t lane_index, Lane& lane) {
    const Plan& plan = *plan_;
    const uint32_t peer = plan.peers[row.peers];
    const size_t bytes = message_elements(row, lane.segment) * plan.itemsize;
    Register& reg = lane.registers[static_cast<size_t>(row.reg)];
    reg.peer = peer;
    reg.data = nullptr;
    reg.first = static_cast<uint32_t>(static_cast<size_t>(row.reg) * plan.max_parts);
    if (bytes != 0 || lane.segment == 0) {
        const Descriptor* descriptor = endpoint_.try_receive(peer, lane_index);
        if (!descriptor) return false;
        if (descriptor->signature != signature(row, lane.segment))
            endpoint_.mismatch(peer, " (a message has the wrong signature)");
        if (descriptor->length != bytes)
            endpoint_.mismatch(peer, " (a message of " + std::to_string(descriptor->length) + " bytes came where " +
                                         std::to_string(bytes) + " were expected)");
        reg.data = endpoint_.payload(peer, *descriptor);
    }
    size_t offset = 0;
    for (uint32_t i = 0; i < row.count; ++i) {
        lane.offsets[reg.first + i] = offset;
        offset += static_cast<size_t>(plan.elements(plan.operands[row.first + i].block, lane.segment));
    }
    lane.filled = static_cast<size_t>(row.reg) + 1;
    return true;
}

void Execution::release(uint32_t lane_index, Lane& lane) {
    for (size_t r = 0; r < lane.filled; ++r)
        if (lane.registers[r].data) endpoint_.release(lane.registers[r].peer, lane_index);
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
    return const_cast<uint8_t*>(reg.data) +
           lane.offsets[reg.first + static_cast<uint32_t>(operand.part)] * plan.itemsize;
}

std::string Execution::blame() const {
    const Plan& plan = *plan_;
    const std::string self = plan.parameters.text + " #" + endpoint_.shown(endpoint_.sequence()) + ": rank " +
                             std::to_string(endpoint_.rank());
    for (uint32_t l = 0; l < static_cast<uint32_t>(plan.parameters.lanes); ++l) {
        const Lane& lane = lanes_[l];
        if (lane.segment >= plan.parameters.segments) continue;
        const Row& row = plan.rows[lane.row];
        const bool sending = row.instruction == Instruction::send;
        const uint32_t peer = plan.peers[row.peers];
        std::string text = self + " waits at step " + std::to_string(plan.step_of(lane.row) + 1) +
                           (sending ? " for room to send block " : " for block ") + plan.blocks_of(lane.row) +
                           (sending ? " to rank " : " from rank ") + std::to_string(peer) + ", " +
                           endpoint_.status(peer);
        // Whom it waits for may itself wait for a rank that has not come.
        for (uint32_t other = 0; other < endpoint_.geometry().size; ++other)
            if (other != peer && other != endpoint_.rank() && !endpoint_.entered(other))
                text += "; rank " + std::to_string(other) + " is one " + endpoint_.status(other);
        return text;
    }
    return self + " waits for nothing";
}

}  // namespace abccl
