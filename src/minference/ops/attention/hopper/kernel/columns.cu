// Copies the K and V rows of the chosen columns into a table that has a row for each list entry.
#include "params.cuh"

extern "C" __global__ void pack_columns(const uint4* k, const uint4* v,
                                        const __grid_constant__ Pack p) {
    int list = blockIdx.x, heads = static_cast<int>(p.index_heads);
    int batch = list / heads, head = list % heads;
    i64 kv_head = head * p.kv_heads / p.index_heads;
    i64 start = p.columns.start[list * p.columns.groups];
    int count = p.columns.count[list * p.columns.groups];
    i64 first = p.first[batch];
    k += batch * p.k_strides[0] + kv_head * p.k_strides[1] + first * p.k_strides[2];
    v += batch * p.v_strides[0] + kv_head * p.v_strides[1] + first * p.v_strides[2];
    int words = static_cast<int>(p.row_words), rows = blockDim.x / words;
    int word = threadIdx.x % words, row = blockIdx.y * rows + threadIdx.x / words;
    for (; row < count; row += gridDim.y * rows) {
        i64 position = p.columns.values[start + row], to = (start + row) * words + word;
        // no query reaches it; its row stays zero
        if (first + position >= p.keys) break;
        p.packed_k[to] = k[position * p.k_strides[2] + word];
        p.packed_v[to] = v[position * p.v_strides[2] + word];
    }
}
