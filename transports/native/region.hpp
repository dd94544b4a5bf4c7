// Shared memory that one process creates and others of the same user on the same host attach to.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace abccl {

// A mapping, zero-filled when created. Pages are touched only when used. Nothing is left behind by a crash: the
// memory is an anonymous memfd that peers open through /proc, or a named object that is unlinked once all have it.
// Both are of mode 0600, and no process can change the length of a memfd.
class Region {
  public:
    // `label` is what /proc calls it.
    static std::shared_ptr<Region> create(size_t bytes, const char* label = "abccl");
    static std::shared_ptr<Region> create_named(size_t bytes, const std::string& name);
    // Within one process (ranks as threads) the creator's mapping itself is returned, so that ThreadSanitizer sees
    // both ends of a channel at one address.
    static std::shared_ptr<Region> attach(int pid, int fd, size_t bytes);
    static std::shared_ptr<Region> attach_named(const std::string& name, size_t bytes);

    ~Region();
    Region(const Region&) = delete;
    Region& operator=(const Region&) = delete;

    void unlink_name();
    // Gives the pages of a range back, for all who have mapped them; they are zero when touched again.
    void forget(size_t offset, size_t bytes);
    uint8_t* base() const { return base_; }
    size_t bytes() const { return bytes_; }
    // For peers to attach by; -1 of what was attached.
    int fd() const { return fd_; }

  private:
    Region(int fd, size_t bytes, std::string name);
    static std::shared_ptr<Region> attached(int fd, size_t bytes, const std::string& what);
    int fd_;
    size_t bytes_;
    std::string name_;
    uint8_t* base_ = nullptr;
};

}  // namespace abccl
