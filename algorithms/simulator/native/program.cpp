#include "program.hpp"

#include <array>
#include <limits>
#include <stdexcept>

namespace abccl::simulator {

namespace {

// The numbers of algorithms/plan.py.
enum Instruction { send_code, recv_code, fold_code, copy_code, scale_code, release_code, reclaim_code };
enum Place { input, output, scratch, message };

struct Operand {
    int32_t place, index;
};

// The integers of a code, one after the other.
class Integers {
  public:
    Integers(const int32_t* begin, size_t count) : next_(begin), end_(begin + count) {}

    bool empty() const { return next_ == end_; }

    int32_t take() {
        if (empty()) throw std::invalid_argument("the code ends within an instruction");
        return *next_++;
    }

    // A number of what follows, each of so many integers.
    int32_t count(int32_t width) {
        const int32_t found = take();
        if (found < 0 || (end_ - next_) / width < found) throw std::invalid_argument("the code has a wrong count");
        return found;
    }

    void skip(int32_t count) { next_ += count; }

    Operand operand() {
        const int32_t place = take();
        take();
        const int32_t index = take();
        take();
        return {place, index};
    }

  private:
    const int32_t* next_;
    const int32_t* end_;
};

// What a step writes, by register. The code has it in the order of the ranks that the messages came from; here it is
// in that of the registers, which rotating the ranks does not change.
class Writes {
  public:
    void open() { blocks_.push_back({0, 0}); }

    size_t registers() const { return blocks_.size(); }

    void add(Operation::Kind kind, int32_t index) { ++blocks_[static_cast<size_t>(index)][kind == Operation::fold]; }

    void copy() { ++copied_; }

    // What has been added since, as operations.
    void flush(Program& program) {
        for (size_t index = 0; index < blocks_.size(); ++index)
            for (const auto kind : {Operation::receive, Operation::fold}) {
                append(program, kind, index, blocks_[index][kind == Operation::fold]);
                blocks_[index][kind == Operation::fold] = 0;
            }
        append(program, Operation::copy, 0, copied_);
        copied_ = 0;
    }

    void close() { blocks_.clear(); }

  private:
    static void append(Program& program, Operation::Kind kind, size_t index, int32_t blocks) {
        if (!blocks) return;
        Operation operation{kind};
        operation.index = static_cast<int32_t>(index);
        operation.blocks = blocks;
        program.push_back(operation);
    }

    std::vector<std::array<int32_t, 2>> blocks_;
    int32_t copied_ = 0;
};

}  // namespace

Reader::Reader(Symmetry symmetry, std::vector<int64_t> units, bool in_place, bool credits)
    : symmetry_(symmetry), units_(std::move(units)), in_place_(in_place), credits_(credits) {
    const auto& s = symmetry_;
    if (s.size < 1 || s.size > std::numeric_limits<int32_t>::max() || s.period < 1 || s.size % s.period)
        throw std::invalid_argument("the period must divide the number of ranks");
    if (s.mirrored && ((s.period & (s.period - 1)) || (s.size & (s.size - 1))))
        throw std::invalid_argument("mirrored ranks are powers of two");
    if (units_.empty() || units_.size() > 64) throw std::invalid_argument("a topology has 1 to 64 levels");
}

int16_t Reader::level(int64_t rank, int64_t peer) const {
    for (size_t level = 0; level < units_.size(); ++level)
        if (units_[level] == 0 || rank / units_[level] == peer / units_[level]) return static_cast<int16_t>(level);
    throw std::invalid_argument("two ranks are in no unit together");
}

int32_t Reader::channel(int64_t from, int64_t to) {
    const int64_t sender = symmetry_.representative(from);
    const auto key = static_cast<uint64_t>(sender * symmetry_.size + symmetry_.distance(from, to));
    const auto [found, is_new] = channels_.try_emplace(key, static_cast<int32_t>(receivers_.size()));
    if (is_new) receivers_.push_back(static_cast<int32_t>(symmetry_.representative(to)));
    return found->second;
}

Program Reader::read(int64_t rank, const int32_t* code, size_t count) {
    Program program;
    Integers integers(code, count);
    Writes writes;
    std::vector<int32_t> peers;

    const auto a_peer = [&] {
        const int32_t peer = integers.take();
        if (peer < 0 || peer >= symmetry_.size || peer == rank) throw std::invalid_argument("the code names no peer");
        return peer;
    };
    const auto between = [&](Operation::Kind kind, int64_t from, int64_t to, int32_t blocks) {
        Operation operation{kind};
        operation.peer = static_cast<int32_t>(from == rank ? to : from);
        operation.level = level(from, to);
        operation.index = channel(from, to);
        operation.blocks = blocks;
        return operation;
    };
    const auto write = [&](Operation::Kind kind, int32_t sources, const Operand& destination) {
        bool messages = false;
        bool moves = false;
        for (int32_t number = 0; number < sources; ++number) {
            const Operand source = integers.operand();
            if (source.place != message) {
                moves = moves || (number == 0 && source.place == input && destination.place == output);
                continue;
            }
            if (source.index < 0 || static_cast<size_t>(source.index) >= writes.registers())
                throw std::invalid_argument("no such register");
            messages = true;
            writes.add(kind, source.index);
        }
        if (!messages && !(moves && in_place_)) writes.copy();
    };

    while (!integers.empty()) {
        switch (integers.take()) {
            case send_code: {
                writes.flush(program);
                integers.take();
                const bool lends = integers.take() != 0;
                peers.resize(static_cast<size_t>(integers.count(1)));
                for (auto& peer : peers) peer = a_peer();
                const int32_t blocks = integers.count(4);
                integers.skip(4 * blocks);
                if (credits_)
                    for (const int32_t peer : peers) program.push_back(between(Operation::credit, rank, peer, 0));
                // What is put out for peers nearby, or lent to them, others do not see.
                for (const bool nearby : {true, false}) {
                    bool is_put = false;
                    for (const int32_t peer : peers) {
                        Operation post = between(Operation::post, rank, peer, blocks);
                        if ((post.level == 0) != nearby) continue;
                        post.lends = lends && nearby;
                        if (!is_put) {
                            Operation put{Operation::put};
                            put.lends = post.lends;
                            put.blocks = blocks;
                            program.push_back(put);
                            is_put = true;
                        }
                        program.push_back(post);
                    }
                }
                break;
            }
            case recv_code: {
                integers.take();
                const int32_t peer = a_peer();
                const int32_t blocks = integers.count(1);
                integers.skip(blocks);
                program.push_back(between(Operation::take, peer, rank, blocks));
                writes.open();
                break;
            }
            case fold_code: {
                const Operand destination = integers.operand();
                write(Operation::fold, integers.count(4), destination);
                break;
            }
            case copy_code: {
                const Operand destination = integers.operand();
                write(Operation::receive, 1, destination);
                break;
            }
            case scale_code:
                integers.operand();
                integers.operand();
                break;
            case release_code:
                writes.flush(program);
                if (writes.registers()) program.push_back(Operation{Operation::release});
                writes.close();
                break;
            case reclaim_code:
                integers.skip(integers.count(1));
                break;
            default:
                throw std::invalid_argument("the code has an unknown instruction");
        }
    }
    writes.flush(program);
    return program;
}

}  // namespace abccl::simulator
