#include "plan.hpp"

#include <algorithm>

#include "failure.hpp"

namespace abccl {
namespace {

constexpr int32_t most_ranks = 1 << 23;  // an abort word has 24 bits for a rank

[[noreturn]] void refuse(const std::string& why) { throw Failure(Kind::argument, "the plan is broken: " + why); }

Type known(Type type) {
    if (type < Type::f16 || type > Type::c128) refuse("an unknown type");
    return type;
}

// Reads the code front to back and refuses what does not make sense.
class Parser {
  public:
    explicit Parser(Plan& plan)
        : plan_(plan),
          code_(plan.parameters.code),
          holds_(static_cast<size_t>(plan.parameters.scratch), -1),
          used_(plan.extents.size(), false) {}

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
                    check_peers(row);
                    operands(row, count(0, remaining()), false);
                    check_lent(row);
                    last_outward_ = plan_.rows.size();
                    break;
                case Instruction::recv:
                    row.tag = static_cast<uint32_t>(next());
                    plan_.receives = true;
                    row.readers = 1;
                    row.peers = static_cast<uint32_t>(plan_.peers.size());
                    peer();
                    if (static_cast<int32_t>(messages_.size()) >= plan_.parameters.registers)
                        refuse("more messages in a step than registers");
                    row.reg = static_cast<int32_t>(messages_.size());
                    row.first = static_cast<uint32_t>(plan_.operands.size());
                    row.count = count(0, remaining());
                    row.part = static_cast<uint32_t>(copies_.size());
                    for (uint32_t i = 0; i < row.count; ++i)
                        plan_.operands.push_back({Place::message, block(), row.reg, static_cast<int32_t>(i)});
                    copies_.resize(copies_.size() + row.count, 0);
                    messages_.push_back({plan_.rows.size(), row.first, row.count, row.part, true});
                    most_messages_ = std::max(most_messages_, messages_.size());
                    plan_.step_parts = std::max(plan_.step_parts, copies_.size());
                    break;
                case Instruction::fold:
                    write(row, true);
                    if (!defined(plan_.parameters.op, plan_.parameters.type))
                        refuse("a fold of what can not be folded");
                    break;
                case Instruction::copy:
                    write(row, false);
                    break;
                case Instruction::scale:
                    write(row, false);
                    if (!scalable(plan_.parameters.type)) refuse("a scaling of what can not be scaled");
                    break;
                case Instruction::release:
                    row.tag = ++steps_;
                    row.reg = partner_;
                    partner_ = -1;
                    find_straight();
                    messages_.clear();
                    copies_.clear();
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
                    last_outward_ = plan_.rows.size();
                    break;
                default:
                    refuse("unknown instruction " + std::to_string(static_cast<int>(row.instruction)));
            }
            if (row.instruction != Instruction::reclaim) plan_.max_parts = std::max<size_t>(plan_.max_parts, row.count);
            plan_.rows.push_back(row);
        }
        if (!messages_.empty()) refuse("the last step does not give its messages back");
        // What is declared and not used takes no memory.
        plan_.parameters.registers = static_cast<int32_t>(most_messages_);
        check_segments();
    }

  private:
    struct Message {
        size_t row;
        uint32_t first, count;  // operands
        uint32_t part;          // of the step
        bool only_copies;       // to the output
    };

    // A message whose every part is copied to the output, once, may be read to there at once: if nothing is sent or
    // reclaimed in between.
    void find_straight() {
        for (const Message& message : messages_) {
            const auto first = copies_.begin() + message.part;
            const bool once = std::all_of(first, first + message.count, [](uint8_t copies) { return copies == 1; });
            plan_.rows[message.row].straight = once && message.only_copies && message.row >= last_outward_;
        }
    }
    void write(Row& row, bool many) {
        row.destination = operand(false);
        operands(row, many ? count(1, remaining()) : 1, true);
        const Operand& to = row.destination;
        if (to.place != Place::output && to.place != Place::scratch)
            refuse("a write to a place that is not the output or scratch");
        if (to.place == Place::scratch) holds_[static_cast<size_t>(to.index)] = to.block;
        const bool straight = row.instruction == Instruction::copy && to.place == Place::output;
        for (uint32_t i = 0; i < row.count; ++i) {
            const Operand& source = plan_.operands[row.first + i];
            if (source.block != to.block) refuse("an instruction that mixes blocks");
            if (source.place != Place::message) continue;
            Message& message = messages_[static_cast<size_t>(source.index)];
            uint8_t& copies = copies_[message.part + static_cast<uint32_t>(source.part)];
            copies = static_cast<uint8_t>(std::min(2, copies + 1));
            message.only_copies &= straight;
        }
    }
    void check_peers(const Row& row) {
        const auto first = plan_.peers.begin() + row.peers;
        std::vector<uint32_t> sorted(first, plan_.peers.end());
        std::sort(sorted.begin(), sorted.end());
        if (std::adjacent_find(sorted.begin(), sorted.end()) != sorted.end()) refuse("a message twice to one rank");
        const auto is_remote = [&](uint32_t peer) { return peer >= static_cast<uint32_t>(plan_.parameters.size); };
        const auto remote = static_cast<uint32_t>(std::count_if(first, plan_.peers.end(), is_remote));
        if (remote != 0 && remote != row.readers) refuse("a message to ranks in shared memory and others");
        remote_ += remote;
        plan_.most_remote = std::max(plan_.most_remote, remote_);
    }
    // Whole blocks are lent at once, and scratch has one segment of them.
    void check_lent(const Row& row) const {
        for (uint32_t i = 0; row.lends && i < row.count; ++i)
            if (plan_.operands[row.first + i].place == Place::scratch) refuse("scratch that is lent");
    }
    // A block that is sent, received, written or within a buffer has its elements; others are empty. So what ends a run
    // is that all has been moved.
    void check_segments() const {
        const PlanParameters& p = plan_.parameters;
        int64_t longest = 1;
        for (size_t b = 0; b < plan_.extents.size(); ++b) {
            const Extent& e = plan_.extents[b];
            if (used_[b] || within(e.count, e.input, p.input_count) || within(e.count, e.output, p.output_count))
                longest = std::max(longest, e.count);
        }
        if (p.segments > (longest - 1) / p.segment + 1)
            refuse(std::to_string(p.segments) + " segments of " + std::to_string(p.segment) + " elements for " +
                   std::to_string(longest));
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
    int32_t block() {
        const int32_t value = next();
        if (value < 0 || static_cast<size_t>(value) >= plan_.extents.size())
            refuse("block number " + std::to_string(value));
        used_[static_cast<size_t>(value)] = true;
        return value;
    }
    Operand operand(bool reads = true) {
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
                if (reads && holds_[static_cast<size_t>(operand.index)] != operand.block)
                    refuse("a block read from scratch that does not hold it");
                break;
            case Place::message: {
                if (operand.index < 0 || static_cast<size_t>(operand.index) >= messages_.size() || operand.part < 0 ||
                    static_cast<uint32_t>(operand.part) >= messages_[static_cast<size_t>(operand.index)].count)
                    refuse("a part of a message that is not there");
                const uint32_t first = messages_[static_cast<size_t>(operand.index)].first;
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
    static bool within(int64_t count, int64_t offset, int64_t available) {
        return offset >= 0 && offset <= available && count <= available - offset;
    }
    void inside(int64_t count, int64_t offset, int64_t available) const {
        if (!within(count, offset, available))
            refuse("a block outside the buffer: offset " + std::to_string(offset) + ", " + std::to_string(count) +
                   " of " + std::to_string(available) + " elements");
    }

    Plan& plan_;
    const std::vector<int32_t>& code_;
    size_t at_ = 0;
    std::vector<int32_t> holds_;     // by scratch slot: the block
    std::vector<bool> used_;         // by block
    std::vector<uint32_t> sends_;    // their rows
    std::vector<Message> messages_;  // by register
    std::vector<uint8_t> copies_;    // of each part that the step receives; 2 are many
    size_t most_messages_ = 0;       // of a step
    size_t last_outward_ = 0;        // the last row that sends or reclaims
    uint32_t remote_ = 0;            // messages that the step sends to remote peers
    uint32_t steps_ = 0;
    int32_t partner_ = -1;  // of the step: of its last message
};

}  // namespace

Plan::Plan(PlanParameters given, uint32_t lanes_available, size_t slot_bytes)
    : parameters(std::move(given)), itemsize(size_of(known(parameters.type))) {
    const PlanParameters& p = parameters;
    const auto most = INT64_MAX / 2 / static_cast<int64_t>(itemsize);
    if (p.size < 1 || p.size > most_ranks || p.rank < 0 || p.rank >= p.size || p.remotes < 0 || p.remotes > most_ranks)
        refuse("rank " + std::to_string(p.rank) + " of " + std::to_string(p.size) + " and " +
               std::to_string(p.remotes));
    if (p.input_count < 0 || p.input_count > most || p.output_count < 0 || p.output_count > most)
        refuse("buffers that no memory holds");
    bytes = static_cast<uint64_t>(std::max(p.input_count, p.output_count)) * itemsize;
    if (p.op < Op::sum || p.op > Op::bxor) refuse("an unknown operator");
    // A slot is there to be written, by an instruction of nine integers.
    if (p.scratch < 0 || static_cast<size_t>(p.scratch) > p.code.size() / 9) refuse("more scratch than the code fills");
    if (parameters.table.size() % 3 != 0) refuse("the block table has not three columns");
    for (size_t i = 0; i < parameters.table.size(); i += 3) {
        extents.push_back({parameters.table[i], parameters.table[i + 1], parameters.table[i + 2]});
        if (extents.back().count < 0 || extents.back().count > most) refuse("a block of impossible length");
    }
    if (parameters.names.size() != extents.size() || parameters.registers < 0)
        refuse("names or registers do not fit the table");
    if (parameters.segments > INT64_MAX / 4 / std::max<int64_t>(1, parameters.segment)) refuse("too many segments");
    if (parameters.segment < 1 || parameters.segments < 1 || parameters.lanes < 1 ||
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
