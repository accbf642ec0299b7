// Sparse causal attention for sm_90a: one producer warp and two consumer warpgroups a block.
#include "consumer.cuh"
#include "producer.cuh"

__device__ __forceinline__ void init_barriers(Shared& shared) {
    auto ring = [](u64* full, u64* empty, int slots) {
        for (int i = 0; i < slots; ++i) {
            barrier_init(shared_address(full + i), ARRIVING_LANES);
            barrier_init(shared_address(empty + i), CONSUMER_WARPS * ARRIVING_LANES);
        }
    };
    ring(shared.q_full, shared.q_empty, Q_TILES);
    ring(shared.k_full, shared.k_empty, K_STAGES);
    ring(shared.v_full, shared.v_empty, V_STAGES);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    sparse_attention(const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,
                     const __grid_constant__ TensorMap v,
                     const __grid_constant__ TensorMap column_k,
                     const __grid_constant__ TensorMap column_v,
                     const __grid_constant__ Params p) {
    extern __shared__ unsigned char memory[];
    // swizzled tiles must start at multiples of 1024
    u32 skip = -shared_address(memory) & 1023;
    Shared& shared = *reinterpret_cast<Shared*>(memory + skip);
    // through a shuffle the compiler sees that the warp number is uniform
    int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    if (threadIdx.x == 0) init_barriers(shared);
    __syncthreads();
    if (warp < 4) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(PRODUCER_REGISTERS));
        if (warp == 0) {
            Maps maps{q, k, v, column_k, column_v};
            Producer producer{p, maps, shared, lane};
            producer.run();
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGISTERS));
        Consumer consumer{p, shared, warp / 4 - 1, lane, warp % 4};
        consumer.run();
    }
}
