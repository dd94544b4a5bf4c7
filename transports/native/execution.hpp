// The engine: runs plans over an endpoint's channels, one program counter per lane, without ever waiting.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "endpoint.hpp"
#include "faults.hpp"
#include "plan.hpp"
#include "remote.hpp"

namespace abccl {

// Runs one plan at a time; its memory is kept from run to run.
class Execution {
  public:
    // Peers that are numbered behind the endpoint's are reached by `remote`.
    explicit Execution(Endpoint& endpoint, RemoteQueue* remote = nullptr) : endpoint_(endpoint), remote_(remote) {}

    // Enters the collective. The buffers must live until the run is done; the plan too.
    void start(const Plan& plan, const void* input, void* output);
    // Runs every lane as far as it goes. Throws Failure(mismatch) and aborts the endpoint.
    Outcome progress();
    // What the first blocked lane waits for.
    struct Wait {
        uint64_t moved;                // grows as the run gets on
        int32_t step;                  // from 1; 0 at the end of the plan
        std::optional<uint32_t> peer;  // numbered as the plan's peers
        std::string text;              // "waits at step 3 for block 1 from rank 1"
    };
    Wait waits_for() const;
    // That in words: of what collective, and how far the peer is.
    std::string blame() const;
    // Lets others read it, if the run has waited long since this was called first; or `at_once`.
    void publish_wait(bool at_once = false);

  private:
    struct Register {
        bool holds;           // a message, to be given back
        int64_t remote = -1;  // the buffer of a remote message, to be given back
        uint32_t peer;
        uint32_t first;                      // of the message's parts in `parts`
        std::unique_ptr<uint8_t[]> landing;  // of what is pulled
        size_t landing_bytes = 0;
    };
    struct Lane {
        int64_t segment;
        size_t row;
        uint8_t* scratch;
        std::vector<Register> registers;
        std::vector<const uint8_t*> parts;  // where each part of each register's message lies
        size_t filled;                      // registers in use
        std::vector<uint64_t> lent;  // beside the plan's peers: number of the last message lent to each, plus `is_lent`
    };
    static constexpr uint64_t is_lent = uint64_t{1} << 32;

    // The channels' lane that this lane of the plan runs on.
    uint32_t channel(uint32_t lane_index) const { return (first_lane_ + lane_index) % endpoint_.geometry().lanes; }
    // A run that was timed has taken so long.
    void took(double seconds);
    bool run(uint32_t lane_index);
    bool send(const Row& row, uint32_t lane_index, Lane& lane);
    bool receive(const Row& row, uint32_t lane_index, Lane& lane);
    void pass(faults::Point point);
    bool is_remote(uint32_t peer) const { return peer >= endpoint_.geometry().size; }
    bool send_remote(const Row& row, uint32_t lane_index, const Lane& lane, size_t bytes);
    bool receive_remote(const Row& row, uint32_t lane_index, Lane& lane, size_t bytes);
    // The remote message that the lane waits for, or null if it waits for something else.
    const RemoteMessage* remote_message(uint32_t lane_index, const Lane& lane) const;
    void release(uint32_t lane_index, Lane& lane);
    struct Unread {
        size_t row;  // of the send
        uint32_t peer;
    };
    // A message that was lent and that its reader has not given back: of those that the lane's row reclaims, or of all
    // if the lane is at the end.
    std::optional<Unread> unread(uint32_t lane_index, const Lane& lane) const;
    // Whether peers can read the buffers where they lie. What was found readable last is remembered.
    bool may_be_pulled(const Plan& plan, const void* input, const void* output);
    uint8_t* landing(Register& reg, size_t bytes);
    void write(const Operand& destination, const Lane& lane, size_t bytes, const uint8_t* from);
    void fold(const Row& row, const Lane& lane, size_t elements);
    uint8_t* address(const Operand& operand, const Lane& lane) const;
    // Bytes of a block, or of the blocks of a message: of the lane's segment, or whole.
    size_t block_bytes(int32_t block, const Lane& lane, bool whole) const;
    size_t message_bytes(const Row& row, const Lane& lane, bool whole) const;
    uint32_t signature(const Row& row, int64_t segment) const {
        return base_signature_ ^ (row.tag * 2654435761u + static_cast<uint32_t>(segment) * 40503u);
    }

    Endpoint& endpoint_;
    RemoteQueue* remote_;
    const Plan* plan_ = nullptr;
    const uint8_t* input_ = nullptr;
    uint8_t* output_ = nullptr;
    uint32_t base_signature_ = 0;
    uint32_t first_lane_ = 0;
    uint32_t unfinished_ = 0;
    bool measures_ = false;  // the plan wants to know how long this run takes
    // Straight plans may lend whole blocks with their first segments: one call of the kernel reads them. The other
    // segments then exchange no messages. Each sender decides at the start of a run; readers see it by the message.
    bool whole_ = false;
    std::vector<uint8_t> arrived_;    // by row: its blocks have come whole
    bool output_past_cache_ = false;  // what is copied to the output
    using Probed = std::tuple<const void*, const void*, size_t, size_t>;
    Probed probed_{};
    bool read_lent_ = false;  // this run has read what a peer lent
    bool records_steps_ = false;
    bool blocked_ = false;  // at the last look
    std::optional<Clock::time_point> waits_since_;
    Way way_{};
    size_t streaming_from_ = 0, lend_from_ = 0;
    Clock::time_point started_;
    std::vector<Lane> lanes_;
    std::vector<Span> spans_;
    std::vector<const void*> sources_;
    std::vector<uint32_t> numbers_;  // of the messages just lent
    std::unique_ptr<uint8_t[]> scratch_;
    size_t scratch_bytes_ = 0;
};

}  // namespace abccl
