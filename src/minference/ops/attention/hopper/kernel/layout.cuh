// Shared memory of a block, and the rings that pass K, V and Q from the producer to the consumers.
#pragma once
#include "ptx.cuh"

constexpr int D = HEAD_DIM;
constexpr int TILE = 128;
constexpr int BLOCK = 64;
constexpr int STAGE_KEYS = 2 * BLOCK;
// a chunk holds rows of as many bytes as are swizzled together
constexpr int ROW_BYTES = D * ELEMENT_BYTES < 128 ? D * ELEMENT_BYTES : 128;
constexpr int ROW_ELEMENTS = ROW_BYTES / ELEMENT_BYTES;
constexpr int CHUNKS = D / ROW_ELEMENTS;
constexpr int CHUNK_BYTES = STAGE_KEYS * ROW_BYTES;
constexpr int STAGE_BYTES = CHUNKS * CHUNK_BYTES;
// e4m3 values of a stage: two blocks of D rows of 64 keys, in the order of triton_fp8.py
constexpr int TURNED_BYTES = STAGE_BYTES / 2;
constexpr int K_STAGES = KEY_STAGES;
constexpr int V_STAGES = VALUE_STAGES;
constexpr int Q_TILES = Q_BUFFERS;
constexpr int CONSUMERS = 2;
constexpr int CONSUMER_WARPS = 4 * CONSUMERS;
// Every lane arrives for itself: as fast as one for its warp, and what compute-sanitizer's racecheck
// can follow (docs/hopper.md).
#ifndef ARRIVING_LANES
#define ARRIVING_LANES 32
#endif
constexpr int THREADS = 128 * (CONSUMERS + 1);

constexpr int NO_KEY = 0x7FFFFFFF;

constexpr int HIDDEN = 0xFF800000; // bits of minus infinity

// How a consumer treats the scores of a stage: as they are, with a term added to each column, or
// by comparing the positions of keys and queries. Consumer c has the bits 2 c and 2 c + 1.
enum Mask { NONE = 0, ADD = 1, COMPARE = 2 };
constexpr int LAST_STAGE = 16; // of a query tile

struct Shared {
    alignas(1024) unsigned char q[Q_TILES][STAGE_BYTES];
    unsigned char k[K_STAGES][STAGE_BYTES];
    unsigned char v[V_STAGES][STAGE_BYTES];
    int key[K_STAGES][CONSUMERS][STAGE_KEYS]; // position or term of each key of a masked stage
    int flags[K_STAGES];
    Item item[Q_TILES];
    u64 q_full[Q_TILES], q_empty[Q_TILES];
    u64 k_full[K_STAGES], k_empty[K_STAGES];
    u64 v_full[V_STAGES], v_empty[V_STAGES];
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
