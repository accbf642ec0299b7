"""The attention kernel for fp32: one loop whose every step is 64 keys at any places.

Products in full fp32 run on the ordinary cores and unroll into long code, so this kernel has one
step where the tensor-core kernel has six; columns are gathered as they come instead of packed.
"""

import triton
import triton.language as tl

from minference.ops._kernel import kernel
from minference.ops.attention.triton_lists import count_below
from minference.ops.attention.triton_parts import (
    NEVER,
    ROWS_OF_KEY,
    attend,
    bitmap_of,
    closes_at,
    covered,
    in_pages,
    list_of,
    pages_of,
    place_program,
    rows_at,
    store_tile,
    tile_dim,
)

_TILE = tl.constexpr(128)
_BLOCK = tl.constexpr(64)


@triton.jit
def _block_step(entry, tile, window, sink, hidden):
    """Keys of a block with the row positions between which each is seen."""
    key = (entry >> 2) * _BLOCK + tl.arange(0, _BLOCK)
    middle = tile * _TILE + _BLOCK
    opens = tl.where(entry & 3 == 2, tl.maximum(key, middle), key)
    closes = closes_at(key, window, sink)
    closes = tl.where(entry & 3 == 1, tl.minimum(closes, middle), closes)
    return key, tl.where(hidden != 0, NEVER, opens), closes


@kernel(do_not_specialize=["slots", "q_len", "kv_len"])
def sparse_attention_exact(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, offset_lists, block_lists, column_lists, bits,
    group_tiles_ptr, window_ptr, sink_ptr, first_ptr, stop_ptr, q_steps, k_steps, v_steps,
    slots, q_len, kv_len, scaling,
    H: tl.constexpr, HKV: tl.constexpr, LISTS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    SOFTCAP: tl.constexpr, LSE: tl.constexpr, PRECISION: tl.constexpr, PAGE: tl.constexpr, table,
):  # fmt: skip
    BLOCK_D: tl.constexpr = tile_dim(D)
    b, kv_head, head, rank = place_program(slots, H, HKV, _TILE // ROWS)
    first = tl.load(first_ptr + b)
    real = tl.load(stop_ptr + b) - first
    q_start = kv_len - q_len - first
    tile = (q_start >> 7) + rank // (_TILE // ROWS)
    pos = tile * _TILE + rank % (_TILE // ROWS) * ROWS + tl.arange(0, ROWS)
    row = pos - q_start
    inside = (row >= 0) & (row < q_len)
    wanted = inside & (pos >= 0) & (pos < real)
    live = tl.max(wanted.to(tl.int32))

    column = tl.arange(0, BLOCK_D)
    at = b.to(tl.int64) * q_steps[0] + head.to(tl.int64) * q_steps[1]
    at += row.to(tl.int64)[:, None] * q_steps[2] + column[None, :]
    q = tl.load(q_ptr + at, mask=wanted[:, None] & (column < D)[None, :], other=0.0)
    pages = pages_of(table, b, PAGE)
    if PAGE == 0:
        k_from = k_ptr + b.to(tl.int64) * k_steps[0] + kv_head.to(tl.int64) * k_steps[1]
        v_from = v_ptr + b.to(tl.int64) * v_steps[0] + kv_head.to(tl.int64) * v_steps[1]
    else:
        k_from = k_ptr + kv_head.to(tl.int64) * k_steps[1]
        v_from = v_ptr + kv_head.to(tl.int64) * v_steps[1]

    own = head * LISTS // H
    item = (b * LISTS + own).to(tl.int64)
    window = tl.load(window_ptr + own)
    sink = tl.load(sink_ptr + own)
    size = tl.load(group_tiles_ptr + own)
    group = tl.maximum(tile, 0) // size - tl.maximum(q_start, 0) // _TILE // size
    bitmap = bitmap_of(bits, item, group)
    offsets, _, n_offsets = list_of(offset_lists, item, group)
    blocks, _, n_blocks = list_of(block_lists, item, group)
    columns, _, n_columns = list_of(column_lists, item, 0)
    n_offsets = count_below(offsets, n_offsets * live, 2 * tile + 1)
    n_blocks = count_below(blocks, n_blocks * live, 4 * (2 * tile + 2))
    n_columns = count_below(columns, n_columns * live, tl.minimum(real, (tile + 1) * _TILE))

    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    n_listed = n_offsets + n_blocks
    for i in range(0, n_listed + (n_columns + _BLOCK - 1) // _BLOCK):
        if i < n_offsets:
            entry = (2 * tile - tl.load(offsets + i)) * 4 + 3
            key, opens, closes = _block_step(entry, tile, window, sink, 0)
        elif i < n_listed:
            entry = tl.load(blocks + i - n_offsets)
            hidden = covered(bitmap, 2 * tile - (entry >> 2))
            key, opens, closes = _block_step(entry, tile, window, sink, hidden)
        else:
            place = (i - n_listed) * _BLOCK + tl.arange(0, _BLOCK)
            key = tl.load(columns + place, mask=place < n_columns, other=0)
            there = (place < n_columns) & (covered(bitmap, 2 * tile - (key >> 6)) == 0)
            opens = tl.where(there, key, NEVER)
            closes = closes_at(key, window, sink)
        known = (key < real)[:, None] & (column < D)[None, :]
        at_row = (first + key).to(tl.int64)[:, None]
        paged = in_pages(pages, first + key, first + real, PAGE)
        k_at = rows_at(at_row, paged, k_steps[2], k_steps[0], PAGE)
        k = tl.load(k_from + k_at + column[None, :], mask=known, other=0.0)
        v_at = rows_at(at_row, paged, v_steps[2], v_steps[0], PAGE)
        v = tl.load(v_from + v_at + column[None, :], mask=known, other=0.0)
        acc, peak, total = attend(
            q, k, v, acc, peak, total, scaling, pos, opens, closes, ROWS_OF_KEY,
            SOFTCAP, PRECISION,
        )  # fmt: skip
    at = (b * H + head).to(tl.int64) * q_len + row
    store_tile(out_ptr, lse_ptr, at, acc, peak, total, inside, wanted, D, LSE)
