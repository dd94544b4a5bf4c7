// What a fuzzer's bytes stand for: the plans of a host's ranks, how their messages travel, and a tape of further
// choices. plans.py writes the same format from real algorithms.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "plan.hpp"

namespace abccl::fuzz {

// Little-endian words one after the other; behind the end there are zeros.
class Input {
  public:
    Input(const uint8_t* data, size_t size) : at_(data), end_(data + size) {}
    template <class Word>
    Word take() {
        Word word{};
        const size_t now = std::min(sizeof(word), left());
        if (now) std::memcpy(&word, at_, now);
        at_ += now;
        return word;
    }
    template <class Word>
    std::vector<Word> many() {
        std::vector<Word> words(std::min<size_t>(take<uint16_t>(), left() / sizeof(Word)));
        for (Word& word : words) word = take<Word>();
        return words;
    }
    size_t left() const { return static_cast<size_t>(end_ - at_); }

  private:
    const uint8_t* at_;
    const uint8_t* end_;
};

class Output {
  public:
    template <class Word>
    void put(Word word) {
        const auto* bytes = reinterpret_cast<const uint8_t*>(&word);
        data.insert(data.end(), bytes, bytes + sizeof(word));
    }
    template <class Word>
    void many(const std::vector<Word>& words) {
        put(static_cast<uint16_t>(words.size()));
        for (Word word : words) put(word);
    }
    std::vector<uint8_t> data;
};

// What ints of a plan's header lie where: for who reads, writes and changes them.
constexpr std::array<int32_t PlanParameters::*, 6> ints = {&PlanParameters::size,    &PlanParameters::rank,
                                                           &PlanParameters::scratch, &PlanParameters::registers,
                                                           &PlanParameters::lanes,   &PlanParameters::remotes};
constexpr std::array<int64_t PlanParameters::*, 4> longs = {&PlanParameters::input_count, &PlanParameters::output_count,
                                                            &PlanParameters::segment, &PlanParameters::segments};

constexpr size_t most_ranks = 4;

struct Case {
    // Bits 0-2: 0 as the core likes, 1-4 one of `Way`. Bit 3: registered memory, 4: in place, 5: all goes past the
    // cache, 6: sends and receives beside.
    uint8_t way = 0;
    std::vector<PlanParameters> plans;  // of ranks 0, 1, ...
    std::vector<uint8_t> tape;

    static Case decode(const uint8_t* data, size_t size) {
        Input in(data, size);
        Case found;
        found.way = in.take<uint8_t>();
        found.plans.resize(1 + in.take<uint8_t>() % most_ranks);
        for (PlanParameters& p : found.plans) {
            for (auto field : ints) p.*field = in.take<int32_t>();
            for (auto field : longs) p.*field = in.take<int64_t>();
            p.type = static_cast<Type>(in.take<int8_t>());
            p.op = static_cast<Op>(in.take<int8_t>());
            p.straight = in.take<uint8_t>() & 1;
            p.names.resize(in.take<uint16_t>());
            p.code = in.many<int32_t>();
            p.table = in.many<int64_t>();
            p.factor = 0.5;
            p.signature = 77;
            p.text = "fuzz";
        }
        while (in.left()) found.tape.push_back(in.take<uint8_t>());
        return found;
    }

    std::vector<uint8_t> encode() const {
        Output out;
        out.put(way);
        out.put(static_cast<uint8_t>(plans.size() - 1));
        for (const PlanParameters& p : plans) {
            for (auto field : ints) out.put(p.*field);
            for (auto field : longs) out.put(p.*field);
            out.put(static_cast<int8_t>(p.type));
            out.put(static_cast<int8_t>(p.op));
            out.put(static_cast<uint8_t>(p.straight));
            out.put(static_cast<uint16_t>(p.names.size()));
            out.many(p.code);
            out.many(p.table);
        }
        out.data.insert(out.data.end(), tape.begin(), tape.end());
        return out.data;
    }
};

// Changes a case a little, most often so that its code still consists of instructions.
class Mutator {
  public:
    explicit Mutator(uint32_t seed) : random_(seed) {}

