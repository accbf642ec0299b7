// Shared memory of a block, and the rings that pass K, V and Q from the producer to the consumers.
#pragma once
#include "ptx.cuh"

constexpr int D = HEAD_DIM;
constexpr int TILE = 128;
constexpr int BLOCK = 64;
constexpr int STAGE_KEYS = 2 * BLOCK;
constexpr int CHUNKS = D / 64;
constexpr int CHUNK_BYTES = STAGE_KEYS * 128;
constexpr int STAGE_BYTES = CHUNKS * CHUNK_BYTES;
constexpr int STAGES = KV_STAGES;
constexpr int Q_TILES = Q_BUFFERS;
constexpr int CONSUMERS = 2;
constexpr int CONSUMER_WARPS = 4 * CONSUMERS;
constexpr int THREADS = 128 * (CONSUMERS + 1);

constexpr int NO_KEY = 0x7FFFFFFF;

// flags of a stage: bits 0 and 1 ask for the mask in the rows of consumer 0 and 1
constexpr int LAST_STAGE = 4;

struct Shared {
    alignas(1024) unsigned char q[Q_TILES][STAGE_BYTES];
    unsigned char k[STAGES][STAGE_BYTES];
    unsigned char v[STAGES][STAGE_BYTES];
    int key[STAGES][CONSUMERS][STAGE_KEYS];
    int flags[STAGES];
    Item item[Q_TILES];
    u64 q_full[Q_TILES], q_empty[Q_TILES];
    u64 k_full[STAGES], k_empty[STAGES];
    u64 v_full[STAGES], v_empty[STAGES];
};

// Position in a ring of N slots; `parity` is the phase that a full slot completes.
template <int N>
struct Ring {
    int slot = 0;
    u32 parity = 0;

    __device__ __forceinline__ void advance() {
        if (++slot == N) {
            slot = 0;
            parity ^= 1;
        }
    }
};
