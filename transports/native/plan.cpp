#include "plan.hpp"

#include <algorithm>

#include "failure.hpp"

namespace abccl {
namespace {

[[noreturn]] void refuse(const std::string& why) { throw Failure(Kind::argument, "the plan is broken: " + why); }

// Reads the code front to back and refuses what does not make sense.
class Parser {
  public:
    Parser(Plan& plan) : plan_(plan), code_(plan.parameters.code) {}

    void parse() {
        while (at_ < code_.size()) {
            Row row{};
            row.instruction = static_cast<Instruction>(next());
            switch (row.instruction) {
                case Instruction::send:
                    row.tag = static_cast<uint32_t>(next());
                    row.lends = next() != 0;
                    plan_.lends |= row.lends;
                    sends_.push_back(static_cast<uint32_t>(plan_.rows.size()));
                    row.readers = count(1, static_cast<uint32_t>(plan_.parameters.size + plan_.parameters.remotes));
                    row.peers = static_cast<uint32_t>(plan_.peers.size());
                    for (uint32_t i = 0; i < row.readers; ++i) peer();
                    count_remote(row);
                    operands(row, count(0, remaining()), false);
                    break;
                case Instruction::recv:
                    row.tag = static_cast<uint32_t>(next());
                    plan_.receives = true;
                    row.readers = 1;
                    row.peers = static_cast<uint32_t>(plan_.peers.size());
                    peer();
                    if (static_cast<int32_t>(registers_.size()) >= plan_.parameters.registers)
                        refuse("more messages in a step than registers");
                    row.reg = static_cast<int32_t>(registers_.size());
                    row.first = static_cast<uint32_t>(plan_.operands.size());
                    row.count = count(0, remaining());
                    for (uint32_t i = 0; i < row.count; ++i)
                        plan_.operands.push_back({Place::message, block(), row.reg, static_cast<int32_t>(i)});
                    registers_.push_back(row.first);
                    parts_.push_back(row.count);
                    break;
                case Instruction::fold:
                    row.destination = operand();
                    operands(row, count(1, remaining()), true);
                    break;
                case Instruction::copy:
                case Instruction::scale:
                    row.destination = operand();
                    operands(row, 1, true);
                    break;
                case Instruction::release:
                    row.tag = ++steps_;
                    row.reg = partner_;
                    partner_ = -1;
                    registers_.clear();
                    parts_.clear();
                    remote_ = 0;
                    break;
                case Instruction::reclaim:
                    row.first = static_cast<uint32_t>(plan_.reclaims.size());
                    row.count = count(1, remaining());
                    for (uint32_t i = 0; i < row.count; ++i) {
                        const int32_t number = next();
                        if (number < 0 || static_cast<size_t>(number) >= sends_.size())
                            refuse("it reclaims what no send has lent");
                        plan_.reclaims.push_back(sends_[static_cast<size_t>(number)]);
                    }
                    break;
                default:
                    refuse("unknown instruction " + std::to_string(static_cast<int>(row.instruction)));
            }
            if (row.instruction >= Instruction::fold && row.instruction <= Instruction::scale) check_writes(row);
            if (row.instruction != Instruction::reclaim) plan_.max_parts = std::max<size_t>(plan_.max_parts, row.count);
            plan_.rows.push_back(row);
        }
        if (!registers_.empty()) refuse("the last step does not give its messages back");
        find_straight();
    }