    void change(Case& found) {
        for (uint32_t changes = 1 + below(3); changes > 0; --changes) {
            PlanParameters& p = found.plans[below(found.plans.size())];
            switch (below(11)) {
                case 0:
                    found.way = static_cast<uint8_t>(random_());
                    break;
                case 1:
                    found.tape.resize(found.tape.size() + 8);
                    [[fallthrough]];
                case 2:
                    for (size_t i = 0; i < 8 && !found.tape.empty(); ++i)
                        found.tape[below(found.tape.size())] = static_cast<uint8_t>(random_());
                    break;
                case 3: {
                    int32_t& field = p.*ints[below(ints.size())];
                    field = static_cast<int32_t>(near(field));
                    break;
                }
                case 4: {
                    int64_t& field = p.*longs[below(longs.size())];
                    field = below(3) ? near(field) : field > 0 && field <= INT32_MAX ? 2 * field : 1;
                    break;
                }
                case 5:
                    if (!p.table.empty()) {
                        int64_t& word = p.table[below(p.table.size())];
                        word = near(word);
                    }
                    break;
                case 6:
                    if (below(4) == 0) p.type = static_cast<Type>(below(type_count + 2));
                    if (below(4) == 0) p.op = static_cast<Op>(below(op_count + 2));
                    if (below(4) == 0) p.straight = !p.straight;
                    if (below(4) == 0 && p.table.size() >= 3 && p.table.size() < 300) {  // another block
                        p.table.insert(p.table.end(), p.table.begin(), p.table.begin() + 3);
                        p.names.resize(p.table.size() / 3);
                    }
                    break;
                case 9:
                    recut(found);
                    break;
                case 7:
                case 8:
                    change_instructions(p.code, found.plans[below(found.plans.size())].code);
                    break;
                default:
                    if (!p.code.empty()) {
                        int32_t& word = p.code[below(p.code.size())];
                        word = static_cast<int32_t>(near(word));
                    }
            }
        }
    }

    uint32_t below(size_t end) { return static_cast<uint32_t>(random_() % end); }

  private:
    int64_t near(int64_t value) {
        switch (below(8)) {
            case 0:
                return static_cast<int64_t>(static_cast<uint64_t>(random_()) << below(40));
            case 1:
                return (below(2) ? INT64_MAX : int64_t{INT32_MAX}) - static_cast<int64_t>(below(3));
            case 2:
                return -1 - static_cast<int64_t>(below(3));
            case 3:
                return int64_t{1} << below(63);
            case 4:
            case 5:
                return below(8);
            default:
                return static_cast<int64_t>(static_cast<uint64_t>(value) + below(5) - 2);
        }
    }

    // Other segments, which all ranks agree on.
    void recut(Case& found) {
        const int64_t factor = 1 + below(4), part = 1 + below(4);
        for (PlanParameters& p : found.plans) {
            int64_t longest = 1;
            for (size_t i = 0; i < p.table.size(); i += 3) longest = std::max(longest, p.table[i]);
            p.segment = std::max<int64_t>(1, static_cast<int32_t>(p.segment) / part * factor);
            p.segments = (longest - 1) / p.segment + 1;
        }
    }

    // Where instructions begin, as far as the code makes sense; then its end.
    static std::vector<size_t> starts(const std::vector<int32_t>& code) {
        std::vector<size_t> found;
        size_t at = 0;
        const auto word = [&](size_t i) { return i < code.size() ? static_cast<uint32_t>(code[i]) % 4096 : 0; };
        while (at < code.size()) {
            found.push_back(at);
            switch (static_cast<Instruction>(code[at])) {
                case Instruction::send: {
                    const size_t parts = at + 4 + word(at + 3);
                    at = parts + 1 + 4 * word(parts);
                    break;
                }
                case Instruction::recv:
                    at += 4 + word(at + 3);
                    break;
                case Instruction::fold:
                    at += 6 + 4 * word(at + 5);
                    break;
                case Instruction::copy:
                case Instruction::scale:
                    at += 9;
                    break;
                case Instruction::reclaim:
                    at += 2 + word(at + 1);
                    break;
                default:
                    at += 1;
            }
        }
        found.push_back(code.size());
        return found;
    }

    // One taken out, or put elsewhere, from this code or another.
    void change_instructions(std::vector<int32_t>& code, const std::vector<int32_t>& other) {
        const std::vector<size_t> from = starts(other), to = starts(code);
        std::vector<int32_t> taken;
        if (from.size() > 1) {
            const size_t which = below(from.size() - 1);
            for (size_t i = from[which]; i < std::min(from[which + 1], other.size()); ++i) taken.push_back(other[i]);
        }
        if (to.size() > 1 && below(2)) {
            const size_t which = below(to.size() - 1);
            const auto begin = code.begin() + static_cast<std::ptrdiff_t>(to[which]);
            code.erase(begin, begin + static_cast<std::ptrdiff_t>(std::min(to[which + 1], code.size()) - to[which]));
            if (below(2)) return;
        }
        const size_t at = std::min(to[below(to.size())], code.size());
        if (code.size() < 4000) code.insert(code.begin() + static_cast<std::ptrdiff_t>(at), taken.begin(), taken.end());
    }

    std::mt19937 random_;
};

}  // namespace abccl::fuzz
