// A consumer warpgroup: 64 query rows, online softmax between the two products.
#pragma once
#include "layout.cuh"

// Weights are multiplied by 2^RAISE and the row's largest one may have grown by 2^GROWTH before they
// follow: together at most 2^8 in e4m3, which ends at 448.
#if FP8
constexpr float GROWTH = 4.f, RAISE = 4.f;
constexpr int WEIGHT_WORDS = 16;
#else
constexpr float GROWTH = 8.f, RAISE = 0.f;
constexpr int WEIGHT_WORDS = 32;
#endif

struct Consumer {
    const Params& p;
    Shared& shared;
    int half, lane, warp;
    Ring<K_STAGES> k_ring;
    Ring<V_STAGES> v_ring;
    Ring<Q_TILES> q_ring;
    float factor; // scores to exponents of 2
    float unit, value_unit; // scale of the products and of the values of this tile's head; 1 but in e4m3

    // A row pair of this thread: rows r and r + 8 of the tile.
    struct Rows {
        float top[2], sum[2];
    };

    __device__ __forceinline__ void release(u64& empty) {
        __syncwarp(); // the reads of every lane come first
        if (lane < ARRIVING_LANES) barrier_arrive(shared_address(&empty));
    }

    // One warpgroup multiplies while the other one exponentiates.
    __device__ __forceinline__ void my_turn() { named_sync(2 + half, 256); }
    __device__ __forceinline__ void your_turn() { named_arrive(3 - half, 256); }

    __device__ __forceinline__ void scores(float (&s)[64], u32 q, int slot) {
        u32 k = shared_address(shared.k[slot]);
#pragma unroll
        for (int i = 0; i < D * ELEMENT_BYTES / 32; ++i) {
            u32 at = i / (ROW_BYTES / 32) * CHUNK_BYTES + i % (ROW_BYTES / 32) * 32;
            u64 rows = operand<ROW_BYTES>(q + at, 16), keys = operand<ROW_BYTES>(k + at, 16);
            if (i == 0)
                wgmma_scores<false>(s, rows, keys);
            else
                wgmma_scores<true>(s, rows, keys);
        }
        wgmma_commit();
    }

    // Added to o; in e4m3 they replace it, as the tensor cores' own sums keep some 14 bits only.
    __device__ __forceinline__ void values(float (&o)[D / 2], const u32 (&w)[WEIGHT_WORDS],
                                           int slot) {
        u32 v = shared_address(shared.v[slot]);
#if FP8
        wgmma_values<false>(o, w, operand<64>(v, 16));
        wgmma_values<true>(o, w + 4, operand<64>(v + 32, 16));
        wgmma_values<true>(o, w + 8, operand<64>(v + TURNED_BYTES, 16));
        wgmma_values<true>(o, w + 12, operand<64>(v + TURNED_BYTES + 32, 16));
#else
#pragma unroll
        for (int i = 0; i < STAGE_KEYS / 16; ++i)
            wgmma_values<true>(o, w + 4 * i, operand<128>(v + i * 2048, CHUNK_BYTES));
#endif
        wgmma_commit();
    }

    __device__ __forceinline__ void cap(float (&s)[64]) {
#if SOFTCAP
        // tanh through exp2: the approximate instruction is too coarse for logits
        float inner = 2.f * 1.4426950408889634f * p.scale * unit / p.softcap;
#pragma unroll
        for (int i = 0; i < 64; ++i) s[i] = 1.f - 2.f * reciprocal(1.f + exp2_fast(s[i] * inner));
#endif
    }

    __device__ __forceinline__ void add_terms(float (&s)[64], const int* keys) {
#pragma unroll
        for (int n = 0; n < 16; ++n) {
            float2 term = *reinterpret_cast<const float2*>(keys + 8 * n);
            s[4 * n] += term.x;
            s[4 * n + 1] += term.y;
            s[4 * n + 2] += term.x;
            s[4 * n + 3] += term.y;
        }
    }

