"""`join_samples` in Triton: a program goes on with one tile of rows of one head where the attention
kernel stopped, over the tile's samples, so that any kernel may come before it."""

import math

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from minference.index import BLOCK, TILE, SparseIndex, most_tiles
from minference.index_samples import (
    HASH,
    LEAST_STRIDE,
    LONG,
    sample_room,
    sample_stride,
)
from minference.ops._kernel import kernel
from minference.ops._triton import (
    LOG2_E,
    REGISTERS,
    WIDE_DIM,
    AttentionLaunch,
    attention_launch,
    log2_scaling,
    padded_dim,
    tma_serves,
)
from minference.ops.attention.samples import LARGEST
from minference.ops.attention.triton_keys import keys_values, tma_descriptors
from minference.ops.attention.triton_parts import (
    in_pages,
    list_of,
    pages_of,
    place_program,
    rows_at,
    tile_dim,
)

_TILE = tl.constexpr(TILE)
_BLOCK = tl.constexpr(BLOCK)
_LEAST_STRIDE = tl.constexpr(LEAST_STRIDE)
_LONG = tl.constexpr(LONG)
_HASH = tl.constexpr(HASH)
_LARGEST = tl.constexpr(LARGEST * LOG2_E)
_LOG2_E = tl.constexpr(LOG2_E)
KEYS = 64
"""Samples of a step."""
LAUNCH = AttentionLaunch(128, KEYS, 2, 8)
"""Launch parameters in half precision, for head dims up to `WIDE_DIM`."""


@triton.jit
def _runs_of(tile, samples):
    """Stride of a tile's samples, how many strides are shorter, and the whole runs before it."""
    end = (tile + 1) * _TILE
    most = tl.where(end <= _LONG, samples, 2 * samples)
    level = tile * 0
    while (_LEAST_STRIDE << level) * most < end:
        level += 1
    stride = _LEAST_STRIDE << level
    return stride, level, tile * _TILE // stride


@triton.jit
def _key_of(run, stride):
    """`sample_keys` of some runs."""
    return run * stride + (((run * _HASH) & 0xFFFF) * stride >> 16)


