// Copies bytes through the cache or past it.
#pragma once

#include <cstddef>

namespace abccl {

// Ordinary stores: the bytes end in this core's cache.
void copy(void* destination, const void* source, size_t bytes);

// Non-temporal stores, then a store fence: the bytes go to memory past the cache, and a store that follows becomes
// visible after them. The two ranges do not overlap. Where the CPU has no such stores this is copy().
void copy_streaming(void* destination, const void* source, size_t bytes);

}  // namespace abccl
