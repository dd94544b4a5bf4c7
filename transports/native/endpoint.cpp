#include "endpoint.hpp"

#include <linux/futex.h>
#include <linux/membarrier.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <cstring>
#include <mutex>

#include "copy.hpp"
#include "failure.hpp"

namespace abccl {
namespace {

constexpr int tick_milliseconds = 20;

// A sender publishes and then looks whether the receiver sleeps; the receiver says that it sleeps and then looks
// whether something came. Both need a full fence between their two steps. membarrier puts the sender's fence into
// the (slow) receiver; where the kernel lacks it a sleep is short instead, as its wake-up may be missed.
bool use_membarrier() {
    static const bool registered = syscall(__NR_membarrier, MEMBARRIER_CMD_REGISTER_GLOBAL_EXPEDITED, 0, 0) == 0;
    return registered;
}

void fence_all() {
    std::atomic_thread_fence(std::memory_order_seq_cst);
    if (use_membarrier()) syscall(__NR_membarrier, MEMBARRIER_CMD_GLOBAL_EXPEDITED, 0, 0);
}

int open_process(int pid) {
#ifdef __NR_pidfd_open
    return static_cast<int>(syscall(__NR_pidfd_open, pid, 0));
#else
    (void)pid;
    return -1;
#endif
}

}  // namespace

std::function<void()> Endpoint::on_tick = [] {};

void Endpoint::set_on_tick(std::function<void()> function) { on_tick = std::move(function); }

Endpoint::Endpoint(uint32_t rank, Geometry geometry, std::shared_ptr<Region> own)
    : rank_(rank),
      geometry_(geometry),
      regions_(geometry.size),
      control_(reinterpret_cast<Control*>(own->base())),
      outgoing_(geometry.size * geometry.channels()),
      incoming_(geometry.size * geometry.channels()),
      multicast_(geometry.lanes * geometry.slots),
      multicast_next_(geometry.lanes, 0),
      process_handles_(geometry.size, -1),
      heaps_(geometry.size),
      recorder_(control_->flight) {
    if (own->bytes() != geometry.bytes()) throw Failure(Kind::transport, "the region's size is not the layout's");
    use_membarrier();
    regions_[rank] = std::move(own);
    control_->rank = rank;
    control_->size = geometry.size;
    control_->pid = getpid();
    recorder_.flight().rank = static_cast<int32_t>(rank);
    recorder_.flight().size = static_cast<int32_t>(geometry.size);
}

Endpoint::~Endpoint() {
    for (int handle : process_handles_)
        if (handle >= 0) ::close(handle);
}

void Endpoint::announce(uint64_t token) { control_->token.store(token, std::memory_order_release); }

void Endpoint::attach(uint32_t peer, std::shared_ptr<Region> region, uint64_t token) {
    regions_[peer] = std::move(region);
    Control& theirs = control(peer);
    if (theirs.token.load(std::memory_order_acquire) != token || theirs.rank != peer || theirs.size != geometry_.size)
        throw Failure(Kind::transport, "the shared memory found is not that of " + name(peer));
    if (theirs.pid != getpid()) process_handles_[peer] = open_process(theirs.pid);
    uint8_t* mine = regions_[rank_]->base();
    uint8_t* base = regions_[peer]->base();
    for (uint32_t lane = 0; lane < geometry_.channels(); ++lane) {
        Outgoing& out = outgoing_[geometry_.channel(peer, lane)];
        out.ring = reinterpret_cast<Descriptor*>(mine + geometry_.descriptor(peer, lane));
        out.arena = mine + geometry_.arena(peer, lane);
        out.cursors.resize(geometry_.slots);
        out.tail = &reinterpret_cast<Tail*>(base + geometry_.tail(rank_, lane))->value;
        Incoming& in = incoming_[geometry_.channel(peer, lane)];
        in.ring = reinterpret_cast<Descriptor*>(base + geometry_.descriptor(rank_, lane));
        in.tail = &reinterpret_cast<Tail*>(mine + geometry_.tail(peer, lane))->value;
    }
}

void Endpoint::write(uint8_t* destination, const Span* spans, size_t span_count, size_t bytes, size_t streaming_from) {
    const bool streaming = bytes >= streaming_from;
    for (size_t i = 0; i < span_count; ++i) {
        if (spans[i].bytes == 0) continue;
        if (streaming)
            copy_streaming(destination, spans[i].data, spans[i].bytes);
        else
            copy(destination, spans[i].data, spans[i].bytes);
        destination += spans[i].bytes;
    }
}

bool Endpoint::multicast_is_free(uint32_t lane) const {
    const uint32_t index = multicast_next_[lane] % geometry_.slots;
    for (auto [peer, number] : multicast_[lane * geometry_.slots + index].readers) {
        const Outgoing& out = outgoing_[geometry_.channel(peer, lane)];
        // Older than the room of its channel: read long ago, whatever the wrapped numbers say.
        if (out.next - number >= geometry_.slots) continue;
        if (static_cast<int32_t>(out.tail->load(std::memory_order_acquire) - number) < 0) return false;
    }
    return true;
}

bool Endpoint::has_room(const uint32_t* peers, uint32_t n, uint32_t lane) {
    for (uint32_t i = 0; i < n; ++i) {
        Outgoing& out = outgoing_[geometry_.channel(peers[i], lane)];
        if (out.next - out.seen_tail < geometry_.slots) continue;
        out.seen_tail = out.tail->load(std::memory_order_acquire);
        if (out.next - out.seen_tail >= geometry_.slots) return false;
    }
    return true;
}

Descriptor& Endpoint::next_descriptor(uint32_t peer, uint32_t lane, uint32_t signature, size_t bytes, uint32_t where) {
    Outgoing& out = outgoing_[geometry_.channel(peer, lane)];
    Descriptor& descriptor = out.ring[out.next % geometry_.slots];
    descriptor.signature = signature;
    descriptor.length = static_cast<uint32_t>(bytes);
    descriptor.where = where;
    return descriptor;
}

void Endpoint::publish(uint32_t peer, uint32_t lane) {
    Outgoing& out = outgoing_[geometry_.channel(peer, lane)];
    Descriptor& descriptor = out.ring[out.next % geometry_.slots];
    descriptor.sequence.store(++out.next, std::memory_order_release);
    ring_if_sleeping(control(peer));
}

bool Endpoint::try_send(const uint32_t* peers, uint32_t n, uint32_t lane, uint32_t signature, const Span* spans,
                        size_t span_count, size_t bytes, size_t streaming_from) {
    if (!has_room(peers, n, lane)) return false;
    const bool is_inline = bytes <= inline_bytes;
    uint8_t* slot = nullptr;
    if (!is_inline && n == 1) {
        Outgoing& out = outgoing_[geometry_.channel(peers[0], lane)];
        const uint32_t index = out.next % geometry_.slots;
        slot = out.arena + static_cast<size_t>(index) * geometry_.slot_bytes +
               out.cursors[index].place(bytes, geometry_.slot_bytes);
    } else if (!is_inline && !multicast_is_free(lane)) {
        // Each reader gets a copy in a slot of its own, for which there is room: replay proves schedules by the room
        // of pairs alone, so a multicast must never wait for more.
        for (uint32_t i = 0; i < n; ++i)
            try_send(&peers[i], 1, lane, signature, spans, span_count, bytes, streaming_from);
        return true;
    } else if (!is_inline) {
        const uint32_t index = multicast_next_[lane] % geometry_.slots;
        MulticastSlot& multicast = multicast_[lane * geometry_.slots + index];
        slot = regions_[rank_]->base() + geometry_.multicast(lane) + static_cast<size_t>(index) * geometry_.slot_bytes +
               multicast.cursor.place(bytes, geometry_.slot_bytes);
        multicast.readers.clear();
        for (uint32_t i = 0; i < n; ++i)
            multicast.readers.emplace_back(peers[i], outgoing_[geometry_.channel(peers[i], lane)].next + 1);
        ++multicast_next_[lane];
    }
    if (slot) write(slot, spans, span_count, bytes, streaming_from);
    const uint32_t where =
        is_inline ? inlined : static_cast<uint32_t>((slot - regions_[rank_]->base()) / static_cast<long>(cache_line));
    for (uint32_t i = 0; i < n; ++i) {
        uint8_t* to = next_descriptor(peers[i], lane, signature, bytes, where).payload;
        for (size_t s = 0; is_inline && s < span_count; ++s) {
            if (spans[s].bytes) std::memcpy(to, spans[s].data, spans[s].bytes);
            to += spans[s].bytes;
        }
        publish(peers[i], lane);
    }
    return true;
}

const Descriptor* Endpoint::try_receive(uint32_t peer, uint32_t lane) {
    Incoming& in = incoming_[geometry_.channel(peer, lane)];
    const Descriptor& descriptor = in.ring[in.next % geometry_.slots];
    if (descriptor.sequence.load(std::memory_order_acquire) != in.next + 1) return nullptr;
    ++in.next;
    return &descriptor;
}

const uint8_t* Endpoint::payload(uint32_t peer, const Descriptor& descriptor) {
    if (descriptor.where == inlined) {
        if (descriptor.length > inline_bytes) spoilt(peer);
        return descriptor.payload;
    }
    const size_t start = static_cast<size_t>(descriptor.where) * cache_line;
    if (start + descriptor.length > regions_[peer]->bytes()) spoilt(peer);
    return regions_[peer]->base() + start;
}

void Endpoint::spoilt(uint32_t peer) {
    fail(static_cast<uint32_t>(Kind::transport),
         name(rank_) + " found a message of " + name(peer) +
             " that lies outside of its memory: something has overwritten the memory that they share");
}

void Endpoint::release(uint32_t peer, uint32_t lane) {
    Incoming& in = incoming_[geometry_.channel(peer, lane)];
    in.tail->store(in.next, std::memory_order_release);
    ring_if_sleeping(control(peer));
}

bool Endpoint::gone(uint32_t peer) const {
    if (control(peer).closed.load(std::memory_order_acquire)) return true;
    const int pid = control(peer).pid;
    if (pid == getpid()) return false;
    if (process_handles_[peer] < 0) return kill(pid, 0) != 0 && errno == ESRCH;  // a kernel without pidfd
    pollfd handle{process_handles_[peer], POLLIN, 0};
    return poll(&handle, 1, 0) > 0;
}

void Endpoint::lost(uint32_t peer, const std::string& doing) {
    check_abort();
    const bool closed = control(peer).closed.load(std::memory_order_acquire);
    fail(static_cast<uint32_t>(Kind::peer_lost),
         name(peer) +
             (closed ? " closed its communicator" : " ended (process " + std::to_string(control(peer).pid) + ")") +
             " while " + name(rank_) + " waited in " + doing +
             (closed ? ": all ranks must make the same calls" : ": look at that rank's output for the reason"));
}

void Endpoint::check_collective() {
    check_abort();
    for (uint32_t peer = 0; peer < geometry_.size; ++peer) {
        if (peer == rank_) continue;
        compare(peer);
        // A peer that has finished its part may go: what it sent stays readable.
        if (gone(peer) && control(peer).finished.load(std::memory_order_acquire) < sequence_) lost(peer, title());
    }
}

void Endpoint::wait(const std::function<Outcome()>& progress, const std::function<void()>& tick, Patience patience) {
    int idle = 0;
    Deadline next_tick = Deadline::max();
    for (;;) {
        Outcome outcome = progress();
        if (outcome == Outcome::done) return;
        if (outcome == Outcome::moved) {
            idle = 0;
            continue;
        }
        check_abort();
        if (++idle < patience.spins) {
            cpu_relax();
        } else if (idle < patience.spins + patience.yields) {
            // A yield can cost a time slice of whoever shares the core.
            const Deadline now = Clock::now();
            if (idle == patience.spins || next_tick == Deadline::max())
                next_tick = now + std::chrono::milliseconds(tick_milliseconds);
            if (now > next_tick) {
                tick();
                next_tick = now + std::chrono::milliseconds(tick_milliseconds);
            }
            sched_yield();
        } else {
            Sleeper sleeper(*this);
            outcome = progress();
            if (outcome == Outcome::done) return;
            if (outcome == Outcome::blocked) sleeper.sleep(tick_milliseconds);
            tick();
        }
    }
}

Endpoint::Sleeper::Sleeper(Endpoint& endpoint) : endpoint_(endpoint) {
    endpoint_.control_->sleepers.fetch_add(1, std::memory_order_seq_cst);
    bell_ = endpoint_.control_->doorbell.load(std::memory_order_acquire);
    fence_all();
}

Endpoint::Sleeper::~Sleeper() { endpoint_.control_->sleepers.fetch_sub(1, std::memory_order_relaxed); }

void Endpoint::Sleeper::sleep(int milliseconds) {
    if (!use_membarrier()) milliseconds = 1;
    timespec timeout{milliseconds / 1000, (milliseconds % 1000) * 1000000L};
    syscall(__NR_futex, &endpoint_.control_->doorbell, FUTEX_WAIT, bell_, &timeout, nullptr, 0);
}

void Endpoint::ring(Control& control) {
    control.doorbell.fetch_add(1, std::memory_order_release);
    syscall(__NR_futex, &control.doorbell, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

void Endpoint::throw_abort() const {
    const uint32_t word = control_->abort.load(std::memory_order_acquire);
    const uint32_t culprit = (word & 0xFFFFFF) - 1;
    if (word >> 24 == static_cast<uint32_t>(Kind::closed))
        throw Failure(Kind::closed, "the communicator was closed while this operation was pending");
    if (culprit >= geometry_.size || word >> 24 > static_cast<uint32_t>(Kind::aborted) || word >> 24 == 0)
        throw Failure(Kind::transport, "something has overwritten the shared memory of " + name(rank_));
    const Control& theirs = control(culprit);
    throw Failure(static_cast<Kind>(word >> 24),
                  std::string(theirs.reason, strnlen(theirs.reason, sizeof(theirs.reason))));
}

void Endpoint::abort(uint32_t kind, const std::string& reason) noexcept {
    static std::mutex mutex;
    std::lock_guard<std::mutex> lock(mutex);
    uint32_t word = control_->abort.load(std::memory_order_acquire);
    // Who has closed has said goodbye: its own waits end, its peers find out if they wait for it.
    if (word >> 24 == static_cast<uint32_t>(Kind::closed)) return;
    if (word == 0) {
        const size_t length = std::min(reason.size(), sizeof(control_->reason) - 1);
        std::memcpy(control_->reason, reason.data(), length);
        control_->reason[length] = 0;
        const uint32_t mine = kind << 24 | (rank_ + 1);
        if (control_->abort.compare_exchange_strong(word, mine, std::memory_order_acq_rel)) word = mine;
    }
    for (uint32_t peer = 0; peer < geometry_.size; ++peer) {
        if (!regions_[peer]) continue;
        uint32_t none = 0;
        control(peer).abort.compare_exchange_strong(none, word, std::memory_order_acq_rel);
        ring(control(peer));
    }
}

void Endpoint::fail(uint32_t kind, const std::string& reason) {
    abort(kind, reason);
    throw_abort();
}

void Endpoint::close() {
    // Whoever has heard of an abort may leave before its author has told the others.
    if (control_->abort.load(std::memory_order_acquire) != 0) abort(0, "");
    control_->closed.store(1, std::memory_order_release);
    uint32_t none = 0;
    control_->abort.compare_exchange_strong(none, static_cast<uint32_t>(Kind::closed) << 24 | (rank_ + 1));
    ring(*control_);
    for (uint32_t peer = 0; peer < geometry_.size; ++peer)
        if (regions_[peer]) ring_if_sleeping(control(peer));
}

}  // namespace abccl
