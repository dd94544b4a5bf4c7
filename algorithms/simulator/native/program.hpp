// What one rank does, for the event engine: the lowered code of a schedule without its operands.
#pragma once

#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <vector>

namespace abccl::simulator {

// How ranks stand for others. Rank r of the first `period` ranks stands for r + period, r + 2 period, ...: what a
// rank says to a peer depends on their distance, or, mirrored, on their exclusive or. period == size: for nobody else.
struct Symmetry {
    int64_t size;
    int64_t period;
    bool mirrored;

    int64_t distance(int64_t from, int64_t to) const { return mirrored ? from ^ to : (to - from + size) % size; }
    int64_t representative(int64_t rank) const { return rank % period; }
};

struct Operation {
    enum Kind : uint8_t {
        credit,   // wait for room for a message in `channel`
        put,      // put out `blocks`, for all of the next posts; once for peers of the first level, once for others
        post,     // a message of `blocks` into `channel`
        take,     // the next message of `channel`, into the next register
        receive,  // copy `blocks` of the message in register `index` to where they belong
        fold,     // fold them into a sum
        copy,     // copy `blocks` within the rank
        release,  // give back all registers
    };

    Kind kind;
    bool lends = false;  // put and post: may be read in place, at the first level only
    int16_t level = 0;   // post and take
    int32_t index = 0;   // a channel, or a register
    int32_t peer = -1;   // the rank at the other end
    int32_t blocks = 0;
};

using Program = std::vector<Operation>;

// Reads the code of all representatives (format: algorithms/plan.py) and numbers the channels between them.
class Reader {
  public:
    // units: of each level the ranks in one of its units, ascending; 0 for all. credits: whether messages need room.
    Reader(Symmetry symmetry, std::vector<int64_t> units, bool in_place, bool credits);

    // Throws std::invalid_argument where the code is none.
    Program read(int64_t rank, const int32_t* code, size_t count);

    // Of each channel the rank at its end.
    const std::vector<int32_t>& receivers() const { return receivers_; }

  private:
    int16_t level(int64_t rank, int64_t peer) const;
    int32_t channel(int64_t from, int64_t to);

    Symmetry symmetry_;
    std::vector<int64_t> units_;
    bool in_place_, credits_;
    std::unordered_map<uint64_t, int32_t> channels_;
    std::vector<int32_t> receivers_;
};

}  // namespace abccl::simulator
