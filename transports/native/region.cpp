#include "region.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <map>
#include <mutex>

#include "failure.hpp"
#include "faults.hpp"

namespace abccl {
namespace {

// No process can change the length: what then touched the end would die of SIGBUS. (Pages may be given back.)
constexpr int seals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;

std::mutex created_mutex;

// Regions that this process created, by file descriptor.
std::map<int, std::weak_ptr<Region>>& created() {
    static auto* regions = new std::map<int, std::weak_ptr<Region>>();
    return *regions;
}

[[noreturn]] void refuse(const std::string& what) {
    throw Failure(Kind::transport, "shared memory: " + what + ": " + std::strerror(errno));
}

void refuse_if_injected(faults::Point point, int error, const std::string& what) {
    if (faults::pass(point) != faults::Action::refuse) return;
    errno = error;
    refuse(what);
}

void check_size(int fd, size_t bytes, const std::string& what) {
    struct stat status;
    if (fstat(fd, &status) != 0 || static_cast<size_t>(status.st_size) != bytes) {
        close(fd);
        throw Failure(Kind::transport, "shared memory: " + what + " is not the peer's memory: its size differs");
    }
}

void check_sealed(int fd, const std::string& what) {
    const int found = fcntl(fd, F_GET_SEALS);  // -1 of other files
    if (found >= 0 && (found & seals) == seals) return;
    close(fd);
    throw Failure(Kind::transport, "shared memory: " + what + " is not memory that a rank made: it is not sealed");
}

}  // namespace

Region::Region(int fd, size_t bytes, std::string name) : fd_(fd), bytes_(bytes), name_(std::move(name)) {
    void* address = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (address == MAP_FAILED) {
        close(fd);
        unlink_name();
        refuse("cannot map " + std::to_string(bytes) + " bytes");
    }
    base_ = static_cast<uint8_t*>(address);
}

Region::~Region() {
    munmap(base_, bytes_);
    {
        std::lock_guard<std::mutex> lock(created_mutex);
        auto found = created().find(fd_);
        if (found != created().end() && found->second.expired()) created().erase(found);
    }
    if (fd_ >= 0) close(fd_);
    unlink_name();
}

std::shared_ptr<Region> Region::attached(int fd, size_t bytes, const std::string& what) {
    check_size(fd, bytes, what);
    std::shared_ptr<Region> region(new Region(fd, bytes, ""));
    // The mapping stays, and many communicators want few descriptors.
    close(fd);
    region->fd_ = -1;
    return region;
}

void Region::unlink_name() {
    if (!name_.empty()) shm_unlink(name_.c_str());
    name_.clear();
}

void Region::forget(size_t offset, size_t bytes) {
    fallocate(fd_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(offset), static_cast<off_t>(bytes));
}

std::shared_ptr<Region> Region::create(size_t bytes, const char* label) {
    refuse_if_injected(faults::Point::create, ENOSPC, "memfd_create");
    int fd = memfd_create(label, MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0) refuse("memfd_create");
    // The kernel makes it with mode 0777.
    if (ftruncate(fd, static_cast<off_t>(bytes)) != 0 || fchmod(fd, 0600) != 0 || fcntl(fd, F_ADD_SEALS, seals) != 0) {
        const int error = errno;
        close(fd);
        errno = error;
        refuse("cannot reserve " + std::to_string(bytes) + " bytes");
    }
    std::shared_ptr<Region> region(new Region(fd, bytes, ""));
    std::lock_guard<std::mutex> lock(created_mutex);
    created()[fd] = region;
    return region;
}

std::shared_ptr<Region> Region::create_named(size_t bytes, const std::string& name) {
    refuse_if_injected(faults::Point::create, ENOSPC, "shm_open " + name);
    int fd = shm_open(name.c_str(), O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC, 0600);
    if (fd < 0) refuse("shm_open " + name);
    // Reserved at once: a full /dev/shm would be a bus error later.
    if ((errno = posix_fallocate(fd, 0, static_cast<off_t>(bytes))) != 0) {
        close(fd);
        shm_unlink(name.c_str());
        refuse("cannot reserve " + std::to_string(bytes) + " bytes");
    }
    return std::shared_ptr<Region>(new Region(fd, bytes, name));
}

std::shared_ptr<Region> Region::attach(int pid, int fd, size_t bytes) {
    if (pid == getpid()) {
        std::lock_guard<std::mutex> lock(created_mutex);
        auto found = created().find(fd);
        std::shared_ptr<Region> region = found == created().end() ? nullptr : found->second.lock();
        if (!region || region->bytes() != bytes)
            throw Failure(Kind::transport, "shared memory: this process has no region " + std::to_string(fd));
        return region;
    }
    std::string path = "/proc/" + std::to_string(pid) + "/fd/" + std::to_string(fd);
    refuse_if_injected(faults::Point::attach, EACCES, "cannot open " + path);
    int own = open(path.c_str(), O_RDWR | O_CLOEXEC);
    if (own < 0) refuse("cannot open " + path);
    check_sealed(own, path);
    return attached(own, bytes, path);
}

std::shared_ptr<Region> Region::attach_named(const std::string& name, size_t bytes) {
    refuse_if_injected(faults::Point::attach, EACCES, "cannot open " + name);
    int fd = shm_open(name.c_str(), O_RDWR | O_CLOEXEC, 0600);
    if (fd < 0) refuse("cannot open " + name);
    return attached(fd, bytes, name);
}

}  // namespace abccl
