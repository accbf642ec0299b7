"""Sparse attention in Triton: every head of a layer, whatever its pattern, in one launch.

The portable implementation, for NVIDIA sm_80 and newer, and the one that runs interpreted on the
CPU. A program attends one tile of rows of one head: the diagonal blocks, offsets that stand in
pairs (128 keys a step), single offsets, offsets under a mask, packed columns, listed blocks.
In fp8 the inputs are quantised first, and the same kernel multiplies e4m3.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from minference.errors import UnsupportedError
from minference.index import BLOCK, TILE, Ragged, SparseIndex, most_tiles
from minference.ops._kernel import kernel
from minference.ops._triton import (
    MAX_HEAD_DIM,
    AttentionLaunch,
    attention_launch,
    log2_scaling,
    tma_serves,
)
from minference.ops.attention.fp8 import E4M3
from minference.ops.attention.triton_exact import sparse_attention_exact
from minference.ops.attention.triton_fp8 import quantised_inputs
from minference.ops.attention.triton_keys import keys_values, tma_descriptors
from minference.ops.attention.triton_lists import count_below, pack_columns, pair_offsets
from minference.ops.attention.triton_parts import (
    NEVER,
    RAISED,
    ROWS_OF_KEY,
    UNMASKED,
    WHOLE_KEYS,
    attend,
    bitmap_of,
    bits_of_step,
    closes_at,
    covered,
    list_of,
    pages_of,
    place_program,
    store_tile,
    tile_dim,
    uncovered_bits,
)

MIN_FP8_DIM = 32
_TILE = tl.constexpr(TILE)
_BLOCK = tl.constexpr(BLOCK)
_COLUMNS = tl.constexpr(1024)
"""Columns whose coverage a program looks up at once."""


@triton.jit
def _plan(offsets, n, split, item, group, tile, window):
    """How a tile walks its offsets: (diagonal halves low and high, leading offsets in a row,
    steps, pairs to use, singles to use, offsets under a mask from and to)."""
    groups, steps, places, plans = split
    here = group < groups
    at = item * groups + group
    steps += tl.load(places + at, mask=here, other=0)
    live = (n > 0).to(tl.int32)
    n_pairs = tl.load(plans + at * 4, mask=here, other=0) * live
    n_singles = tl.load(plans + at * 4 + 1, mask=here, other=0) * live
    local = tl.load(plans + at * 4 + 2, mask=here, other=0) * live
    is_split = tl.load(plans + at * 4 + 3, mask=here, other=1)
    v0 = tl.load(offsets, mask=n > 0, other=1)
    v1 = tl.load(offsets + 1, mask=n > 1, other=1)
    high = tl.where(v0 == -1, 3, 0)
    low = tl.where((v0 == 0) | (v1 == 0), 3, 0)
    near = (v0 <= 0).to(tl.int32) + (v1 <= 0).to(tl.int32)
    # all rows of the tile see all keys of offset o iff 64 o + 127 < window
    limit = tl.minimum(2 * tile, (window - _TILE) >> 6)
    pairs = count_below(steps, n_pairs, limit)
    singles = count_below(steps + (n - 1), n_singles, limit + 1, -1)
    # a pair whose upper offset is out of reach: its lower one is the next in the list
    broken = tl.load(steps + pairs, mask=pairs < n_pairs, other=-2) == limit
    masked = near + 2 * pairs + singles
    end = masked + broken.to(tl.int32)
    if (limit < 2 * tile) | (is_split == 0):
        end = count_below(offsets, n, 2 * tile + 1)
    return low, high, local, steps, pairs, singles, masked, end


@triton.jit
def _diagonal(
    q, source, acc, peak, total, scaling, pos, tile, first, real, low, high, window, sink,
    D: tl.constexpr, WIDE: tl.constexpr, TMA: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """The tile's own two blocks; `low` and `high` are the row halves (bits) that see each."""
    middle = tile * _TILE + _BLOCK
    for part in tl.static_range(_TILE // WIDE):
        begin = tile * _TILE + part * WIDE
        key = begin + tl.arange(0, WIDE)
        k, v = keys_values(source, first + begin, D, WIDE, TMA, True, PRECISION, PAGE)
        if PRECISION != "fp8":
            # keys past the last real one may hold anything, and 0 * NaN is NaN
            v = tl.where((key < real)[:, None], v, 0.0).to(v.dtype)
        halves = tl.where(key < middle, low, high)
        opens = tl.where(halves == 2, tl.maximum(key, middle), key)
        opens = tl.where(halves == 0, NEVER, opens)
        closes = closes_at(key, window, sink)
        closes = tl.where(halves == 1, tl.minimum(closes, middle), closes)
        acc, peak, total = attend(
            q, k, v, acc, peak, total, scaling, pos, opens, closes, ROWS_OF_KEY, SOFTCAP, PRECISION
        )
    return acc, peak, total


@kernel(do_not_specialize=["slots", "q_len", "kv_len", "packed_rows"])
def _sparse_attention(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, offset_lists, block_lists, column_lists, bits,
    group_tiles_ptr, window_ptr, sink_ptr, first_ptr, stop_ptr, q_steps, k_steps, v_steps,
    slots, q_len, kv_len, scaling, packed_k_ptr, packed_v_ptr, packed_rows,
    steps_ptr, places_ptr, plans_ptr, k_wide, v_wide, k_narrow, v_narrow, k_packed, v_packed,
    k_few, v_few, H: tl.constexpr, HKV: tl.constexpr, LISTS: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
    SOFTCAP: tl.constexpr, LSE: tl.constexpr, PRECISION: tl.constexpr, PAGE: tl.constexpr, table,
    scales, packed_place,
):  # fmt: skip
    FP8: tl.constexpr = PRECISION == "fp8"
    PARTS: tl.constexpr = _TILE // ROWS
    SPLIT: tl.constexpr = _TILE // WIDE
    BLOCK_D: tl.constexpr = tile_dim(D)
    b, kv_head, head, rank = place_program(slots, H, HKV, PARTS)
    first = tl.load(first_ptr + b)
    real = tl.load(stop_ptr + b) - first
    q_start = kv_len - q_len - first
    tile = (q_start >> 7) + rank // PARTS
    pos = tile * _TILE + rank % PARTS * ROWS + tl.arange(0, ROWS)
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
    # from row to row, and from page to page
    steps_of = (k_steps[2], v_steps[2], k_steps[0], v_steps[0])
    wide = (k_from, v_from, k_wide, v_wide, steps_of, b, kv_head, kv_len, pages)
    narrow = (k_from, v_from, k_narrow, v_narrow, steps_of, b, kv_head, kv_len, pages)
    packed_steps = (D, packed_rows if FP8 else D, 0, 0)
    packed = (packed_k_ptr, packed_v_ptr, k_packed, v_packed, packed_steps, 0, 0, packed_rows, 0)
    few = (packed_k_ptr, packed_v_ptr, k_few, v_few, packed_steps, 0, 0, packed_rows, 0)
    origin = first
    v_scale = 1.0
    if FP8:
        # e4m3 keys and values begin at the first real one
        origin = first * 0
        q_scale, k_scale, v_scale = scales
        q_scale = tl.load(q_scale + b * H + head)
        v_scale = tl.load(v_scale + b * HKV + kv_head)
        factor, ceiling = scaling
        scaling = (factor * (q_scale * tl.load(k_scale + b * HKV + kv_head)), ceiling)

    own = head * LISTS // H
    item = (b * LISTS + own).to(tl.int64)
    window = tl.load(window_ptr + own)
    sink = tl.load(sink_ptr + own)
    size = tl.load(group_tiles_ptr + own)
    group = tl.maximum(tile, 0) // size - tl.maximum(q_start, 0) // _TILE // size
    bitmap = bitmap_of(bits, item, group)
    offsets, _, n = list_of(offset_lists, item, group)
    n *= live
    split = (offset_lists[3], steps_ptr, places_ptr, plans_ptr)
    low, high, local, steps, n_pairs, n_singles, masked, end = _plan(
        offsets, n, split, item, group, tile, window
    )
    blocks, _, n_listed = list_of(block_lists, item, group)
    n_listed *= live
    n_blocks = count_below(blocks, n_listed, 8 * tile)
    for i in range(n_blocks, tl.minimum(n_listed, n_blocks + 2)):
        entry = tl.load(blocks + i)
        low |= tl.where(entry >> 2 == 2 * tile, entry & 3, 0)
        high |= tl.where(entry >> 2 == 2 * tile + 1, entry & 3, 0)

    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    base = origin + tile * _TILE
    # each offset is read a step ahead: else its load takes a stage of K and V
    ahead = tl.load(steps, mask=n_pairs > 0, other=0)
    for i in tl.range(0, n_pairs * SPLIT, num_stages=STAGES):
        pair = i // SPLIT
        at_row = base - (ahead + 1) * _BLOCK + (i - pair * SPLIT) * WIDE
        ahead = tl.load(steps + tl.minimum((i + 1) // SPLIT, n_pairs - 1))
        k, v = keys_values(wide, at_row, D, WIDE, TMA, False, PRECISION, PAGE)
        acc, peak, total = attend(
            q, k, v, acc, peak, total, scaling, pos, pos, pos, UNMASKED, SOFTCAP, PRECISION
        )
    last = steps + (n - 1)
    ahead = tl.load(last, mask=n_singles > 0, other=0)
    for i in tl.range(0, n_singles, num_stages=STAGES):
        at_row = base - ahead * _BLOCK
        ahead = tl.load(last - tl.minimum(i + 1, n_singles - 1))
        k, v = keys_values(narrow, at_row, D, _BLOCK, TMA, False, PRECISION, PAGE)
        acc, peak, total = attend(
            q, k, v, acc, peak, total, scaling, pos, pos, pos, UNMASKED, SOFTCAP, PRECISION
        )
    for i in tl.range(masked, end, num_stages=STAGES):
        begin = tile * _TILE - tl.load(offsets + i) * _BLOCK
        key = begin + tl.arange(0, _BLOCK)
        k, v = keys_values(narrow, origin + begin, D, _BLOCK, TMA, False, PRECISION, PAGE)
        acc, peak, total = attend(
            q, k, v, acc, peak, total, scaling, pos, key, closes_at(key, window, sink),
            ROWS_OF_KEY, SOFTCAP, PRECISION,
        )  # fmt: skip
    for i in tl.range(0, n_blocks, num_stages=STAGES):
        entry = tl.load(blocks + i)
        begin = (entry >> 2) * _BLOCK
        key = begin + tl.arange(0, _BLOCK)
        k, v = keys_values(narrow, origin + begin, D, _BLOCK, TMA, False, PRECISION, PAGE)
        middle = tile * _TILE + _BLOCK
        opens = tl.where(entry & 3 == 2, middle, 0)
        opens = tl.where(covered(bitmap, 2 * tile - (entry >> 2)) != 0, NEVER, opens)
        closes = closes_at(key, window, sink)
        closes = tl.where(entry & 3 == 1, tl.minimum(closes, middle), closes)
        acc, peak, total = attend(
            q, k, v, acc, peak, total, scaling, pos, key * 0 + opens, closes, ROWS_OF_KEY,
            SOFTCAP, PRECISION,
        )  # fmt: skip

    # columns inside the leading run of offsets are covered, whatever the bitmap says of others
    columns, first_row, n = list_of(column_lists, item, 0)
    if FP8:
        first_row = tl.load(packed_place + item)
    bound = tl.minimum(real, (2 * tile + 2 - local) * _BLOCK)
    n = count_below(columns, n * live, bound)
    # all rows see a column before the tile, where no window ends before it
    plain = tl.where(window >= bound + _TILE, tl.minimum(bound, tile * _TILE), 0)
    plain = count_below(columns, n, plain)
    STEPS: tl.constexpr = _COLUMNS // WIDE
    for chunk in range(0, n, _COLUMNS):
        words = uncovered_bits(columns, chunk, n, bitmap, tile, STEPS, WIDE)
        end = tl.minimum(n - chunk, _COLUMNS)
        whole = tl.where(
            plain == n, end, tl.minimum(tl.maximum(plain - chunk, 0) // WIDE, STEPS) * WIDE
        )
        for i in tl.range(0, whole, WIDE, num_stages=STAGES):
            k, v = keys_values(packed, first_row + chunk + i, D, WIDE, TMA, True, PRECISION, 0)
            shown = bits_of_step(words, i, STEPS, WIDE, WIDE)
            acc, peak, total = attend(
                q, k, v, acc, peak, total, scaling, pos, shown, pos, WHOLE_KEYS, SOFTCAP, PRECISION
            )
        for i in tl.range(whole, end, _BLOCK, num_stages=STAGES):
            begin = chunk + i
            k, v = keys_values(few, first_row + begin, D, _BLOCK, TMA, True, PRECISION, 0)
            place = begin + tl.arange(0, _BLOCK)
            key = tl.load(columns + place, mask=place < n, other=0)
            shown = bits_of_step(words, i, STEPS, WIDE, _BLOCK)
            acc, peak, total = attend(
                q, k, v, acc, peak, total, scaling, pos, tl.where(shown != 0, key, NEVER),
                closes_at(key, window, sink), ROWS_OF_KEY, SOFTCAP, PRECISION,
            )  # fmt: skip
    # last: ahead of the loops it makes the compiler (ptxas 12.8) wait for every single product
    if (low | high) != 0:
        acc, peak, total = _diagonal(
            q, wide, acc, peak, total, scaling, pos, tile, origin, real, low, high, window, sink,
            D, WIDE, TMA, SOFTCAP, PRECISION, PAGE,
        )  # fmt: skip

    at = (b * H + head).to(tl.int64) * q_len + row
    if FP8:
        acc *= v_scale
    RAISE: tl.constexpr = RAISED if FP8 else 0
    store_tile(out_ptr, lse_ptr, at, acc, peak, total, inside, wanted, D, LSE, RAISE)


def _lists(lists: Ragged) -> tuple[Tensor, Tensor, Tensor, int]:
    return lists.values, lists.start.contiguous(), lists.count.contiguous(), lists.count.shape[2]


def _index_arguments(index: SparseIndex) -> tuple[Any, ...]:
    bits = index.offset_bits.contiguous()
    return (
        *(_lists(x) for x in (index.offsets, index.blocks, index.columns)),
        (bits, bits.shape[2], bits.shape[3]),
        *(index.group_tiles, index.window, index.sink, index.first, index.stop),
    )


def sparse_attention(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B Hkv N D"],
    v: Float[Tensor, "B Hkv N D"],
    index: SparseIndex,
    *,
    scale: float,
    softcap: float = 0.0,
    return_lse: bool = False,
    launch: AttentionLaunch | None = None,
    tma: bool | None = None,
    table: Int[Tensor, "B pages"] | None = None,
    fp8: bool = False,
) -> tuple[Float[Tensor, "B H L D"], Float[Tensor, "B H L"] | None]:
    """Attention over the index's keys, and its log-sum-exp (natural logarithm) when asked for.

    Rows that are padding give 0 and -inf. The host reads nothing back from the device.

    Args:
        launch: launch parameters instead of the table's.
        tma: whether to load through TMA descriptors; where the device can, unless given.
        table: numbers of each sequence's pages; k and v are then [pages, Hkv, page size, D], any
            strides whose last one is 1, and are read where they are.
        fp8: whether to multiply in e4m3, with a scale a head; not with a table.

    Raises:
        UnsupportedError: a head dim above 256, or in fp8 below 32.
    """
    batch, heads, q_len, dim = q.shape
    if dim > MAX_HEAD_DIM:
        raise UnsupportedError(
            f"the Triton kernels serve head dims up to {MAX_HEAD_DIM}, got {dim}; use impl='torch'"
        )
    if fp8 and dim < MIN_FP8_DIM:
        raise UnsupportedError(
            f"fp8 tensor cores sum {MIN_FP8_DIM} products at once, got head dim {dim}; use "
            "precision='native'"
        )
    q = q if q.stride(-1) == 1 else q.contiguous()
    if table is None:
        k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    tuned = launch or attention_launch(dim, E4M3 if fp8 else q.dtype, q.device)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32) if return_lse else None
    place, scales, packed = None, None, []
    if fp8:
        q, k, v, scales, *packed, place = quantised_inputs(q, k, v, index)
        packed = [x[None, None] for x in packed]
    elif q.dtype != torch.float32:
        packed = [x[None, None] for x in pack_columns(k, v, index, table)]
    slots = most_tiles(q_len)
    data = (q, k, v, out, out if lse is None else lse, *_index_arguments(index))
    data += tuple(tuple(x.stride()[:3]) for x in (q, k, v))
    data += (slots, q_len, index.kv_len, log2_scaling(scale, softcap))
    fixed = {"H": heads, "HKV": k.shape[1], "LISTS": index.heads, "D": dim, "ROWS": tuned.rows}
    fixed |= {"SOFTCAP": bool(softcap), "LSE": return_lse, "num_warps": tuned.warps}
    fixed |= {"PAGE": 0, "table": None}
    if table is not None:
        fixed |= {"PAGE": k.shape[2], "table": (table, table.stride(0))}
    grid = (batch * heads * slots * (TILE // tuned.rows),)
    if not packed:
        sparse_attention_exact[grid](*data, PRECISION="ieee", num_stages=1, **fixed)
        return out, lse
    tma = table is None and (tma_serves(k, v, *packed) if tma is None else tma)
    # without TMA, addresses take the registers of a third stage
    stages = tuned.stages if tma or launch or dim <= 64 else min(tuned.stages, 2)
    _sparse_attention[grid](
        *data, *packed, packed[0].shape[2], *pair_offsets(index.offsets),
        *tma_descriptors(k, v, tuned.wide, tma=tma), *tma_descriptors(k, v, BLOCK, tma=tma),
        *tma_descriptors(*packed, tuned.wide, tma=tma), *tma_descriptors(*packed, BLOCK, tma=tma),
        WIDE=tuned.wide, STAGES=stages, TMA=tma, PRECISION="fp8" if fp8 else "tf32",
        scales=scales, packed_place=place, **fixed,
    )  # fmt: skip
    return out, lse
