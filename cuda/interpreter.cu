// The interpreter of a plan's table: one launch is one rank's run of a plan, and each block is a lane.
//
// The code and its meaning are of algorithms/plan.py. A message lies in a slot of the sender's workspace: of its lane,
// its receiver, and its number modulo `slots`. The sender copies the parts there, one behind the other, and tells the
// receiver how many messages have come; the receiver folds and copies straight out of the slot, and at RELEASE tells
// the sender how many it has read. A send waits until its slot has been read: the room for messages that replay proves
// schedules for. Nothing is lent, so RECLAIM has nothing to wait for.
//
// Messages are counted in the workspace, from run to run, so that a launch may be repeated in a graph.
#include "block.cuh"
#include "signals.cuh"

namespace abccl {

constexpr u32 sources_at_most = 64;    // of a fold
constexpr u32 registers_at_most = 64;  // messages that a step receives

enum Instruction : i32 { SEND, RECV, FOLD, COPY, SCALE, RELEASE, RECLAIM };
enum Place : i32 { INPUT, OUTPUT, SCRATCH, MESSAGE };

struct Extent {
    i64 count, input, output;
};

struct Operand {
    i32 place, block, index, part;
};

struct Plan {
    const i32* code;
    const Extent* table;
    char* scratch;
    i64 segment;  // elements of a block
    double factor;
    u32 length, segments, lanes;  // of the code; of the run
    u32 scratch_slots;            // of a lane
    i32 op;
    u32 padding;
};

// What the threads of a block share. The counts of messages are by peer.
struct Shared {
    u32 sent[ranks_at_most], received[ranks_at_most], taken[ranks_at_most];
    const char* messages[registers_at_most];
    const i32* blocks[registers_at_most];  // of each message, in the code
    const char* sources[sources_at_most];
};

template <class E>
class Lane {
  public:
    __device__ __forceinline__ Lane(const Call& call, u32 number, Shared& shared)
        : self_(*call.rank),
          plan_(*static_cast<const Plan*>(call.plan)),
          input_(call.input),
          output_(call.output),
          number_(number),
          own_(self_, self_.rank),
          shared_(shared) {}

    __device__ __forceinline__ void run() {
        for (u32 peer = threadIdx.x; peer < self_.size; peer += blockDim.x) {
            shared_.sent[peer] = own_.sent(number_)[peer];
            shared_.received[peer] = shared_.taken[peer] = own_.received(number_)[peer];
        }
        __syncthreads();
        for (segment_ = number_; segment_ < plan_.segments; segment_ += plan_.lanes)
            if (!run_segment()) return;
        for (u32 peer = threadIdx.x; peer < self_.size; peer += blockDim.x) {
            own_.sent(number_)[peer] = shared_.sent[peer];
            own_.received(number_)[peer] = shared_.received[peer];
        }
    }

  private:
    static constexpr u64 itemsize = sizeof(typename E::Stored);

    const Rank& self_;
    const Plan& plan_;
    const char* input_;
    char* output_;
    u32 number_;
    Workspace own_;
    Shared& shared_;
    u32 segment_ = 0, registers_ = 0;

    // Each instruction ends with a barrier. False: a wait was in vain.
    __device__ __forceinline__ bool run_segment() {
        registers_ = 0;
        for (const i32 *code = plan_.code, *end = code + plan_.length; code < end;) {
            switch (*code++) {
                case SEND:
                    if (!send(code)) return false;
                    break;
                case RECV:
                    if (!receive(code)) return false;
                    break;
                case FOLD:
                    fold_parts(code);
                    break;
                case COPY:
                    copy_part(code);
                    break;
                case SCALE:
                    scale_part(code);
                    break;
                case RELEASE:
                    release();
                    break;
                case RECLAIM:
                    code += 1 + *code;
            }
        }
        return true;
    }

    // tag, lends, peers n, peer * n, parts k, operand * k
    __device__ __forceinline__ bool send(const i32*& code) {
        const u32 readers = static_cast<u32>(code[2]);
        const i32* const peers = code + 3;
        const u32 parts = static_cast<u32>(peers[readers]);
        const i32* const operands = peers + readers + 1;
        code = operands + 4 * parts;
        u64 total = 0;
        for (u32 part = 0; part < parts; ++part) total += elements(operands[4 * part + 1]);
        if (segment_ > 0 && total == 0) return true;
        bool room = true;
        for (u32 i = threadIdx.x; i < readers; i += blockDim.x) {
            const u32 peer = static_cast<u32>(peers[i]);
            const u32 wanted = shared_.sent[peer] + 1 - slots;
            room = room && wait_until(self_, own_.taken(number_) + peer, wanted, Wait::room, number_, peer);
        }
        if (!__syncthreads_and(room)) return false;
        for (u32 i = 0; i < readers; ++i) {
            const u32 peer = static_cast<u32>(peers[i]);
            char* to = own_.slot(number_, peer, shared_.sent[peer]);
            for (u32 part = 0; part < parts; ++part) {
                const Operand operand = at(operands + 4 * part);
                const u64 count = elements(operand.block);
                copy<E>(to, address(operand), count);
                to += count * itemsize;
            }
        }
        __syncthreads();
        tell(peers, readers);
        __syncthreads();
        return true;
    }