    __device__ __forceinline__ void compare(float (&s)[64], const int* keys, int row, int window,
                                            int sink) {
#pragma unroll
        for (int n = 0; n < 16; ++n) {
            int2 key = *reinterpret_cast<const int2*>(keys + 8 * n);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int at = i & 1 ? key.y : key.x;
                int query = row + 8 * (i >> 1);
                bool hidden = at > query || (query - at >= window && at >= sink);
                if (hidden) s[4 * n + i] = __int_as_float(HIDDEN);
            }
        }
    }

    __device__ __forceinline__ void mask(float (&s)[64], int flags, int slot, int row, int window,
                                         int sink) {
        int own = flags >> 2 * half & 3;
        const int* keys = shared.key[slot][half] + lane % 4 * 2;
        if (own == ADD) add_terms(s, keys);
        if (own == COMPARE) compare(s, keys, row, window, sink);
    }

    // Exponentials in place. The shift follows the row's maximum only once that has grown by a
    // factor of 2^8, which leaves float32 sums exact enough and spares most rescaling. Returns
    // whether this warp must multiply what it summed before by `decay`.
    __device__ __forceinline__ bool softmax(float (&s)[64], Rows& rows, float (&decay)[2]) {
        float top[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float a = fmaxf(s[2 * r], s[2 * r + 1]), b = fmaxf(s[2 * r + 4], s[2 * r + 5]);
#pragma unroll
            for (int n = 2; n < 16; n += 2) {
                a = fmaxf(a, fmaxf(s[4 * n + 2 * r], s[4 * n + 2 * r + 1]));
                b = fmaxf(b, fmaxf(s[4 * n + 2 * r + 4], s[4 * n + 2 * r + 5]));
            }
            top[r] = fmaxf(a, b);
        }
#pragma unroll
        for (int lanes = 1; lanes <= 2; lanes *= 2)
#pragma unroll
            for (int r = 0; r < 2; ++r)
                top[r] = fmaxf(top[r], __shfl_xor_sync(~0u, top[r], lanes));
        bool grown = (top[0] - rows.top[0]) * factor > GROWTH ||
                     (top[1] - rows.top[1]) * factor > GROWTH;
        bool rescale = __any_sync(~0u, grown);
        if (rescale)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                top[r] = fmaxf(top[r], rows.top[r]);
                decay[r] = exp2_fast((rows.top[r] - top[r]) * factor);
                rows.top[r] = top[r];
                rows.sum[r] *= decay[r];
            }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float shift = rows.top[r] * factor - RAISE;
            float sum[2] = {rows.sum[r], 0.f};
#pragma unroll
            for (int n = 0; n < 16; ++n)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float& x = s[4 * n + 2 * r + i];
                    x = exp2_fast(fmaf(x, factor, -shift));
                    sum[i] += x;
                }
            rows.sum[r] = sum[0] + sum[1];
        }
        return rescale;
    }

    __device__ __forceinline__ void pack_weights(const float (&s)[64], u32 (&w)[WEIGHT_WORDS]) {
#if FP8
        // the values lie in the order in which a thread holds its weights of 16 keys
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            const float* x = s + i / 2 * 8 + i % 2 * 2;
            w[i] = pack_e4m3(x[0], x[1], x[4], x[5]);
        }
#else
#pragma unroll
        for (int i = 0; i < 32; ++i) w[i] = pack(s[2 * i], s[2 * i + 1]);
