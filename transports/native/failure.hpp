// How the native core reports that something failed: one exception type whose kind Python maps to its error tree.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace abccl {

// The numbers travel through shared memory in the abort word, so zero means "not aborted".
enum class Kind : uint32_t { argument = 1, transport, closed, deadline, peer_lost, mismatch, aborted };

class Failure : public std::runtime_error {
  public:
    Failure(Kind kind, const std::string& message) : std::runtime_error(message), kind(kind) {}
    const Kind kind;
};

}  // namespace abccl
