// Kernels that know of bytes only: gather copies pieces of memory, and tick counts.
#include "fold.cuh"

namespace abccl {

struct Piece {
    char* destination;
    const char* source;
    u64 nbytes;
};

constexpr int pieces_at_most = 128;  // what a launch may take is 4,096 bytes

// Piece i is copied in tiles, those of the numbers [first[i], first[i + 1]).
struct Gather {
    u32 pieces;
    u32 first[pieces_at_most + 1];
    Piece piece[pieces_at_most];
};

struct Tick {
    u32* word;
};

constexpr u32 tile_bytes = 16384;

// The bytes [begin, end) of a piece by one block, in words where the destination is a multiple of a word's size.
template <class Word>
__device__ __forceinline__ void copy_tile(const Piece& piece, u64 begin, u64 end) {
    constexpr u32 depth = 4, size = sizeof(Word), stride = block_threads * size;
    const u64 before = (size - (reinterpret_cast<u64>(piece.destination) + begin) % size) % size;
    const u64 first = end - begin < before ? end : begin + before, last = end - (end - first) % size;
    for (u64 at = first + threadIdx.x * size; at < last; at += depth * stride) {
        Word word[depth];
#pragma unroll
        for (u32 d = 0; d < depth; ++d)
            if (at + d * stride < last) word[d] = *reinterpret_cast<const Word*>(piece.source + at + d * stride);
#pragma unroll
        for (u32 d = 0; d < depth; ++d)
            if (at + d * stride < last) *reinterpret_cast<Word*>(piece.destination + at + d * stride) = word[d];
    }
    for (u64 at = begin + threadIdx.x; at < first; at += block_threads) piece.destination[at] = piece.source[at];
    for (u64 at = last + threadIdx.x; at < end; at += block_threads) piece.destination[at] = piece.source[at];
}

}  // namespace abccl

extern "C" __global__ void __launch_bounds__(abccl::block_threads) gather(const __grid_constant__ abccl::Gather call) {
    using namespace abccl;
    for (u32 tile = blockIdx.x; tile < call.first[call.pieces]; tile += gridDim.x) {
        u32 i = 0;
        for (u32 beyond = call.pieces; beyond - i > 1;) {
            const u32 middle = (i + beyond) / 2;
            (call.first[middle] <= tile ? i : beyond) = middle;
        }
        const Piece& piece = call.piece[i];
        const u64 destination = reinterpret_cast<u64>(piece.destination);
        const u64 different = destination ^ reinterpret_cast<u64>(piece.source);
        // Tiles meet where the destination is a multiple of 16.
        const u64 past = destination % 16, number = tile - call.first[i];
        const u64 begin = number == 0 ? 0 : number * tile_bytes - past;
        const u64 next = (number + 1) * tile_bytes - past, end = next < piece.nbytes ? next : piece.nbytes;
        if (different % 16 == 0)
            copy_tile<uint4>(piece, begin, end);
        else if (different % 4 == 0)
            copy_tile<u32>(piece, begin, end);
        else if (different % 2 == 0)
            copy_tile<u16>(piece, begin, end);
        else
            copy_tile<u8>(piece, begin, end);
    }
}

// Adds 1 to a word, after all that the stream did before, for every device and the host to see.
extern "C" __global__ void tick(const __grid_constant__ abccl::Tick call) {
    __threadfence_system();
    atomicAdd_system(call.word, 1u);
}
