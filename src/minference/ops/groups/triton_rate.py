"""The coarse pass: means of keys, and what share of a row's attention a block may hold at most.

Cells lie interleaved: of 64 blocks first every block's first cell, then every block's second one.
So the largest score of a block's cells is taken between whole tiles of products, element by
element, and what follows (scaling, exponentials, the maximum over rows) is paid once a block.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from minference.index import BLOCK
from minference.ops._triton import capability, log2_scaling, padded_dim
from minference.ops.build import Layout
from minference.ops.groups.plan import Plan, power_of_two
from minference.ops.groups.triton_rows import group_span, log2_scores, spread_queries

STEP = 64
"""Blocks whose cells lie interleaved: those of a step."""

RATED_AT_ONCE = 2
"""Query heads of a program: with two, two programs share a multiprocessor; at 128K that took 4.9 ms
on an H100, four heads 5.9 ms."""

SAMPLED_KEYS = 64
"""Keys of a head that give the unit of its fp8 cells."""

_BLOCK = tl.constexpr(BLOCK)
_STEP = tl.constexpr(STEP)
_SAMPLED = tl.constexpr(SAMPLED_KEYS)


class Cells(NamedTuple):
    """Means of a call's keys for the coarse pass.

    Attributes:
        fine: means of `cell` keys in units of `unit`; any value for a cell without a real key.
        wide: means of `sum_cell` keys.
        unit: of each KV head; 1 unless the cells are fp8.
    """

    fine: Float[Tensor, "B Hkv cells D"]
    wide: Float[Tensor, "B Hkv wide D"]
    unit: Float[Tensor, "B Hkv"]


@triton.jit
def _slot(cell, PER: tl.constexpr):
    """Place of a cell, PER of which make a block."""
    block = cell // PER
    return (block // _STEP * PER + cell % PER) * _STEP + block % _STEP


@triton.jit
def _fp8(x):
    return tl.minimum(tl.maximum(x, -448.0), 448.0).to(tl.float8e4nv)


@triton.jit
def _store_means(
    sums, cells_ptr, cell, item, n_cells, real, shift, unit, SIZE: tl.constexpr, PER: tl.constexpr,
    BLOCK_D: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    there = tl.minimum(tl.maximum(real - cell * SIZE, 1), SIZE).to(tl.float32)
    mean = (sums / there[:, None] - shift) / unit
    to = cells_ptr + (item.to(tl.int64) * n_cells + _slot(cell, PER))[:, None] * BLOCK_D
    to += tl.arange(0, BLOCK_D)[None, :]
    tl.store(to, _fp8(mean) if FP8 else mean.to(cells_ptr.dtype.element_ty))


@triton.jit
def _mean_cells(
    k_ptr, fine_ptr, wide_ptr, unit_ptr, first_ptr, stop_ptr, k_steps, n_fine, n_wide,
    HKV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, CELL: tl.constexpr,
    SUM_CELL: tl.constexpr, PER: tl.constexpr, WIDE_PER: tl.constexpr, AT_ONCE: tl.constexpr,
    FP8: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """Means of AT_ONCE wide cells and of the cells in them."""
    item = tl.program_id(1)
    b = item // HKV
    first = tl.load(first_ptr + b)
    real = tl.load(stop_ptr + b) - first
    column = tl.arange(0, BLOCK_D)
    near = (column < D)[None, :]
    k_from = k_ptr + b.to(tl.int64) * k_steps[0] + (item % HKV).to(tl.int64) * k_steps[1]
    k_from += first.to(tl.int64) * k_steps[2] + column[None, :]
    unit = 1.0
    shift = tl.zeros([1, BLOCK_D], tl.float32)
    if FP8:
        some = (tl.arange(0, _SAMPLED).to(tl.int64) * real // _SAMPLED)[:, None]
        sample = tl.load(k_from + some * k_steps[2], mask=near & (real > 0), other=0.0)
        sample = sample.to(tl.float32)
        if SHIFTED:
            # what all keys have in common changes no share, but takes precision
            shift = tl.sum(sample, 0)[None, :] / _SAMPLED
        # a sample: e4m3 reaches 14 times further up and 2000 times further down
        peak = tl.max(tl.max(tl.abs(sample - shift), 1), 0)
        unit = tl.where(peak > 0, peak / 32, 1.0)
    tl.store(unit_ptr + item, unit, mask=tl.program_id(0) == 0)
    wide = tl.program_id(0) * AT_ONCE + tl.arange(0, AT_ONCE)
    sums = tl.zeros([AT_ONCE, BLOCK_D], tl.float32)
    for part in tl.static_range(SUM_CELL // CELL):
        own = tl.zeros([AT_ONCE, BLOCK_D], tl.float32)
        for one in tl.static_range(CELL):
            key = wide * SUM_CELL + part * CELL + one
            at = k_from + key.to(tl.int64)[:, None] * k_steps[2]
            own += tl.load(at, mask=(key < real)[:, None] & near, other=0.0).to(tl.float32)
        sums += own
        cell = wide * (SUM_CELL // CELL) + part
        _store_means(own, fine_ptr, cell, item, n_fine, real, shift, unit, CELL, PER, BLOCK_D, FP8)
    _store_means(
        sums, wide_ptr, wide, item, n_wide, real, shift, unit, SUM_CELL, WIDE_PER, BLOCK_D, FP8
    )


@triton.jit
def _add_blocks(
    best, peak, total, factor, ceiling, SOFTCAP: tl.constexpr
):  # fmt: skip
    """A step of the running maximum and sum of each row's blocks."""
    scores = log2_scores(best, factor[:, None], ceiling, SOFTCAP)
    risen = tl.maximum(peak, tl.max(scores, 1))
    safe = tl.where(risen == float("-inf"), 0.0, risen)
    total = total * tl.exp2(peak - safe) + tl.sum(tl.exp2(scores - safe[:, None]), 1)
    return risen, total