#endif
    }

    // Lane l of a quad gathers 8 neighbouring columns of group 4 m + l, to write 16 bytes at once.
    __device__ __forceinline__ uint4 gather(const u32 (&x)[4]) {
        int l = lane % 4;
        u32 y[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            // in round i lane l sends what lane l ^ i wants and receives its place l ^ i
            u32 sent = (l ^ i) == 0 ? x[0] : (l ^ i) == 1 ? x[1] : (l ^ i) == 2 ? x[2] : x[3];
            y[i] = i ? __shfl_xor_sync(~0u, sent, i) : sent;
        }
        auto from = [&](int lane_of) {
            int i = lane_of ^ l;
            return i == 0 ? y[0] : i == 1 ? y[1] : i == 2 ? y[2] : y[3];
        };
        return make_uint4(from(0), from(1), from(2), from(3));
    }

    __device__ __forceinline__ void store(const float (&o)[D / 2], const Rows& rows,
                                          const Item& item) {
        int first = __ldg(p.first + item.batch), queries = static_cast<int>(p.queries);
        int query_start = static_cast<int>(p.keys) - queries - first;
        int stop = __ldg(p.stop + item.batch) - first;
        i64 head = item.batch * p.heads + item.head;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float sum = rows.sum[r];
            sum += __shfl_xor_sync(~0u, sum, 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            int position = TILE * item.tile + 64 * half + 16 * warp + lane / 4 + 8 * r;
            int row = position - query_start;
            bool real = position >= 0 && position < stop && sum != 0.f;
            bool inside = row >= 0 && row < queries;
            float inverse = real ? value_unit / sum : 0.f;
            u16* out = p.out + (head * queries + row) * D + lane % 4 * 8;
#pragma unroll
            for (int m = 0; m < D / 32; ++m) {
                u32 x[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    int at = 4 * (4 * m + i) + 2 * r;
                    x[i] = real ? pack(o[at] * inverse, o[at + 1] * inverse) : 0u;
                }
                uint4 words = gather(x);
                if (inside) *reinterpret_cast<uint4*>(out + 32 * m) = words;
            }
            if (p.lse && inside && lane % 4 == 0)
                p.lse[head * queries + row] =
                    real ? (rows.top[r] * factor - RAISE + log2_fast(sum)) * 0.6931471805599453f
                         : __int_as_float(HIDDEN);
        }
    }

    __device__ __forceinline__ void add_part(float (&o)[D / 2], const float (&part)[D / 2]) {
#if FP8
#pragma unroll
        for (int i = 0; i < D / 2; ++i) o[i] += part[i];
#endif
    }

    __device__ __forceinline__ void set_units(const Item& item) {
        unit = value_unit = 1.f;
#if FP8
        i64 head = item.batch * p.heads + item.head;
        i64 kv_head = item.batch * p.kv_heads + item.head * p.kv_heads / p.heads;
        unit = __ldg(p.q_scale + head) * __ldg(p.k_scale + kv_head);
        value_unit = __ldg(p.v_scale + kv_head);
#endif
        factor = (SOFTCAP ? p.softcap : p.scale * unit) * 1.4426950408889634f;
    }

    __device__ __forceinline__ bool attend() {
        barrier_wait(shared_address(&shared.q_full[q_ring.slot]), q_ring.parity);
        Item item = shared.item[q_ring.slot];
        if (item.batch < 0) return false;
        u32 q = shared_address(shared.q[q_ring.slot]) + half * (CHUNK_BYTES / 2);
        int list_head = static_cast<int>(item.head * p.index_heads / p.heads);
        int window = __ldg(p.window + list_head), sink = __ldg(p.sink + list_head);
        int row = TILE * item.tile + 64 * half + 16 * warp + lane / 4;

        set_units(item);

        float s[64], o[D / 2];
#if FP8
        float part[D / 2]; // of one stage
#else
        float(&part)[D / 2] = o;
#endif
        u32 w[WEIGHT_WORDS];
        // finite, so that a row without keys yet needs no special case
        Rows rows = {{-1e30f, -1e30f}, {0.f, 0.f}};
        float decay[2];
#pragma unroll
        for (int i = 0; i < D / 2; ++i) o[i] = 0.f;

        barrier_wait(shared_address(&shared.k_full[k_ring.slot]), k_ring.parity);
        int flags = shared.flags[k_ring.slot];
        pin(s);
        wgmma_fence();
        scores(s, q, k_ring.slot);
        wgmma_wait<0>();
        pin(s);
        cap(s);
        mask(s, flags, k_ring.slot, row, window, sink);
        release(shared.k_empty[k_ring.slot]);
        k_ring.advance();
        softmax(s, rows, decay);
        pack_weights(s, w);

        while (!(flags & LAST_STAGE)) {
            barrier_wait(shared_address(&shared.k_full[k_ring.slot]), k_ring.parity);
            flags = shared.flags[k_ring.slot];
            pin(s);
            pin(part);
            my_turn();
            wgmma_fence();
            scores(s, q, k_ring.slot);
            barrier_wait(shared_address(&shared.v_full[v_ring.slot]), v_ring.parity);
            wgmma_fence();
            values(part, w, v_ring.slot);
            your_turn();
            wgmma_wait<1>();
            pin(s);
            cap(s);
            mask(s, flags, k_ring.slot, row, window, sink);
            release(shared.k_empty[k_ring.slot]);
            k_ring.advance();
            bool rescale = softmax(s, rows, decay);
            wgmma_wait<0>();
            pin(part);
            release(shared.v_empty[v_ring.slot]);
            v_ring.advance();
            pack_weights(s, w);
            add_part(o, part);
            if (rescale)
#pragma unroll
                for (int i = 0; i < D / 2; ++i) o[i] *= decay[i >> 1 & 1];
        }
        release(shared.q_empty[q_ring.slot]);
        q_ring.advance();

        barrier_wait(shared_address(&shared.v_full[v_ring.slot]), v_ring.parity);
        pin(part);
        wgmma_fence();
        values(part, w, v_ring.slot);
        wgmma_wait<0>();
        pin(part);
        add_part(o, part);
        release(shared.v_empty[v_ring.slot]);
        v_ring.advance();
        store(o, rows, item);
        return true;
    }

    __device__ __forceinline__ void run() {
        if (half == 1) your_turn();
        while (attend()) {
        }
    }
};
