// What ranks have called, as others see it, and the words for what goes wrong with that.
#include <algorithm>
#include <cstdio>
#include <cstring>

#include "endpoint.hpp"
#include "failure.hpp"

namespace abccl {
namespace {

// "all_reduce(float32, ...)" -> "all_reduce".
std::string kind_of(const std::string& call) { return call.substr(0, call.find('(')); }

std::string seconds_ago(double seconds) {
    char text[32];
    std::snprintf(text, sizeof text, seconds < 10 ? "%.1f s" : "%.0f s", std::max(0.0, seconds));
    return text;
}

// "broadcast #16, finished 4.2 s ago"
std::string last_words(const Endpoint::Position& position) {
    if (position.entered == 0) return "nothing";
    const bool unfinished = position.finished < position.entered;
    std::string last =
        kind_of(position.last) + " #" + std::to_string(position.entered) + (unfinished ? ", unfinished" : ", finished");
    if (position.ago) last += (unfinished ? " for " : " ") + seconds_ago(*position.ago) + (unfinished ? "" : " ago");
    return last;
}

}  // namespace

void Endpoint::set_names(std::vector<uint32_t> names) {
    names_ = std::move(names);
    Flight& flight = recorder_.flight();
    flight.rank = static_cast<int32_t>(names_[rank_]);
    flight.size = static_cast<int32_t>(names_.size());
}

void Endpoint::set_group(const std::string& name, uint64_t token) {
    group_ = name;
    recorder_.flight().group.store(name);
    recorder_.flight().token = token;
}

uint64_t Endpoint::enter(uint32_t signature, const std::string& text, uint32_t text_number) {
    ++sequence_;
    signature_ = signature;
    text_ = &text;
    recorder_.begin(sequence_, signature, text_number);
    control_->entered.store(sequence_, std::memory_order_release);
    return sequence_;
}

uint64_t Endpoint::begin_call(uint32_t signature, const std::string& text, uint64_t bytes) {
    called_ = text;
    const uint64_t number = enter(signature, called_, recorder_.text(text, bytes));
    recorder_.started(number);
    return number;
}

void Endpoint::number_from_here() {
    before_users_ = sequence_;
    recorder_.flight().before_users.store(sequence_, std::memory_order_release);
}

std::string Endpoint::shown(uint64_t number) const {
    return std::to_string(number > before_users_ ? number - before_users_ : 0);
}

std::string Endpoint::title() const {
    // The recorder's copy: the plan may be gone.
    const auto present = read_operation(control_->flight, sequence_);
    if (!present) return "a call" + in_group();
    const size_t arguments = present->text.find('(');
    std::string title = kind_of(present->text) + " #" + shown(sequence_);
    if (arguments != std::string::npos) title += " " + present->text.substr(arguments);
    return title + in_group();
}

Endpoint::Position Endpoint::position(uint32_t peer) const {
    const Control& theirs = control(peer);
    Position position;
    const uint64_t entered = theirs.entered.load(std::memory_order_acquire);
    const uint64_t finished = theirs.finished.load(std::memory_order_acquire);
    position.closed = theirs.closed.load(std::memory_order_acquire) != 0;
    position.entered = entered > before_users_ ? entered - before_users_ : 0;
    position.finished = finished > before_users_ ? finished - before_users_ : 0;
    if (position.entered == 0) return position;
    if (const auto last = read_operation(theirs.flight, entered)) {
        const ClockReading now = clocks(control_->flight);
        const bool ended = last->end != 0;
        position.last = last->text;
        if (!ended && last->start == 0) return position;
        position.ago =
            static_cast<double>(now.ns) * 1e-9 - now.seconds((ended ? last->end : last->start) & ~has_failed);
    }
    return position;
}

std::string Endpoint::status_words(const Position& position) const {
    const std::string which = " #" + shown(sequence_);
    const uint64_t present = sequence_ > before_users_ ? sequence_ - before_users_ : 0;
    const std::string last = last_words(position);
    if (position.closed) return "which has closed (last: " + last + ")";
    if (position.entered < present) return "which has not entered" + which + " (last: " + last + ")";
    if (position.entered > present)
        return "which has gone on to " + position.last + " #" + std::to_string(position.entered);
    return position.finished < position.entered ? "which is in it too" : "which has finished it";
}

std::string Endpoint::whereabouts(uint32_t peer) const {
    const Position found = position(peer);
    return "; " + name(peer) + (found.closed ? " has closed; it called last: " : " called last: ") + last_words(found);
}

std::string Endpoint::stragglers(uint32_t except) const {
    constexpr size_t most = 3;
    std::string words;
    size_t more = 0;
    for (uint32_t other = 0, told = 0; other < geometry_.size; ++other) {
        if (other == except || other == rank_ || entered(other)) continue;
        if (told++ < most)
            words += "; " + name(other) + status(other).substr(std::string("which").size());
        else
            ++more;
    }
    return more ? words + "; and so are " + std::to_string(more) + " more" : words;
}

void Endpoint::mismatch(uint32_t peer, const std::string& detail) {
    check_abort();
    // The first difference is the cause: what went before may have exchanged no message between the two.
    const uint64_t oldest = sequence_ < recorded_operations ? 1 : sequence_ - recorded_operations + 1;
    for (uint64_t number = oldest; number <= sequence_; ++number) {
        const auto ours = read_operation(control_->flight, number),
                   theirs = read_operation(control(peer).flight, number);
        if (ours && theirs && ours->signature != theirs->signature)
            refuse_pair(number, ours->text, peer, "called " + theirs->text);
    }
    // All signatures agree, and the sizes do not: the peer may have gone on since.
    if (const auto same = read_operation(control(peer).flight, sequence_))
        refuse_pair(sequence_, *text_, peer, "called " + same->text + detail);
    const uint64_t entered = control(peer).entered.load(std::memory_order_acquire);
    const auto latest = read_operation(control(peer).flight, entered);
    refuse_pair(sequence_, *text_, peer,
                "is at " + (latest ? latest->text : "nothing") + " #" + shown(entered) + detail);
}

void Endpoint::refuse_pair(uint64_t number, const std::string& ours, uint32_t peer, const std::string& theirs) {
    fail(static_cast<uint32_t>(Kind::mismatch), "collective #" + shown(number) + in_group() + ": " + name(rank_) +
                                                    " called " + ours + ", " + name(peer) + " " + theirs +
                                                    ": all ranks must make the same calls in the same order");
}

void Endpoint::compare(uint32_t peer) {
    const OperationEntry& theirs = control(peer).flight.operations[sequence_ % recorded_operations];
    if (theirs.number.load(std::memory_order_acquire) != sequence_) return;
    if (theirs.signature.load(std::memory_order_acquire) == signature_) return;
    // Unless the entry was rewritten in between.
    if (theirs.number.load(std::memory_order_acquire) == sequence_) mismatch(peer, "");
}

void Endpoint::tell_time(uint32_t signature, float seconds) {
    uint32_t bits;
    std::memcpy(&bits, &seconds, sizeof bits);
    control(rank_).took.store(static_cast<uint64_t>(signature) << 32 | bits, std::memory_order_relaxed);
}

double Endpoint::time_of(uint32_t peer, uint32_t signature) const {
    const uint64_t told = control(peer).took.load(std::memory_order_relaxed);
    if (told >> 32 != signature) return 0;
    const uint32_t bits = static_cast<uint32_t>(told);
    float seconds;
    std::memcpy(&seconds, &bits, sizeof seconds);
    return static_cast<double>(seconds);
}

void Endpoint::publish(uint64_t round, const void* data, size_t bytes) {
    if (bytes > board_bytes) throw Failure(Kind::argument, "the board takes " + std::to_string(board_bytes) + " bytes");
    BoardSlot& slot = control_->board[round % 2];
    slot.round.store(0, std::memory_order_release);
    std::atomic_thread_fence(std::memory_order_seq_cst);
    slot.bytes = bytes;
    if (bytes) std::memcpy(slot.data, data, bytes);
    slot.round.store(round, std::memory_order_release);
}

std::pair<uint64_t, std::optional<std::string>> Endpoint::published(uint32_t peer, uint64_t round) const {
    const Control& theirs = control(peer);
    const uint64_t latest = std::max(theirs.board[0].round.load(std::memory_order_acquire),
                                     theirs.board[1].round.load(std::memory_order_acquire));
    const BoardSlot& slot = theirs.board[round % 2];
    if (slot.round.load(std::memory_order_acquire) != round) return {latest, std::nullopt};
    std::string data(reinterpret_cast<const char*>(slot.data), std::min<uint64_t>(slot.bytes, board_bytes));
    std::atomic_thread_fence(std::memory_order_acquire);
    if (slot.round.load(std::memory_order_relaxed) != round) return {latest, std::nullopt};
    return {latest, std::move(data)};
}

uint64_t Endpoint::decide(uint32_t question, uint64_t value) {
    if (question >= decisions_kept)
        throw Failure(Kind::argument, "there are " + std::to_string(decisions_kept) + " questions");
    if (value == 0) return control(0).decisions[question].load(std::memory_order_acquire);  // only asks
    uint64_t first = 0;
    return control(0).decisions[question].compare_exchange_strong(first, value, std::memory_order_acq_rel) ? value
                                                                                                           : first;
}

}  // namespace abccl
