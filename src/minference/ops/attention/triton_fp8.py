"""Queries, keys and values to e4m3, each head by its largest element: two launches a tensor.

Keys and values begin at the sequence's first real row. Values are turned, keys along the rows, as
fp8 tensor cores take both factors along the sum only; within 16 keys they lie in the order in which
a thread of those cores holds its weights, so that no weight changes threads (`in_value_order`).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from minference.index import SparseIndex
from minference.ops._kernel import kernel
from minference.ops._triton import padded_dim
from minference.ops.attention.fp8 import E4M3, LARGEST

ROWS = 64
PARTS = 512
"""Parts of a head that are searched for the largest element at once, at most."""
ALIGNED = 64
"""Keys that the turned values of a head or a list are a multiple of."""

_LARGEST = tl.constexpr(LARGEST)


class Quantised(NamedTuple):
    """An e4m3 tensor and its scales."""

    data: Tensor
    """[B, H, L, D]; for values [B, H, D, L up to a multiple of ALIGNED]."""
    scale: Float[Tensor, "B H"]


@triton.jit
def in_value_order(weights):
    """Columns of weights in the order of `value_key`."""
    M: tl.constexpr = weights.shape[0]
    N: tl.constexpr = weights.shape[1]
    return weights.reshape(M, N // 16, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(M, N)


@triton.jit
def value_key(place):
    """Which key lies at a place of the turned values."""
    return place // 16 * 16 + place // 2 % 2 * 8 + place // 4 % 4 * 2 + place % 2


@kernel(do_not_specialize=["begin", "rows", "part_rows", "heads"])
def _largest(
    x_ptr, parts_ptr, first_ptr, stop_ptr, steps, begin, rows, part_rows, heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(1)
    b = (item // heads).to(tl.int64)
    head = (item % heads).to(tl.int64)
    low = tl.maximum(tl.load(first_ptr + b) - begin, 0)
    high = tl.minimum(tl.load(stop_ptr + b) - begin, rows)
    column = tl.arange(0, BLOCK_D)
    here = x_ptr + b * steps[0] + head * steps[1]
    start = tl.program_id(0) * part_rows
    most = tl.zeros([ROWS], tl.float32)
    for at in range(start, start + part_rows, ROWS):
        row = at + tl.arange(0, ROWS)
        known = ((row >= low) & (row < high))[:, None] & (column < D)[None, :]
        place = here + row.to(tl.int64)[:, None] * steps[2] + column[None, :]
        x = tl.load(place, mask=known, other=0.0).to(tl.float32)  # [ROWS, BLOCK_D]
        most = tl.maximum(most, tl.max(tl.abs(x), 1))
    tl.store(parts_ptr + item * tl.num_programs(0) + tl.program_id(0), tl.max(most, 0))


@triton.jit
def _scaled(x, scale):
    # the factor is rounded, so that the largest element may land above what e4m3 holds
    x = tl.clamp(x.to(tl.float32) * tl.div_rn(1.0, scale), -_LARGEST, _LARGEST)
    return x.to(tl.float8e4nv)


@kernel(do_not_specialize=["begin", "rows", "out_rows", "parts", "heads"])
def _quantise(
    x_ptr, out_ptr, parts_ptr, scale_ptr, first_ptr, stop_ptr, steps, out_steps, tile_step, begin,
    rows, out_rows, parts, heads, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
    SEARCH: tl.constexpr, ANCHORED: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(1)
    most = tl.zeros([SEARCH], tl.float32)
    for i in range(0, parts, SEARCH):
        at = i + tl.arange(0, SEARCH)
        most = tl.maximum(most, tl.load(parts_ptr + item * parts + at, mask=at < parts, other=0.0))
    largest = tl.max(most, 0)
    # no division: those of torch and Triton differ in the last bit, and so would ties
    scale = tl.where(largest > 0, largest, _LARGEST) * (1 / _LARGEST)
    if tl.program_id(0) == 0:
        tl.store(scale_ptr + item, scale)
    b = (item // heads).to(tl.int64)
    head = (item % heads).to(tl.int64)
    first = tl.load(first_ptr + b)
    low = tl.maximum(first - begin, 0)
    high = tl.minimum(tl.load(stop_ptr + b) - begin, rows)
    within = tl.arange(0, ROWS)
    place = tl.program_id(0) * ROWS + within
    row = place
    if TURNED:
        row = value_key(place)
    if ANCHORED:
        row += first
    column = tl.arange(0, BLOCK_D)
    known = ((row >= low) & (row < high))[:, None] & (column < D)[None, :]
    at = b * steps[0] + head * steps[1] + row.to(tl.int64)[:, None] * steps[2] + column[None, :]
    y = _scaled(tl.load(x_ptr + at, mask=known, other=0.0), scale)  # [ROWS, BLOCK_D]
    to = out_ptr + b * out_steps[0] + head * out_steps[1]
    if TURNED:
        to += tl.program_id(0).to(tl.int64) * tile_step
        to += column.to(tl.int64)[:, None] * out_steps[2] + within[None, :]
        # out_rows is a multiple of ROWS
        tl.store(to, y.T, mask=(column < D)[:, None])
    else:
        to += place.to(tl.int64)[:, None] * out_steps[2] + column[None, :]
        tl.store(to, y, mask=(place < out_rows)[:, None] & (column < D)[None, :])


def quantise(
    x: Float[Tensor, "B H L D"],
    first: Int[Tensor, " B"],
    stop: Int[Tensor, " B"],
    begin: int,
    *,
    anchored: bool = False,
    turned: bool = False,
    blocked: bool = False,
) -> Quantised:
    """x in e4m3 with one scale a head; rows that are padding are 0 and count for nothing.

    Args:
        x: any strides whose last one is 1; row r lies at place `begin + r` of the buffers.
        first: place of each batch row's first real key.
        stop: place after its last real key.
        begin: place of x's first row.
        anchored: whether row 0 of the result is the first real row instead of x's first.
        turned: as values: [B, H, D, rows], rows in the order of `value_key`.
        blocked: turned block by block of 64 rows: [B, H, blocks, D, 64].
    """
    batch, heads, rows, dim = x.shape
    part_rows = max(ROWS * 4, triton.next_power_of_2(triton.cdiv(rows, PARTS)))
    parts = triton.cdiv(rows, part_rows)
    out_rows = triton.cdiv(rows, ALIGNED) * ALIGNED if turned or blocked else rows
    own = (dim, out_rows) if turned else (out_rows, dim)
    own = (out_rows // ROWS, dim, ROWS) if blocked else own
    data = torch.empty((batch, heads, *own), dtype=E4M3, device=x.device)
    out_steps = (*data.stride()[:2], data.stride(-2))
    largest = x.new_empty(batch, heads, parts, dtype=torch.float32)
    scale = x.new_empty(batch, heads, dtype=torch.float32)
    fixed = {"D": dim, "BLOCK_D": padded_dim(dim), "ROWS": ROWS}
    bounds = (first, stop, x.stride()[:3])
    _largest[(parts, batch * heads)](
        x, largest, *bounds, begin, rows, part_rows, heads, **fixed
    )  # fmt: skip
    _quantise[(triton.cdiv(out_rows, ROWS), batch * heads)](
        x, data, largest, scale, *bounds, out_steps, dim * ROWS if blocked else ROWS, begin, rows,
        out_rows, parts, heads, SEARCH=PARTS, ANCHORED=anchored, TURNED=turned or blocked, **fixed,
    )  # fmt: skip
    return Quantised(data, scale)


@kernel(do_not_specialize=["items", "heads", "kv_heads"])
def _pack(
    k_ptr, v_ptr, packed_k_ptr, packed_v_ptr, values_ptr, start_ptr, count_ptr, place_ptr,
    k_scale_ptr, v_scale_ptr, first_ptr, stop_ptr, k_steps, v_steps, items, heads, kv_heads,
    capacity, PROGRAMS: tl.constexpr, SEARCH: tl.constexpr, ALIGNED: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(1)
    place = item * 0
    for i in range(0, item, SEARCH):
        before = i + tl.arange(0, SEARCH)
        count = tl.load(count_ptr + before, mask=before < item, other=0)
        place += tl.sum((count + ALIGNED - 1) // ALIGNED) * ALIGNED
    place = tl.multiple_of(place, ALIGNED)
    if tl.program_id(0) == 0:
        tl.store(place_ptr + item, place)
    b = (item // heads).to(tl.int64)
    kv_head = ((item % heads) * kv_heads // heads).to(tl.int64)
    values = values_ptr + tl.load(start_ptr + item)
    n = tl.load(count_ptr + item)
    first = tl.load(first_ptr + b)
    real = tl.load(stop_ptr + b) - first
    k_scale = tl.load(k_scale_ptr + b * kv_heads + kv_head)
    v_scale = tl.load(v_scale_ptr + b * kv_heads + kv_head)
    column = tl.arange(0, BLOCK_D)
    inside = (column < D)[None, :]
    k_from = k_ptr + b * k_steps[0] + kv_head * k_steps[1]
    v_from = v_ptr + b * v_steps[0] + kv_head * v_steps[1]
    for begin in range(tl.program_id(0) * ROWS, n, PROGRAMS * ROWS):
        at = begin + tl.arange(0, ROWS)
        key = tl.load(values + at, mask=at < n, other=-1)
        known = ((key >= 0) & (key < real))[:, None] & inside
        row = (first + key).to(tl.int64)[:, None]  # [ROWS, 1]
        x = tl.load(k_from + row * k_steps[2] + column[None, :], mask=known, other=0.0)
        to = (place + at).to(tl.int64)
        k_to = packed_k_ptr + to[:, None] * D + column[None, :]
        tl.store(k_to, _scaled(x, k_scale), mask=inside)
        turned = value_key(at)
        key = tl.load(values + turned, mask=turned < n, other=-1)
        known = ((key >= 0) & (key < real))[:, None] & inside
        row = (first + key).to(tl.int64)[:, None]
        x = tl.load(v_from + row * v_steps[2] + column[None, :], mask=known, other=0.0)
        v_to = packed_v_ptr + column.to(tl.int64)[:, None] * capacity + to[None, :]
        tl.store(v_to, _scaled(x, v_scale).T, mask=(column < D)[:, None])


def pack_columns(
    k: Float[Tensor, "B Hkv N D"],
    v: Float[Tensor, "B Hkv N D"],
    k_scale: Float[Tensor, "B Hkv"],
    v_scale: Float[Tensor, "B Hkv"],
    index: SparseIndex,
) -> tuple[Tensor, Tensor, Int[Tensor, "B H 1"]]:
    """Rows of K and V at the index's columns in e4m3, the values turned, and where lists begin.

    Lists begin at multiples of ALIGNED; what lies behind a list's end is finite.
    """
    columns, dim = index.columns, k.shape[3]
    items = index.batch * index.heads
    capacity = triton.cdiv(columns.values.numel(), ALIGNED) * ALIGNED + items * ALIGNED
    packed_k = torch.zeros((capacity, dim), dtype=E4M3, device=k.device)
    packed_v = torch.zeros((dim, capacity), dtype=E4M3, device=k.device)
    place = columns.count.new_empty(columns.count.shape)
    _pack[(16, items)](
        k, v, packed_k, packed_v, columns.values, columns.start.contiguous(),
        columns.count.contiguous(), place, k_scale, v_scale, index.first, index.stop,
        k.stride()[:3], v.stride()[:3], items, index.heads, k.shape[1], capacity,
        PROGRAMS=16, SEARCH=256, ALIGNED=ALIGNED, D=dim, BLOCK_D=padded_dim(dim), ROWS=ROWS,
    )  # fmt: skip
    return packed_k, packed_v, place


class Inputs(NamedTuple):
    """What a kernel attends with in e4m3."""

    q: Float[Tensor, "B H L D"]
    k: Float[Tensor, "B Hkv N D"]
    v: Tensor
    scales: tuple[Tensor, Tensor, Tensor]
    """Of q, k and v, float32, one a head."""
    packed_k: Float[Tensor, "rows D"]
    packed_v: Float[Tensor, "D rows"]
    place: Int[Tensor, "B H 1"]
    """Where the packed columns of each list begin."""


def quantised_inputs(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B Hkv N D"],
    v: Float[Tensor, "B Hkv N D"],
    index: SparseIndex,
    *,
    blocked: bool = False,
) -> Inputs:
    """q, k, v and the rows of the index's columns in e4m3; values turned, or turned by blocks."""
    bounds = (index.first, index.stop)
    made = (
        quantise(q, *bounds, index.kv_len - index.q_len),
        quantise(k, *bounds, 0, anchored=True),
        quantise(v, *bounds, 0, anchored=True, turned=not blocked, blocked=blocked),
    )
    data, scales = zip(*made, strict=True)
    return Inputs(*data, scales, *pack_columns(k, v, *scales[1:], index))
