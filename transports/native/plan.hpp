// A plan as the native engine runs it: the table of algorithms/plan.py, parsed and checked once.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "protocol.hpp"
#include "types.hpp"

namespace abccl {

enum class Instruction : int32_t { send, recv, fold, copy, scale, release, reclaim };
enum class Place : int32_t { input, output, scratch, message };

struct Operand {
    Place place;
    int32_t block;
    int32_t index;  // scratch slot, or register
    int32_t part;   // of a message
};

struct Row {
    Instruction instruction;
    uint32_t tag;             // send, recv; release: the number of the step that it ends, from 1
    uint32_t first, count;    // operands (send: parts; recv: parts, as blocks; fold, copy, scale: sources), or
                              // reclaim: of `reclaims`
    uint32_t peers, readers;  // send: first of its peers, and how many; recv: the peer, and 1
    int32_t reg;              // recv: the register that it fills; release: a peer of the step, or -1
    uint32_t part;            // recv: number of its first part among all that the step receives
    bool lends;               // send: its parts may be read where they lie
    bool straight;            // recv: its parts are copied to the output before anything else happens to them
    Operand destination;      // fold, copy, scale
};

struct Extent {
    int64_t count, input, output;  // elements; an offset of -1 means that the block is not in that buffer
};

struct PlanParameters {
    std::vector<int32_t> code;
    std::vector<int64_t> table;
    int32_t size, rank;                 // of those that share memory
    int64_t input_count, output_count;  // elements of the user's buffers
    int32_t scratch, registers;
    int64_t segment, segments;
    int32_t lanes;
    bool straight = false;  // on every rank, messages go from the input of one to the output of another, and no further
    Type type;
    Op op;
    double factor;
    uint32_t signature;
    std::string text;
    std::vector<std::string> names;  // of blocks
    int32_t remotes = 0;             // peers that are numbered from `size` on
};

class Plan {
  public:
    // Throws Failure(argument) if the plan would make the engine touch memory outside the buffers, read scratch that
    // holds something else, take memory out of proportion to the code, or run without end.
    Plan(PlanParameters parameters, uint32_t lanes_available, size_t slot_bytes);

    int64_t elements(int32_t block, int64_t segment) const {
        const int64_t left = extents[static_cast<size_t>(block)].count - segment * parameters.segment;
        return left <= 0 ? 0 : left < parameters.segment ? left : parameters.segment;
    }
    size_t scratch_bytes() const {
        return static_cast<size_t>(parameters.lanes) * static_cast<size_t>(parameters.scratch) *
               static_cast<size_t>(parameters.segment) * itemsize;
    }
    // Number of the schedule's step that a row belongs to, from 0.
    int step_of(size_t row) const;
    std::string blocks_of(size_t row) const;

    PlanParameters parameters;
    size_t itemsize;
    uint64_t bytes = 0;  // of the larger of the user's buffers
    std::vector<Row> rows;
    std::vector<Operand> operands;
    std::vector<uint32_t> peers;
    std::vector<uint32_t> reclaims;  // rows of sends
    std::vector<Extent> extents;
    size_t max_parts = 1;   // of a message, or sources of a fold
    size_t step_parts = 0;  // of all messages that a step receives
    bool receives = false;
    bool lends = false;          // some send may be read in place
    size_t longest_message = 0;  // bytes
    uint32_t most_remote = 0;    // messages that a step sends to remote peers
    mutable Protocol protocol;   // a plan runs once at a time
    mutable Seen seen;
    mutable uint32_t text_number = 0;  // in the flight recorder
};

}  // namespace abccl
