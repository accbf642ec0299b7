// The producer warp: walks the tiles, decodes their lists and loads Q, K and V with TMA.
#pragma once
#include "layout.cuh"

struct Maps {
    const TensorMap &q, &k, &v, &column_k, &column_v;
};

// Two blocks of keys, or 128 packed columns, on their way into a stage.
struct Stage {
    int kind = 0;
    int a = 0, b = 0;   // entries 4 * block + halves; a packed row for columns
    int key[4] = {}; // what this lane writes for the keys of masked columns
    int mask = NONE;
};

enum { NOTHING = 0, BLOCKS = 1, COLUMNS = 2 };

struct Producer {
    const Params& p;
    const Maps& maps;
    Shared& shared;
    int lane;
    Ring<K_STAGES> k_ring;
    Ring<V_STAGES> v_ring;
    Ring<Q_TILES> q_ring;

    // the tile at work
    int tile, batch, kv_head, window, sink;
    int origin; // row of the first real key
    const u32* bits;
    int n_bits;
    Stage waiting;
    int v_kind = NOTHING, v_a, v_b;

    __device__ __forceinline__ bool in_offsets(int block) const {
        int bit = 2 * tile - block + 1;
        return bit < n_bits && (__ldg(bits + (bit >> 5)) >> (bit & 31) & 1);
    }

