// The engine: runs plans over an endpoint's channels, one program counter per lane, without ever waiting.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "endpoint.hpp"
#include "plan.hpp"

namespace abccl {

// Runs one plan at a time; its memory is kept from run to run.
class Execution {
  public:
    explicit Execution(Endpoint& endpoint) : endpoint_(endpoint) {}

    // Enters the collective. The buffers must live until the run is done; the plan too.
    void start(const Plan& plan, const void* input, void* output);
    // Runs every lane as far as it goes. Throws Failure(mismatch) and aborts the endpoint.
    Outcome progress();
    // What the first blocked lane waits for.
    std::string blame() const;

  private:
    struct Register {
        const uint8_t* data;
        uint32_t peer;
        uint32_t first;  // of the message's parts in `offsets`
    };
    struct Lane {
        int64_t segment;
        size_t row;
        uint8_t* scratch;
        std::vector<Register> registers;
        std::vector<size_t> offsets;  // in elements, of each part of each register's message
        size_t filled;                // registers in use
    };

    bool run(uint32_t lane_index);
    bool send(const Row& row, uint32_t lane_index, const Lane& lane);
    bool receive(const Row& row, uint32_t lane_index, Lane& lane);
    void release(uint32_t lane_index, Lane& lane);
    uint8_t* address(const Operand& operand, const Lane& lane) const;
    size_t message_elements(const Row& row, int64_t segment) const;
    uint32_t signature(const Row& row, int64_t segment) const {
        return base_signature_ ^ (row.tag * 2654435761u + static_cast<uint32_t>(segment) * 40503u);
    }

    Endpoint& endpoint_;
    const Plan* plan_ = nullptr;
    const uint8_t* input_ = nullptr;
    uint8_t* output_ = nullptr;
    uint32_t base_signature_ = 0;
    uint32_t unfinished_ = 0;
    bool adapts_ = false;  // the plan learns from this run
    size_t streaming_from_ = 0;
    Clock::time_point started_;
    std::vector<Lane> lanes_;
    std::vector<Span> spans_;
    std::vector<const void*> sources_;
    std::unique_ptr<uint8_t[]> scratch_;
    size_t scratch_bytes_ = 0;
};

}  // namespace abccl