  private:
    // A message whose every part is copied to the output may be read to there at once. Rows of one step follow each
    // other: receives, then writes, then the release.
    void find_straight() {
        for (size_t r = 0; r < plan_.rows.size(); ++r) {
            Row& row = plan_.rows[r];
            if (row.instruction != Instruction::recv) continue;
            std::vector<int> copies(row.count, 0);
            bool only_copies = true;
            for (size_t w = r + 1; plan_.rows[w].instruction != Instruction::release; ++w) {
                const Row& write = plan_.rows[w];
                if (write.instruction == Instruction::recv) continue;
                if (write.instruction == Instruction::reclaim || write.instruction == Instruction::send)
                    only_copies = false;
                else
                    for (uint32_t i = 0; i < write.count; ++i) {
                        const Operand& source = plan_.operands[write.first + i];
                        if (source.place != Place::message || source.index != row.reg) continue;
                        if (write.instruction == Instruction::copy && write.destination.place == Place::output)
                            ++copies[static_cast<size_t>(source.part)];
                        else
                            only_copies = false;
                    }
            }
            row.straight = only_copies && std::count(copies.begin(), copies.end(), 1) == static_cast<long>(row.count);
        }
    }
    int32_t next() {
        if (at_ >= code_.size()) refuse("it ends within an instruction");
        return code_[at_++];
    }
    uint32_t remaining() const { return static_cast<uint32_t>(code_.size() - at_); }
    uint32_t count(uint32_t least, uint32_t most) {
        const int32_t value = next();
        if (value < 0 || static_cast<uint32_t>(value) < least || static_cast<uint32_t>(value) > most)
            refuse("a count of " + std::to_string(value));
        return static_cast<uint32_t>(value);
    }
    void peer() {
        const int32_t value = next();
        if (value < 0 || value >= plan_.parameters.size + plan_.parameters.remotes || value == plan_.parameters.rank)
            refuse("a message to or from rank " + std::to_string(value));
        plan_.peers.push_back(static_cast<uint32_t>(value));
        partner_ = value;
    }
    void count_remote(const Row& row) {
        const auto is_remote = [&](uint32_t peer) { return peer >= static_cast<uint32_t>(plan_.parameters.size); };
        const auto first = plan_.peers.begin() + row.peers;
        const auto remote = static_cast<uint32_t>(std::count_if(first, plan_.peers.end(), is_remote));
        if (remote != 0 && remote != row.readers) refuse("a message to ranks in shared memory and others");
        remote_ += remote;
        plan_.most_remote = std::max(plan_.most_remote, remote_);
    }
    int32_t block() {
        const int32_t value = next();
        if (value < 0 || static_cast<size_t>(value) >= plan_.extents.size())
            refuse("block number " + std::to_string(value));
        return value;
    }
    Operand operand() {
        const int32_t place = next();
        Operand operand{static_cast<Place>(place), block(), next(), next()};
        const Extent& extent = plan_.extents[static_cast<size_t>(operand.block)];
        switch (operand.place) {
            case Place::input:
                inside(extent.count, extent.input, plan_.parameters.input_count);
                break;
            case Place::output:
                inside(extent.count, extent.output, plan_.parameters.output_count);
                break;
            case Place::scratch:
                if (operand.index < 0 || operand.index >= plan_.parameters.scratch) refuse("a scratch slot");
                break;
            case Place::message: {
                if (operand.index < 0 || static_cast<size_t>(operand.index) >= registers_.size() || operand.part < 0 ||
                    static_cast<uint32_t>(operand.part) >= parts_[static_cast<size_t>(operand.index)])
                    refuse("a part of a message that is not there");
                const uint32_t first = registers_[static_cast<size_t>(operand.index)];
                if (plan_.operands[first + static_cast<uint32_t>(operand.part)].block != operand.block)
                    refuse("a part of a message under another block's name");
                break;
            }
            default:
                refuse("place " + std::to_string(place));
        }
        return operand;
    }
    void operands(Row& row, uint32_t count, bool messages) {
        row.first = static_cast<uint32_t>(plan_.operands.size());
        row.count = count;
        for (uint32_t i = 0; i < count; ++i) {
            Operand one = operand();
            if (one.place == Place::message && !messages) refuse("a message sent on without a place of its own");
            plan_.operands.push_back(one);
        }
    }
    void check_writes(const Row& row) const {
        if (row.destination.place != Place::output && row.destination.place != Place::scratch)
            refuse("a write to a place that is not the output or scratch");
        for (uint32_t i = 0; i < row.count; ++i)
            if (plan_.operands[row.first + i].block != row.destination.block)
                refuse("an instruction that mixes blocks");
    }
    void inside(int64_t count, int64_t offset, int64_t available) const {
        if (offset < 0 || offset > available || count > available - offset)
            refuse("a block outside the buffer: offset " + std::to_string(offset) + ", " + std::to_string(count) +
                   " of " + std::to_string(available) + " elements");
    }

    Plan& plan_;
    const std::vector<int32_t>& code_;
    size_t at_ = 0;
    std::vector<uint32_t> sends_;      // their rows
    std::vector<uint32_t> registers_;  // first operand of the message in each register
    std::vector<uint32_t> parts_;
    uint32_t remote_ = 0;  // messages that the step sends to remote peers
    uint32_t steps_ = 0;
    int32_t partner_ = -1;  // of the step: of its last message
};

}  // namespace

Plan::Plan(PlanParameters given, uint32_t lanes_available, size_t slot_bytes)
    : parameters(std::move(given)), itemsize(size_of(parameters.type)) {
    if (parameters.table.size() % 3 != 0) refuse("the block table has not three columns");
    for (size_t i = 0; i < parameters.table.size(); i += 3) {
        extents.push_back({parameters.table[i], parameters.table[i + 1], parameters.table[i + 2]});
        if (extents.back().count < 0) refuse("a block of negative length");
    }
    if (parameters.names.size() != extents.size() || parameters.registers < 0 || parameters.remotes < 0)
        refuse("names or registers do not fit the table");
    if (parameters.segments > INT64_MAX / 4 / std::max<int64_t>(1, parameters.segment)) refuse("too many segments");
    if (parameters.segment < 1 || parameters.segments < 1 || parameters.lanes < 1 || parameters.scratch < 0 ||
        static_cast<uint32_t>(parameters.lanes) > lanes_available)
        refuse("segments or lanes out of range");
    const int64_t fitting = static_cast<int64_t>(slot_bytes / itemsize);
    if (parameters.segment > fitting) refuse("a segment that is longer than a slot");
    Parser(*this).parse();
    for (const Row& row : rows) {
        if (row.instruction != Instruction::send && row.instruction != Instruction::recv) continue;
        int64_t longest = 0;
        for (uint32_t i = 0; i < row.count; ++i) longest += elements(operands[row.first + i].block, 0);
        if (longest > fitting) refuse("a message that is longer than a slot");
        if (parameters.straight && row.instruction == Instruction::recv && !row.straight)
            refuse("a message of a straight plan does not go straight to the output");
        longest_message = std::max(longest_message, static_cast<size_t>(longest) * itemsize);
    }
    if ((parameters.op < Op::sum) || (parameters.op > Op::bxor)) refuse("an unknown operator");
}

int Plan::step_of(size_t row) const {
    return static_cast<int>(std::count_if(rows.begin(), rows.begin() + static_cast<std::ptrdiff_t>(row),
                                          [](const Row& r) { return r.instruction == Instruction::release; }));
}

std::string Plan::blocks_of(size_t row) const {
    std::string text;
    for (uint32_t i = 0; i < rows[row].count; ++i) {
        if (i == 4) return text + ", ...";
        if (i) text += ", ";
        text += parameters.names[static_cast<size_t>(operands[rows[row].first + i].block)];
    }
    return text;
}

}  // namespace abccl