@triton.jit
def rate_blocks(
    q_ptr, wide_ptr, fine_ptr, unit_ptr, ratings_ptr, first_ptr, stop_ptr, q_steps, q_len, kv_len,
    n_wide, n_fine, n_blocks, first_group, factor, ceiling, HKV: tl.constexpr, SHARE: tl.constexpr,
    TAKE: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    PER: tl.constexpr, WIDE_PER: tl.constexpr, STAGES: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """How much of a row's attention a cell of each block may hold, at most: log2 of the largest
    share of any row. Blocks that every group keeps are not rated.

    A block has PER cells; in a row's sum it counts with the best of its WIDE_PER wide cells.
    """
    here = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    item = tl.program_id(2)
    b = item // HKV
    _, begin, low, stop = group_span(first_ptr, stop_ptr, q_len, kv_len, b, first_group + here)
    q, pos = spread_queries(
        q_ptr, q_steps, b, item % HKV, tl.program_id(1), begin, low, stop, SHARE, TAKE, ROWS, D,
        BLOCK_D,
    )  # fmt: skip
    stop = tl.where(low < stop, stop, 0)
    line = tl.arange(0, _STEP)
    tile = line[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    factors = tl.zeros([TAKE * ROWS], tl.float32) + factor * tl.load(unit_ptr + item)
    if FP8:
        largest = tl.max(tl.abs(q.to(tl.float32)), 1)
        unit = tl.where(largest > 0, largest / 256, 1.0)
        q = _fp8(q.to(tl.float32) / unit[:, None])
        factors *= unit
    cells = wide_ptr + item.to(tl.int64) * n_wide * BLOCK_D
    steps = (stop + _STEP * _BLOCK - 1) // (_STEP * _BLOCK)
    whole = tl.minimum(low // (_STEP * _BLOCK), steps)
    peak = tl.full([TAKE * ROWS], float("-inf"), tl.float32)
    total = tl.zeros([TAKE * ROWS], tl.float32)
    best = tl.full([TAKE * ROWS, _STEP], float("-inf"), tl.float32)
    for at in tl.range(0, whole * WIDE_PER, num_stages=STAGES):
        k = tl.load(cells + at * (_STEP * BLOCK_D) + tile)
        best = tl.maximum(best, tl.dot(q, k.T, input_precision=PRECISION))
        if at % WIDE_PER == WIDE_PER - 1:
            peak, total = _add_blocks(best, peak, total, factors, ceiling, SOFTCAP)
            best = tl.full([TAKE * ROWS, _STEP], float("-inf"), tl.float32)
    for at in tl.range(whole * WIDE_PER, steps * WIDE_PER, num_stages=1):
        k = tl.load(cells + at * (_STEP * BLOCK_D) + tile)
        key = (at // WIDE_PER * _STEP + line) * _BLOCK + at % WIDE_PER * (_BLOCK // WIDE_PER)
        scores = tl.dot(q, k.T, input_precision=PRECISION)
        best = tl.maximum(best, tl.where(key[None, :] <= pos[:, None], scores, float("-inf")))
        if at % WIDE_PER == WIDE_PER - 1:
            peak, total = _add_blocks(best, peak, total, factors, ceiling, SOFTCAP)
            best = tl.full([TAKE * ROWS, _STEP], float("-inf"), tl.float32)
    # a row without a head takes no part: its shares are 0
    total *= PER
    lse = tl.where(total > 0, peak + tl.log2(tl.where(total > 0, total, 1.0)), float("inf"))
    cells = fine_ptr + item.to(tl.int64) * n_fine * BLOCK_D
    to = (item * tl.num_programs(0) + here) * tl.num_programs(1) + tl.program_id(1)
    to = ratings_ptr + to.to(tl.int64) * n_blocks
    rated = tl.where(low < stop, tl.maximum(low // _BLOCK, 0), 0)
    steps = (rated + _STEP - 1) // _STEP
    highest = tl.full([_STEP, TAKE * ROWS], float("-inf"), tl.float32)
    for at in tl.range(0, steps * PER, num_stages=STAGES):
        k = tl.load(cells + at * (_STEP * BLOCK_D) + tile)
        highest = tl.maximum(highest, tl.dot(k, q.T, input_precision=PRECISION))
        if at % PER == PER - 1:
            scores = log2_scores(highest, factors[None, :], ceiling, SOFTCAP) - lse[None, :]
            block = at // PER * _STEP + line
            tl.store(to + block, tl.max(scores, 1), mask=block < n_blocks)
            highest = tl.full([_STEP, TAKE * ROWS], float("-inf"), tl.float32)


def mean_cells(
    k: Float[Tensor, "B Hkv N D"], layout: Layout, cell: int, sum_cell: int, *, shifted: bool
) -> Cells:
    """Cells of whole steps of blocks, in e4m3 where the device multiplies it. These may be
    `shifted` by one vector a head, which softmax does not see but a soft cap does."""
    batch, kv_heads, kv_len, dim = k.shape
    blocks = -(-kv_len // (STEP * BLOCK)) * STEP
    fp8 = k.dtype != torch.float32 and capability(k.device) >= (8, 9)
    fine, wide = (
        torch.empty(
            (batch, kv_heads, blocks * (BLOCK // size), padded_dim(dim)),
            dtype=torch.float8_e4m3fn if fp8 else k.dtype,
            device=k.device,
        )
        for size in (cell, sum_cell)
    )
    unit = torch.empty((batch, kv_heads), device=k.device)
    at_once = 16
    _mean_cells[(wide.shape[2] // at_once, batch * kv_heads)](
        k, fine, wide, unit, layout.first, layout.stop, tuple(k.stride()[:3]), fine.shape[2],
        wide.shape[2], HKV=kv_heads, D=dim, BLOCK_D=padded_dim(dim), CELL=cell, SUM_CELL=sum_cell,
        PER=BLOCK // cell, WIDE_PER=BLOCK // sum_cell, AT_ONCE=at_once, FP8=fp8, SHIFTED=shifted,
        num_warps=4,
    )  # fmt: skip
    return Cells(fine, wide, unit)


def rate(
    q: Float[Tensor, "B H L D"],
    cells: Cells,
    layout: Layout,
    plan: Plan,
    ratings: Float[Tensor, "items groups parts blocks"],
    group: int,
    *,
    scale: float,
    softcap: float,
) -> None:
    """Fill in the ratings of groups from `group` on; a part holds the ratings by some of a KV
    head's query heads."""
    batch, heads, q_len, dim = q.shape
    kv_heads = cells.unit.shape[1]
    exact = q.dtype == torch.float32
    fp8 = cells.fine.element_size() == 1
    rate_blocks[(ratings.shape[1], ratings.shape[2], batch * kv_heads)](
        q, cells.wide, cells.fine, cells.unit, ratings, layout.first, layout.stop,
        tuple(q.stride()[:3]), q_len, layout.kv_len, cells.wide.shape[2], cells.fine.shape[2],
        ratings.shape[3], group, *log2_scaling(scale, softcap), HKV=kv_heads,
        SHARE=heads // kv_heads, TAKE=rated_at_once(q.dtype, heads // kv_heads), ROWS=plan.rows,
        D=dim, BLOCK_D=padded_dim(dim), PER=BLOCK // plan.cell, WIDE_PER=BLOCK // plan.sum_cell,
        STAGES=1 if exact else 3, SOFTCAP=bool(softcap), PRECISION="ieee" if exact else "tf32",
        FP8=fp8, num_warps=4,
    )  # fmt: skip


def rated_at_once(dtype: torch.dtype, share: int) -> int:
    """Query heads of a program."""
    return 1 if dtype == torch.float32 else min(RATED_AT_ONCE, power_of_two(share))
