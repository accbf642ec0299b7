// Sparse causal attention for sm_90a: one producer warp and two consumer warpgroups a block.
#include "consumer.cuh"
#include "producer.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    sparse_attention(const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,
                     const __grid_constant__ TensorMap v, const __grid_constant__ TensorMap column_k,
                     const __grid_constant__ TensorMap column_v, const __grid_constant__ Params p) {
    extern __shared__ unsigned char memory[];
    // swizzled tiles must start at multiples of 1024
    u32 skip = -shared_address(memory) & 1023;
    Shared& shared = *reinterpret_cast<Shared*>(memory + skip);
    int group = threadIdx.x / 128, lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        for (int i = 0; i < Q_TILES; ++i) {
            barrier_init(shared_address(&shared.q_full[i]), 1);
            barrier_init(shared_address(&shared.q_empty[i]), CONSUMER_WARPS);
        }
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(shared_address(&shared.k_full[i]), 1);
            barrier_init(shared_address(&shared.k_empty[i]), CONSUMER_WARPS);
            barrier_init(shared_address(&shared.v_full[i]), 1);
            barrier_init(shared_address(&shared.v_empty[i]), CONSUMER_WARPS);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();
    if (group == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(PRODUCER_REGISTERS));
        if (threadIdx.x < 32) {
            Maps maps{q, k, v, column_k, column_v};
            Producer producer{p, maps, shared, lane};
            producer.run();
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGISTERS));
        Consumer consumer{p, shared, group - 1, lane, static_cast<int>(threadIdx.x / 32 % 4)};
        consumer.run();
    }
}
