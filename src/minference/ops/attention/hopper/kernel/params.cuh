// What launches pass by value; launch.py packs the same fields in the same order.
#pragma once

#ifndef FP8
#define FP8 0
#endif
constexpr int ELEMENT_BYTES = FP8 ? 1 : 2;

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

struct alignas(64) TensorMap {
    u64 words[16];
};

struct Lists {
    const int* values;
    const i64* start;
    const int* count;
    i64 groups;
};

struct Params {
    Lists offsets, blocks, columns;
    const u32* bits;
    const int *group_tiles, *window, *sink, *first, *stop;
    int* next_item;
    // e4m3 only: a scale a head, and where the packed columns of each list begin
    const float *q_scale, *k_scale, *v_scale;
    const int* column_place;
    u16* out;
    float* lse;
    i64 bit_groups, bit_words;
    i64 batch, heads, kv_heads, index_heads, queries, keys, tiles;
    float scale, softcap;
};

// Strides of batch, head and row, and row_words, count units of 16 bytes.
struct Pack {
    Lists columns;
    const int* first;
    uint4 *packed_k, *packed_v;
    i64 k_strides[3], v_strides[3];
    i64 keys, kv_heads, index_heads, row_words;
};

// One query tile of one head, and what its lists are.
struct Item {
    int batch, head, tile;
};
