#include "flight.hpp"

#include <algorithm>
#include <cstring>

namespace abccl {

template <size_t words>
void SharedText<words>::store(const std::string& text) {
    uint64_t whole[words] = {};
    std::memcpy(whole, text.data(), std::min(text.size(), sizeof(whole) - 1));
    const size_t used = std::min<size_t>(words, text.size() / sizeof(uint64_t) + 1);
    for (size_t i = 0; i < used; ++i) word[i].store(whole[i], std::memory_order_release);
}

template <size_t words>
std::string SharedText<words>::load() const {
    uint64_t whole[words];
    for (size_t i = 0; i < words; ++i) whole[i] = word[i].load(std::memory_order_acquire);
    const char* characters = reinterpret_cast<const char*>(whole);
    size_t length = strnlen(characters, sizeof(whole));
    // A text that was cut off, or is being written, ends with a whole character of UTF-8.
    size_t start = length;
    while (start > 0 && length - start < 3 && (characters[start - 1] & 0xC0) == 0x80) --start;
    if (start > 0 && (characters[start - 1] & 0xC0) == 0xC0) {
        const unsigned char lead = static_cast<unsigned char>(characters[start - 1]);
        const size_t wanted = lead >= 0xF0 ? 3 : lead >= 0xE0 ? 2 : 1;
        if (length - start < wanted) length = start - 1;
    }
    return std::string(characters, length);
}

template struct SharedText<8>;
template struct SharedText<20>;
template struct SharedText<32>;
template struct SharedText<64>;

std::optional<Recorded> read_operation(const Flight& flight, uint64_t number) {
    const OperationEntry& entry = flight.operations[number % recorded_operations];
    if (number == 0 || entry.number.load(std::memory_order_acquire) != number) return std::nullopt;
    Recorded found{entry.signature.load(std::memory_order_acquire), "", 0, entry.start.load(std::memory_order_acquire),
                   entry.end.load(std::memory_order_acquire)};
    const uint32_t wanted = entry.text.load(std::memory_order_acquire);
    const CallText& text = flight.texts[wanted % recorded_texts];
    if (text.number.load(std::memory_order_acquire) == wanted) {
        found.bytes = text.bytes.load(std::memory_order_acquire);
        found.text = text.text.load();
    }
    if (entry.number.load(std::memory_order_acquire) != number) return std::nullopt;
    return found;
}

Recorder::Recorder(Flight& flight) : flight_(flight) {
    const ClockPair now = ClockPair::now();
    flight.began_ns.store(now.ns, std::memory_order_relaxed);
    flight.began_counted.store(now.counted, std::memory_order_relaxed);
    flight.magic.store(flight_magic, std::memory_order_release);
}

uint32_t Recorder::text(const std::string& text, uint64_t bytes) {
    if (known_.size() > recorded_operations) known_.clear();
    uint32_t& known = known_[text + '\0' + std::to_string(bytes)];
    return known = this->text(known, text, bytes);
}

uint32_t Recorder::add(const std::string& text, uint64_t bytes) {
    const uint32_t number = ++newest_text_;
    CallText& entry = flight_.texts[number % recorded_texts];
    entry.number.store(0, std::memory_order_relaxed);
    entry.bytes.store(bytes, std::memory_order_release);
    entry.text.store(text);
    entry.number.store(number, std::memory_order_release);
    return number;
}

void Recorder::step(uint64_t number, uint32_t lane, int64_t segment, uint32_t step, int32_t peer) {
    const uint64_t index = flight_.steps_ended.load(std::memory_order_relaxed);
    StepEntry& entry = flight_.steps[index % recorded_steps];
    entry.end.store(0, std::memory_order_relaxed);
    entry.number.store(static_cast<uint32_t>(number), std::memory_order_release);
    entry.segment.store(static_cast<uint32_t>(segment), std::memory_order_release);
    entry.step.store(static_cast<uint16_t>(step), std::memory_order_release);
    entry.lane.store(static_cast<uint16_t>(lane), std::memory_order_release);
    entry.peer.store(peer, std::memory_order_release);
    entry.end.store(now(), std::memory_order_release);
    flight_.steps_ended.store(index + 1, std::memory_order_release);
}

void Recorder::waits(uint64_t number, uint64_t moved, int32_t step, int32_t peer, const std::string& text) {
    WaitEntry& wait = flight_.wait;
    if (wait.number.load(std::memory_order_relaxed) == number && moved_ == moved) return;  // as before
    moved_ = moved;
    wait.number.store(0, std::memory_order_relaxed);
    wait.since.store(now(), std::memory_order_release);
    wait.step.store(step, std::memory_order_release);
    wait.peer.store(peer, std::memory_order_release);
    wait.text.store(text);
    wait.note.store("");
    wait.number.store(number, std::memory_order_release);
}

uint64_t Recorder::begin_message(bool sends, int32_t peer, int64_t tag, uint64_t bytes) {
    const uint64_t number = flight_.messages_begun.fetch_add(1, std::memory_order_relaxed) + 1;
    MessageEntry& entry = flight_.messages[number % recorded_messages];
    entry.number.store(0, std::memory_order_relaxed);
    entry.sends.store(sends, std::memory_order_release);
    entry.peer.store(peer, std::memory_order_release);
    entry.tag.store(tag, std::memory_order_release);
    entry.bytes.store(bytes, std::memory_order_release);
    entry.end.store(0, std::memory_order_release);
    entry.start.store(now(), std::memory_order_release);
    entry.number.store(number, std::memory_order_release);
    return number;
}

void Recorder::end_message(uint64_t number, int32_t peer, bool well) {
    MessageEntry& entry = flight_.messages[number % recorded_messages];
    if (number == 0 || entry.number.load(std::memory_order_relaxed) != number) return;  // others have come since
    if (peer != nobody) entry.peer.store(peer, std::memory_order_relaxed);
    entry.end.store(well ? now() : now() | has_failed, std::memory_order_release);
}

void Recorder::fail(const std::string& why) {
    if (failing_.exchange(true)) return;  // any thread may be the first
    flight_.failure.store(why);
    flight_.failed.store(now(), std::memory_order_release);
}

}  // namespace abccl