    __device__ __forceinline__ void load(const TensorMap& blocks, const TensorMap& columns,
                                         u32 to, u32 bar, int kind, int a, int b) {
        barrier_expect(bar, STAGE_BYTES);
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) {
            u32 at = to + c * CHUNK_BYTES;
            if (kind == BLOCKS) {
                load_4d(at, blocks, bar, ROW_ELEMENTS * c, origin + (a >> 2) * BLOCK, kv_head,
                        batch);
                load_4d(at + CHUNK_BYTES / 2, blocks, bar, ROW_ELEMENTS * c,
                        origin + (b >> 2) * BLOCK, kv_head, batch);
            } else {
                load_2d(at, columns, bar, ROW_ELEMENTS * c, a);
                load_2d(at + CHUNK_BYTES / 2, columns, bar, ROW_ELEMENTS * c, a + BLOCK);
            }
        }
    }

    // e4m3 values: [keys, D, block, head] of blocks, [keys, D] of packed columns
    __device__ __forceinline__ void load_turned(u32 to, u32 bar, int kind, int a, int b) {
        barrier_expect(bar, STAGE_BYTES);
        if (kind == BLOCKS) {
            int head = batch * static_cast<int>(p.kv_heads) + kv_head;
            load_4d(to, maps.v, bar, 0, 0, a >> 2, head);
            load_4d(to + TURNED_BYTES, maps.v, bar, 0, 0, b >> 2, head);
        } else {
            load_2d(to, maps.column_v, bar, a, 0);
            load_2d(to + TURNED_BYTES, maps.column_v, bar, a + BLOCK, 0);
        }
    }

    // the lanes that were not elected
    __device__ __forceinline__ void arrive_too(u64& full) {
        if (ARRIVING_LANES > 1) barrier_arrive(shared_address(&full));
    }

    __device__ __forceinline__ void load_v() {
        if (v_kind == NOTHING) return;
        int slot = v_ring.slot;
        barrier_wait(shared_address(&shared.v_empty[slot]), v_ring.parity ^ 1);
        if (elect_one()) {
            u32 to = shared_address(shared.v[slot]), bar = shared_address(&shared.v_full[slot]);
            if (FP8)
                load_turned(to, bar, v_kind, v_a, v_b);
            else
                load(maps.v, maps.column_v, to, bar, v_kind, v_a, v_b);
        } else {
            arrive_too(shared.v_full[slot]);
        }
        v_ring.advance();
        v_kind = NOTHING;
    }

    // what the rows of consumer `half` need for block entry `e`
    __device__ __forceinline__ int needs(int e, int half) const {
        int low = BLOCK * (e >> 2), row = TILE * tile + BLOCK * half;
        bool near = row + BLOCK - 1 - low < window || low + BLOCK - 1 < sink;
        if (!(e >> half & 1)) return ADD;
        return low + BLOCK - 1 > row || !near ? COMPARE : NONE;
    }

    __device__ __forceinline__ int block_mask(int a, int b) const {
        int mask = 0;
#pragma unroll
        for (int half = 0; half < CONSUMERS; ++half) {
            int both = needs(a, half) | needs(b, half);
            mask |= (both & COMPARE ? COMPARE : both) << 2 * half;
        }
        return mask;
    }

    __device__ __forceinline__ void write_keys(int mask, int slot) {
#pragma unroll
        for (int half = 0; half < CONSUMERS; ++half) {
            bool compare = mask >> 2 * half & COMPARE;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int entry = i < 2 ? waiting.a : waiting.b;
                int position = BLOCK * (entry >> 2) + lane + i % 2 * 32;
                bool chosen = entry >> half & 1;
                int key = compare ? (chosen ? position : NO_KEY) : (chosen ? 0 : HIDDEN);
                shared.key[slot][half][lane + 32 * i] =
                    waiting.kind == COLUMNS ? waiting.key[i] : key;
            }
        }
    }

    // K of the waiting stage, then V of the stage before it: the order in which they are used
    __device__ __forceinline__ void flush(bool last) {
        if (waiting.kind == NOTHING) return;
        int slot = k_ring.slot;
        int mask = waiting.kind == BLOCKS ? block_mask(waiting.a, waiting.b) : waiting.mask;
        barrier_wait(shared_address(&shared.k_empty[slot]), k_ring.parity ^ 1);
        if (mask) write_keys(mask, slot);
        if (lane == 0) shared.flags[slot] = mask | (last ? LAST_STAGE : 0);
        __syncwarp();
        if (elect_one())
            load(maps.k, maps.column_k, shared_address(shared.k[slot]),
                 shared_address(&shared.k_full[slot]), waiting.kind, waiting.a, waiting.b);
        else
            arrive_too(shared.k_full[slot]);
        k_ring.advance();
        load_v();
        v_kind = waiting.kind;
        v_a = waiting.a;
        v_b = waiting.b;
        waiting.kind = NOTHING;
    }

    __device__ __forceinline__ void push_blocks(int a, int b) {
        flush(false);
        waiting.kind = BLOCKS;
        waiting.a = a;
        waiting.b = b;
    }

    // Pairs the blocks of one sorted list into stages; `spare` is a block still without a partner.
    template <bool RELATIVE>
    __device__ __forceinline__ void walk_blocks(const int* list, int count, int& spare) {
        int ahead = lane < count ? __ldg(list + lane) : 0;
        for (int base = 0; base < count; base += 32) {
            int e = ahead;
            bool inside = base + lane < count;
            if (base + 32 + lane < count) ahead = __ldg(list + base + 32 + lane);
            int entry = RELATIVE ? 4 * (2 * tile - e) + 3 : e;
            inside = inside && (RELATIVE ? entry >= 0 : entry >> 2 <= 2 * tile + 1);
            bool finished = !__all_sync(~0u, inside);
            bool chosen = inside && (RELATIVE || ((entry & 3) && !in_offsets(entry >> 2)));
            for (u32 left = __ballot_sync(~0u, chosen); left; left &= left - 1) {
                int next = __shfl_sync(~0u, entry, __ffs(left) - 1);
                if (spare < 0) {
                    spare = next;
                } else {
                    push_blocks(spare, next);
                    spare = -1;
                }
            }
            if (finished) break;
        }
    }

    __device__ __forceinline__ void walk_columns(const int* list, int row, int count) {
        int end = TILE * (tile + 1);
        for (int base = 0; base < count; base += STAGE_KEYS) {
            if (__ldg(list + base) >= end) break;
            int key[4], mask = NONE;
            bool any = false;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int at = base + lane + 32 * i;
                key[i] = at < count ? __ldg(list + at) : NO_KEY;
                if (key[i] >= end || in_offsets(key[i] / BLOCK)) {
                    key[i] = NO_KEY;
                    mask |= ADD;
                } else {
                    any = true;
                    bool near = end - 1 - key[i] < window || key[i] < sink;
                    if (key[i] >= end - TILE || !near) mask |= COMPARE;
                }
            }
            if (!__any_sync(~0u, any)) continue;
            flush(false);
            mask = __reduce_or_sync(~0u, mask);
            mask = mask & COMPARE ? COMPARE : mask;
            waiting.kind = COLUMNS;
            waiting.mask = mask | mask << 2;
            waiting.a = row + base;
#pragma unroll
            for (int i = 0; i < 4; ++i)
                waiting.key[i] = mask == COMPARE ? key[i] : key[i] == NO_KEY ? HIDDEN : 0;
        }
    }

    __device__ __forceinline__ void walk(int list_head, int query_start) {
        int size = __ldg(p.group_tiles + list_head);
        int base = query_start > 0 ? query_start / TILE : 0;
        int group = tile / size - base / size;
        int h = batch * static_cast<int>(p.index_heads) + list_head;
        window = __ldg(p.window + list_head);
        sink = __ldg(p.sink + list_head);
        i64 offsets = h * p.offsets.groups + group, blocks = h * p.blocks.groups + group;
        int n_offsets = group < p.offsets.groups ? __ldg(p.offsets.count + offsets) : 0;
        int n_blocks = group < p.blocks.groups ? __ldg(p.blocks.count + blocks) : 0;
        int n_columns = __ldg(p.columns.count + h * p.columns.groups);
        bits = p.bits + (h * p.bit_groups + group) * p.bit_words;
        n_bits = n_offsets && group < p.bit_groups ? 32 * static_cast<int>(p.bit_words) : 0;
        int spare = -1;
        if (n_offsets)
            walk_blocks<true>(p.offsets.values + __ldg(p.offsets.start + offsets), n_offsets,
                              spare);
        if (n_blocks)
            walk_blocks<false>(p.blocks.values + __ldg(p.blocks.start + blocks), n_blocks, spare);
        if (spare >= 0) push_blocks(spare, spare & ~3);
        if (n_columns) {
            i64 start = __ldg(p.columns.start + h * p.columns.groups);
            int row = FP8 ? __ldg(p.column_place + h) : static_cast<int>(start);
            walk_columns(p.columns.values + start, row, n_columns);
        }
    }

    __device__ __forceinline__ void load_q(int head, int row) {
        int slot = q_ring.slot;
        u32 bar = shared_address(&shared.q_full[slot]);
        barrier_wait(shared_address(&shared.q_empty[slot]), q_ring.parity ^ 1);
        if (lane == 0) shared.item[slot] = {batch, head, tile};
        __syncwarp();
        if (elect_one()) {
            barrier_expect(bar, STAGE_BYTES);
#pragma unroll
            for (int c = 0; c < CHUNKS; ++c)
                load_4d(shared_address(shared.q[slot]) + c * CHUNK_BYTES, maps.q, bar,
                        ROW_ELEMENTS * c, row, head, batch);
        } else {
            arrive_too(shared.q_full[slot]);
        }
        q_ring.advance();
    }

    __device__ __forceinline__ void finish() {
        int slot = q_ring.slot;
        barrier_wait(shared_address(&shared.q_empty[slot]), q_ring.parity ^ 1);
        if (lane == 0) shared.item[slot].batch = -1;
        __syncwarp();
        if (lane < ARRIVING_LANES) barrier_arrive(shared_address(&shared.q_full[slot]));
    }

    // Items run kv head > query tile, longest first > head of the group: neighbours share K and V.
    __device__ __forceinline__ void run() {
        int share = static_cast<int>(p.heads / p.kv_heads), tiles = static_cast<int>(p.tiles);
        int per_batch = static_cast<int>(p.heads) * tiles;
        int total = static_cast<int>(p.batch) * per_batch;
        int next = 0;
        if (lane == 0) next = atomicAdd(p.next_item, 1);
        while (true) {
            int item = __shfl_sync(~0u, next, 0);
            if (item >= total) break;
            if (lane == 0) next = atomicAdd(p.next_item, 1);
            batch = item / per_batch;
            int rest = item % per_batch;
            kv_head = rest / (tiles * share);
            rest %= tiles * share;
            int head = kv_head * share + rest % share;
            int first = __ldg(p.first + batch);
            // e4m3 keys and values begin at the first real one
            origin = FP8 ? 0 : first;
            int query_start = static_cast<int>(p.keys - p.queries) - first;
            // floor division: the tiles of left padding are negative
            tile = (query_start >> 7) + tiles - 1 - rest / share;
            if (TILE * tile >= query_start + static_cast<int>(p.queries)) continue;
            load_q(head, TILE * tile - query_start);
            int list_head = static_cast<int>(head * p.index_heads / p.heads);
            bool real = tile >= 0 && TILE * tile < __ldg(p.stop + batch) - first;
            if (real) walk(list_head, query_start);
            // a tile without keys still passes one stage, masked everywhere
            if (waiting.kind == NOTHING) push_blocks(0, 0);
            flush(true);
            load_v();
        }
        finish();
    }
};