    // That one more message has come.
    __device__ __forceinline__ void tell(const i32* peers, u32 readers) {
        for (u32 i = threadIdx.x; i < readers; i += blockDim.x) {
            const u32 peer = static_cast<u32>(peers[i]);
            store_release(Workspace(self_, peer).arrived(number_) + self_.rank, ++shared_.sent[peer]);
        }
    }

    // tag, peer, parts k, block * k
    __device__ __forceinline__ bool receive(const i32*& code) {
        const u32 peer = static_cast<u32>(code[1]), parts = static_cast<u32>(code[2]);
        const i32* const blocks = code + 3;
        code = blocks + parts;
        u64 total = 0;
        for (u32 part = 0; part < parts; ++part) total += elements(blocks[part]);
        const u32 number = registers_++;
        bool came = true;
        if (threadIdx.x == 0 && (segment_ == 0 || total > 0)) {
            const u32 message = shared_.received[peer]++;
            shared_.messages[number] = Workspace(self_, peer).slot(number_, self_.rank, message);
            shared_.blocks[number] = blocks;
            came = wait_until(self_, own_.arrived(number_) + peer, message + 1, Wait::message, number_, peer);
        }
        return __syncthreads_and(came);
    }

    // All that was received has been read.
    __device__ __forceinline__ void release() {
        for (u32 peer = threadIdx.x; peer < self_.size; peer += blockDim.x) {
            if (shared_.taken[peer] == shared_.received[peer]) continue;
            shared_.taken[peer] = shared_.received[peer];
            store_release(Workspace(self_, peer).taken(number_) + self_.rank, shared_.received[peer]);
        }
        registers_ = 0;
        __syncthreads();
    }

    // destination, sources k, operand * k
    __device__ __forceinline__ void fold_parts(const i32*& code) {
        const Operand destination = at(code);
        const u32 sources = static_cast<u32>(code[4]);
        const i32* const operands = code + 5;
        code = operands + 4 * sources;
        const u64 count = elements(destination.block);
        if (count == 0) return;
        for (u32 i = threadIdx.x; i < sources; i += blockDim.x) shared_.sources[i] = address(at(operands + 4 * i));
        __syncthreads();
        const Shared& shared = shared_;
        fold<E>(address(destination), sources, [&](u32 i) { return shared.sources[i]; }, plan_.op, count);
        __syncthreads();
    }

    // destination, source
    __device__ __forceinline__ void copy_part(const i32*& code) {
        const Operand destination = at(code), source = at(code + 4);
        code += 8;
        const u64 count = elements(destination.block);
        // Without elements there is perhaps no message.
        if (count != 0 && address(destination) != address(source))
            copy<E>(address(destination), address(source), count);
        __syncthreads();
    }

    __device__ __forceinline__ void scale_part(const i32*& code) {
        const Operand destination = at(code), source = at(code + 4);
        code += 8;
        const u64 count = elements(destination.block);
        if (count != 0) scale<E>(address(destination), address(source), plan_.factor, count);
        __syncthreads();
    }

    static __device__ __forceinline__ Operand at(const i32* code) { return {code[0], code[1], code[2], code[3]}; }

    // How many elements of the block lie in the segment.
    __device__ __forceinline__ u64 elements(i32 block) const {
        const i64 left = plan_.table[block].count - segment_ * plan_.segment;
        return static_cast<u64>(left < 0 ? 0 : left < plan_.segment ? left : plan_.segment);
    }

    __device__ __forceinline__ char* address(Operand operand) const {
        const Extent& extent = plan_.table[operand.block];
        const i64 before = segment_ * plan_.segment;
        switch (operand.place) {
            case INPUT:
                return const_cast<char*>(input_) + (extent.input + before) * static_cast<i64>(itemsize);
            case OUTPUT:
                return output_ + (extent.output + before) * static_cast<i64>(itemsize);
            case SCRATCH:
                return plan_.scratch +
                       (number_ * plan_.scratch_slots + static_cast<u32>(operand.index)) * scratch_bytes();
            default:
                u64 elements_before = 0;
                const i32* const blocks = shared_.blocks[operand.index];
                for (i32 part = 0; part < operand.part; ++part) elements_before += elements(blocks[part]);
                return const_cast<char*>(shared_.messages[operand.index]) + elements_before * itemsize;
        }
    }

    __device__ __forceinline__ u64 scratch_bytes() const {
        return (static_cast<u64>(plan_.segment) * itemsize + 15) / 16 * 16;
    }
};

template <class E>
__device__ __forceinline__ void interpret(const Calls& calls, u32 lanes) {
    ABCCL_SHARED(Shared, shared);
    const Call& call = calls.call[blockIdx.x / lanes];
    Lane<E>(call, blockIdx.x % lanes, shared).run();
}

}  // namespace abccl

// Of a grid of `lanes` blocks for each rank.
#define ABCCL_INTERPRETER(name, Element)                                               \
    extern "C" __global__ void __launch_bounds__(512, 1)                               \
        interpret_##name(const __grid_constant__ abccl::Calls calls, unsigned lanes) { \
        abccl::interpret<Element>(calls, lanes);                                       \
    }
ABCCL_KERNELS(ABCCL_INTERPRETER)