@kernel(do_not_specialize=["slots", "q_len", "kv_len", "samples", "room"])
def _count_left_out(
    counts_ptr, block_lists, group_tiles_ptr, first_ptr, slots, q_len, kv_len, samples, room,
    LISTS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Log2 of the keys that each sample of a tile counts for: those of its run; -inf where the
    tile's blocks hold it and behind the last one."""
    slot = tl.program_id(0) % slots
    item = tl.program_id(0) // slots
    q_start = kv_len - q_len - tl.load(first_ptr + item // LISTS)
    tile = (q_start >> 7) + slot
    stride, _, runs = _runs_of(tl.maximum(tile, 0), samples)
    count = tl.log2(stride.to(tl.float32))
    size = tl.load(group_tiles_ptr + item % LISTS)
    group = tl.maximum(tile, 0) // size - tl.maximum(q_start, 0) // _TILE // size
    blocks, _, n = list_of(block_lists, item.to(tl.int64), group)
    to = counts_ptr + tl.program_id(0).to(tl.int64) * room
    for i in range(0, runs, KEYS):
        run = i + tl.arange(0, KEYS)
        block = _key_of(run, stride) // _BLOCK
        place = block * 0
        left = n
        while left > 1:
            half = left >> 1
            before = tl.load(blocks + place + half - 1)
            place = tl.where(before >> 2 < block, place + half, place)
            left -= half
        entry = tl.load(blocks + place, mask=place < n, other=-4)
        there = (entry >> 2 != block) & (run < runs)
        tl.store(to + run, tl.where(there, count, float("-inf")).to(tl.float16))


@kernel(do_not_specialize=["kv_len", "room"])
def _pack_samples(
    k_ptr, v_ptr, packed_k, packed_v, first_ptr, stop_ptr, k_steps, v_steps, kv_len, room, table,
    HKV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """Keys and values of the samples of every stride, `room` rows each; zeros past the last key."""
    item = tl.program_id(1)
    b = item // HKV
    head = (item % HKV).to(tl.int64)
    first = tl.load(first_ptr + b)
    row = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    key = _key_of(row % room, _LEAST_STRIDE << (row // room))
    pages = pages_of(table, b, PAGE)
    place = first + key
    there = key < tl.load(stop_ptr + b) - first
    paged = in_pages(pages, place, tl.where(there, place + 1, 0), PAGE)
    column = tl.arange(0, BLOCK_D)
    known = there[:, None] & (column < D)[None, :]
    batch = b.to(tl.int64) if PAGE == 0 else 0
    place = place.to(tl.int64)[:, None]
    rows = tl.num_programs(0) * KEYS
    to = (item.to(tl.int64) * rows + row)[:, None] * BLOCK_D + column[None, :]
    at = rows_at(place, paged, k_steps[2], k_steps[0], PAGE) + column[None, :]
    k = tl.load(k_ptr + batch * k_steps[0] + head * k_steps[1] + at, mask=known, other=0.0)
    tl.store(packed_k + to, k)
    at = rows_at(place, paged, v_steps[2], v_steps[0], PAGE) + column[None, :]
    v = tl.load(v_ptr + batch * v_steps[0] + head * v_steps[1] + at, mask=known, other=0.0)
    tl.store(packed_v + to, v)


@kernel(do_not_specialize=["slots", "q_len", "kv_len", "samples", "room", "rows"])
def _join_samples(
    q_ptr, packed_k, packed_v, out_ptr, lse_ptr, counts_ptr, first_ptr, stop_ptr, q_steps, slots,
    q_len, kv_len, samples, room, rows, share, scaling, k_desc, v_desc, H: tl.constexpr,
    HKV: tl.constexpr, LISTS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    STAGES: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = _TILE // ROWS
    BLOCK_D: tl.constexpr = tile_dim(D)
    TMA: tl.constexpr = k_desc is not None
    b, kv_head, head, rank = place_program(slots, H, HKV, PARTS)
    first = tl.load(first_ptr + b)
    real = tl.load(stop_ptr + b) - first
    q_start = kv_len - q_len - first
    tile = (q_start >> 7) + rank // PARTS
    pos = tile * _TILE + rank % PARTS * ROWS + tl.arange(0, ROWS)
    row = pos - q_start
    wanted = (row >= 0) & (row < q_len) & (pos >= 0) & (pos < real)
    _, level, runs = _runs_of(tl.maximum(tile, 0), samples)
    runs = tl.where(tl.max(wanted.to(tl.int32)) != 0, runs, 0)
    # samples of one stride lie behind those of the shorter ones
    packed = room * level
    column = tl.arange(0, BLOCK_D)
    known = wanted[:, None] & (column < D)[None, :]
    at = b.to(tl.int64) * q_steps[0] + head.to(tl.int64) * q_steps[1]
    at += row.to(tl.int64)[:, None] * q_steps[2] + column[None, :]
    q = tl.load(q_ptr + at, mask=known, other=0.0)
    to = (b * H + head).to(tl.int64) * q_len + row
    lse = tl.load(lse_ptr + to, mask=wanted, other=float("-inf"))
    # rows without keys of their own stay as they are
    own_sum = tl.where(lse == float("-inf"), float("inf"), lse * _LOG2_E)

    item = b * LISTS + head * LISTS // H
    counts = counts_ptr + (item * slots + rank // PARTS).to(tl.int64) * room
    from_row = (b * HKV + kv_head).to(tl.int64) * rows * BLOCK_D
    steps = (BLOCK_D, BLOCK_D, 0, 0)
    source = (packed_k + from_row, packed_v + from_row, k_desc, v_desc, steps, b, kv_head, 0, 0)
    factor, ceiling = scaling
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    mass = tl.full([ROWS], 1.0, tl.float32)
    for i in tl.range(0, runs, KEYS, num_stages=STAGES):
        k, v = keys_values(source, packed + i, BLOCK_D, KEYS, TMA, False, PRECISION, 0)
        often = tl.load(counts + i + tl.arange(0, KEYS)).to(tl.float32)[None, :]
        scores = tl.dot(q, k.T, input_precision=PRECISION)  # [ROWS, KEYS]
        if SOFTCAP:
            scores = ceiling - 2 * ceiling / (tl.exp2(scores * factor) + 1)
            once = scores - own_sum[:, None]
        else:
            once = scores * factor - own_sum[:, None]
        times = tl.minimum(once + often, tl.maximum(once, share))
        weights = tl.exp2(tl.minimum(times, _LARGEST))
        mass += tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
    if runs > 0:
        place = out_ptr + to[:, None] * D + column[None, :]
        out = (tl.load(place, mask=known, other=0.0).to(tl.float32) + acc) / mass[:, None]
        tl.store(place, out.to(out_ptr.dtype.element_ty), mask=known)
        tl.store(lse_ptr + to, lse + tl.log2(mass) / _LOG2_E, mask=wanted)


def join_samples(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B Hkv N D"],
    v: Float[Tensor, "B Hkv N D"],
    index: SparseIndex,
    out: Float[Tensor, "B H L D"],
    lse: Float[Tensor, "B H L"],
    *,
    scale: float,
    softcap: float = 0.0,
    table: Int[Tensor, "B pages"] | None = None,
    launch: AttentionLaunch | None = None,
) -> tuple[Float[Tensor, "B H L D"], Float[Tensor, "B H L"]]:
    """As the readable one; with `table`, k and v are pages as in the attention kernel. `launch`
    replaces the tuned parameters, for benchmarks."""
    batch, heads, q_len, dim = q.shape
    if index.kv_len <= TILE:
        # no tile has a run before it
        return out, lse
    kv_heads, wide, device = k.shape[1], padded_dim(dim), q.device
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    blocks, bounds = index.blocks, (index.first, index.stop)
    lists = (blocks.values, blocks.start.contiguous(), blocks.count.contiguous())
    slots = most_tiles(q_len)
    room = -(-sample_room(index.kv_len, index.samples) // KEYS) * KEYS
    shape = (batch * index.heads * slots, room)
    counts = torch.empty(shape, dtype=torch.float16, device=device)
    _count_left_out[(len(counts),)](
        counts, (*lists, blocks.count.shape[2]), index.group_tiles, index.first, slots, q_len,
        index.kv_len, index.samples, room, LISTS=index.heads, KEYS=KEYS, num_warps=4,
    )  # fmt: skip
    longest = sample_stride(-(-index.kv_len // TILE) - 1, index.samples)
    rows = room * (longest // LEAST_STRIDE).bit_length()
    packed = k.new_empty((2, batch, kv_heads, rows, wide))
    _pack_samples[(rows // KEYS, batch * kv_heads)](
        k, v, packed[0], packed[1], *bounds, *(tuple(x.stride()[:3]) for x in (k, v)),
        index.kv_len, room, None if table is None else (table, table.stride(0)), HKV=kv_heads,
        D=dim, BLOCK_D=wide, PAGE=0 if table is None else k.shape[2], KEYS=KEYS, num_warps=4,
    )  # fmt: skip
    single = q.dtype == torch.float32
    own = LAUNCH if dim <= WIDE_DIM and not single else attention_launch(dim, q.dtype, device)
    tuned = launch or own
    _join_samples[(batch * heads * slots * (TILE // tuned.rows),)](
        q, packed[0], packed[1], out, lse, counts, *bounds, tuple(q.stride()[:3]), slots, q_len,
        index.kv_len, index.samples, room, rows, math.log2(index.sample_share),
        log2_scaling(scale, softcap),
        *tma_descriptors(packed[0], packed[1], KEYS, tma=tma_serves(packed)), H=heads,
        HKV=kv_heads, LISTS=index.heads, D=dim,
        ROWS=tuned.rows, STAGES=1 if single else tuned.stages, SOFTCAP=bool(softcap),
        PRECISION="ieee" if single else "tf32", KEYS=KEYS, num_warps=tuned.warps,
        maxnreg=REGISTERS if tuned is LAUNCH else None,
    )  # fmt: skip
    return out, lse
