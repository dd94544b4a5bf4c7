// How the native core reports that something failed: one exception type whose kind Python maps to its error tree.
#pragma once

#include <cstdint>
#include <iterator>
#include <stdexcept>
#include <string>

namespace abccl {

// The numbers travel through shared memory in the abort word, so zero means "not aborted".
enum class Kind : uint32_t { argument = 1, transport, closed, deadline, peer_lost, mismatch, aborted };

// As Python calls its error.
inline const char* kind_name(Kind kind) {
    constexpr const char* names[] = {"AbcclError",       "ArgumentError", "TransportError", "ClosedError",
                                     "DeadlineExceeded", "PeerLost",      "Mismatch",       "Aborted"};
    return static_cast<uint32_t>(kind) < std::size(names) ? names[static_cast<uint32_t>(kind)] : names[0];
}

class Failure : public std::runtime_error {
  public:
    Failure(Kind kind, const std::string& message) : std::runtime_error(message), kind(kind) {}
    const Kind kind;
};

}  // namespace abccl
