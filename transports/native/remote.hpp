// Messages to and from ranks that shared memory does not reach: an execution queues them, and whoever drives it carries
// them over a network. Their memory is kept from run to run.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace abccl {

struct RemoteMessage {
    uint32_t id;
    bool sends;
    uint32_t peer;  // counted behind the ranks that share memory
    uint32_t lane;
    size_t row;  // of the plan
    int64_t segment;
    uint8_t* data;  // the carrier's header, then the parts
    size_t bytes;   // of both
};

class RemoteQueue {
  public:
    explicit RemoteQueue(size_t header_bytes) : header_bytes_(header_bytes) {}

    // A run begins, and nothing is under way.
    void begin(uint32_t lanes);
    // The number of a buffer for a message with so many bytes of parts.
    uint32_t take_buffer(size_t bytes);
    uint8_t* parts(uint32_t buffer) { return buffers_[buffer].start() + header_bytes_; }
    void give_back(uint32_t buffer) { free_.push_back(buffer); }
    // Queues the buffer's message. A sent one gives its buffer back once all that it was queued for have it.
    void post(bool sends, uint32_t peer, uint32_t lane, size_t row, int64_t segment, uint32_t buffer, size_t bytes);

    // What has been queued since the last call.
    std::vector<RemoteMessage> take();
    // The message has been carried.
    void complete(uint32_t id);

    // How many messages of the lane are to be received, and to be sent.
    uint32_t awaited(uint32_t lane) const { return awaited_[lane]; }
    uint32_t leaving(uint32_t lane) const { return leaving_[lane]; }
    // The lane's oldest message under way: one to be received, if there is such, or null.
    const RemoteMessage* first_pending(uint32_t lane) const;

  private:
    static constexpr uint32_t none = UINT32_MAX;
    struct Buffer {
        std::unique_ptr<uint8_t[]> memory;
        size_t bytes;
        uint32_t uses;  // messages that are sent from it
        uint8_t* start() const;
    };
    struct Pending {
        RemoteMessage message;
        uint32_t buffer;
        uint64_t order;
    };
    size_t header_bytes_;
    uint64_t posted_ = 0;
    std::vector<Buffer> buffers_;
    std::vector<uint32_t> free_;
    std::vector<Pending> pending_;  // by id
    std::vector<uint32_t> unused_;  // ids
    std::vector<RemoteMessage> fresh_;
    std::vector<uint32_t> awaited_, leaving_;
};

}  // namespace abccl
