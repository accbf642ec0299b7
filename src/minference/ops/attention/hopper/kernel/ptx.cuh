// Thin wrappers of the sm_90a instructions that the kernel uses: mbarrier, TMA, wgmma.
#pragma once

#include "params.cuh"

__device__ __forceinline__ u32 shared_address(const void* p) {
    return static_cast<u32>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void barrier_init(u32 bar, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}

__device__ __forceinline__ void barrier_expect(u32 bar, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void barrier_arrive(u32 bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}

__device__ __forceinline__ bool barrier_try(u32 bar, u32 parity) {
    u32 done;
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(bar), "r"(parity)
        : "memory");
    return done != 0;
}

__device__ __forceinline__ void barrier_wait(u32 bar, u32 parity) {
#ifdef SPIN_LIMIT
    for (int spins = 0; !barrier_try(bar, parity); ++spins)
        if (spins > SPIN_LIMIT) __trap();
#else
    while (!barrier_try(bar, parity)) {
    }
#endif
}

// True in one lane of a converged warp; unlike a test of the lane number it tells the compiler that
// the branch runs in a single lane, so that TMA operands need no loop over the lanes.
__device__ __forceinline__ bool elect_one() {
    u32 chosen;
    asm volatile(
        "{\n.reg .pred p;\n"
        "elect.sync _|p, 0xFFFFFFFF;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(chosen));
    return chosen != 0;
}

__device__ __forceinline__ void named_sync(u32 id, u32 threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_arrive(u32 id, u32 threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void load_4d(u32 to, const TensorMap& map, u32 bar, int x, int row,
                                        int head, int batch) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to),
        "l"(&map), "r"(bar), "r"(x), "r"(row), "r"(head), "r"(batch)
        : "memory");
}

__device__ __forceinline__ void load_2d(u32 to, const TensorMap& map, u32 bar, int x, int row) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%3, %4}], [%2];" ::"r"(to),
        "l"(&map), "r"(bar), "r"(x), "r"(row)
        : "memory");
}

// Operand in shared memory, rows of 128 or 64 bytes swizzled together, groups of 8 rows one after
// another. `chunk` is the distance in bytes of chunks along N; read for transposed B only.
template <int BYTES>
__device__ __forceinline__ u64 operand(u32 address, u32 chunk) {
    static_assert(BYTES == 128 || BYTES == 64, "swizzled rows");
    return static_cast<u64>((address & 0x3FFFF) >> 4) | static_cast<u64>(chunk >> 4) << 16 |
           static_cast<u64>(8 * BYTES >> 4) << 32 | (BYTES == 128 ? 1ull : 2ull) << 62;
}

__device__ __forceinline__ void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// keeps the compiler from moving uses of an accumulator across asynchronous products
template <int N>
__device__ __forceinline__ void pin(float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

#define F4(x, i) "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3])
#define F16(x, i) F4(x, i), F4(x, i + 4), F4(x, i + 8), F4(x, i + 12)
#define F32(x) F16(x, 0), F16(x, 16)
#define F64(x) F32(x), F16(x, 32), F16(x, 48)

#define REGS_32                                                                    \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,"  \
    "%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}"
#define REGS_64                                                                    \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,"  \
    "%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39," \
    "%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58," \
    "%59,%60,%61,%62,%63}"

#if FP8
// K has 32 elements; neither factor may be transposed
#define WGMMA_SCORES "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 "
#define WGMMA_VALUES(N) "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 "
#define SCORES_FLAGS ", add, 1, 1;"
#define VALUES_FLAGS ", add, 1, 1;"
#else
#define WGMMA_SCORES "wgmma.mma_async.sync.aligned.m64n128k16.f32." ELEMENT "." ELEMENT " "
#define WGMMA_VALUES(N) "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." ELEMENT "." ELEMENT " "
#define SCORES_FLAGS ", add, 1, 1, 0, 0;"
#define VALUES_FLAGS ", add, 1, 1, 1;"
#endif

// scores[64, 128] (+)= a[64, K] b[128, K]^T, both from shared memory
template <bool ADD>
__device__ __forceinline__ void wgmma_scores(float (&d)[64], u64 a, u64 b) {
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\n"
                 WGMMA_SCORES REGS_64 ", %64, %65" SCORES_FLAGS "\n}"
                 : F64(d)
                 : "l"(a), "l"(b), "n"(ADD ? 1 : 0));
}

// out[64, D] (+)= p[64, K] v[K, D], p from registers, v with its rows along K, but e4m3 values turned
template <bool ADD>
__device__ __forceinline__ void wgmma_values(float (&d)[64], const u32* p, u64 b) {
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %69, 0;\n" WGMMA_VALUES(128) REGS_64
                 ", {%64, %65, %66, %67}, %68" VALUES_FLAGS "\n}"
                 : F64(d)
                 : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "l"(b), "n"(ADD ? 1 : 0));
}

template <bool ADD>
__device__ __forceinline__ void wgmma_values(float (&d)[32], const u32* p, u64 b) {
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %37, 0;\n" WGMMA_VALUES(64) REGS_32
                 ", {%32, %33, %34, %35}, %36" VALUES_FLAGS "\n}"
                 : F32(d)
                 : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "l"(b), "n"(ADD ? 1 : 0));
}

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float log2_fast(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ u32 pack(float low, float high) {
    u32 y;
    asm("cvt.rn." OUTPUT "x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}

// four e4m3, the first in the lowest byte
__device__ __forceinline__ u32 pack_e4m3(float a, float b, float c, float d) {
    u32 y;
    asm("{\n.reg .b16 low, high;\n"
        "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
        "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
        "mov.b32 %0, {low, high};\n}"
        : "=r"(y)
        : "f"(a), "f"(b), "f"(c), "f"(d));
    return y;
}
