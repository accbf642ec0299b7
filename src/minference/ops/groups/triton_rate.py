"""The coarse pass: means of keys, and what share of a row's attention a block may hold at most."""

import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from minference.index import BLOCK
from minference.ops._triton import padded_dim
from minference.ops.build import Layout
from minference.ops.groups.triton_rows import group_span, log2_scores, spread_queries

STEP = 64
"""Cells of a step of the coarse pass."""

_BLOCK = tl.constexpr(BLOCK)


@triton.jit
def _mean_cells(
    k_ptr, cells_ptr, first_ptr, stop_ptr, k_steps, n_cells, HKV: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, CELL: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Means of the real keys of each cell; 0 for a cell without any."""
    item = tl.program_id(1)
    b = item // HKV
    first = tl.load(first_ptr + b)
    real = tl.load(stop_ptr + b) - first
    key = tl.program_id(0) * AT_ONCE * CELL + tl.arange(0, AT_ONCE * CELL)
    column = tl.arange(0, BLOCK_D)
    at = k_ptr + b.to(tl.int64) * k_steps[0] + (item % HKV).to(tl.int64) * k_steps[1]
    at += (first + key).to(tl.int64)[:, None] * k_steps[2] + column[None, :]
    k = tl.load(at, mask=(key < real)[:, None] & (column < D)[None, :], other=0.0)
    sums = tl.sum(tl.reshape(k.to(tl.float32), [AT_ONCE, CELL, BLOCK_D]), 1)
    cell = tl.program_id(0) * AT_ONCE + tl.arange(0, AT_ONCE)
    there = tl.minimum(tl.maximum(real - cell * CELL, 1), CELL).to(tl.float32)
    to = cells_ptr + (item.to(tl.int64) * n_cells + cell)[:, None] * BLOCK_D + column[None, :]
    mean = (sums / there[:, None]).to(cells_ptr.dtype.element_ty)
    tl.store(to, mean, mask=(cell < n_cells)[:, None])


@triton.jit
def _add_cells(
    q, cells, at, stop, pos, peak, total, factor, ceiling, CELL: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_D: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A step of the running maximum and sum of each row's cells."""
    cell = at + tl.arange(0, WIDE)
    where = cells + cell[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    k = tl.load(where, mask=(cell < stop)[:, None], other=0.0) if MASKED else tl.load(where)
    scores = log2_scores(tl.dot(q, k.T, input_precision=PRECISION), factor, ceiling, SOFTCAP)
    if MASKED:
        scores = tl.where((cell * CELL)[None, :] <= pos[:, None], scores, float("-inf"))
    risen = tl.maximum(peak, tl.max(scores, 1))
    safe = tl.where(risen == float("-inf"), 0.0, risen)
    total = total * tl.exp2(peak - safe) + tl.sum(tl.exp2(scores - safe[:, None]), 1)
    return risen, total


@triton.jit
def _rate_cells(
    q, cells, to, at, stop, n_blocks, pos, lse, factor, ceiling, CELL: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_D: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Store the largest log2 share that any row gives to a cell of each block."""
    PER: tl.constexpr = _BLOCK // CELL
    cell = at + tl.arange(0, WIDE)
    where = cells + cell[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    k = tl.load(where, mask=(cell < stop)[:, None], other=0.0) if MASKED else tl.load(where)
    scores = log2_scores(tl.dot(k, q.T, input_precision=PRECISION), factor, ceiling, SOFTCAP)
    scores -= lse[None, :]
    if MASKED:
        scores = tl.where((cell * CELL)[:, None] <= pos[None, :], scores, float("-inf"))
    best = tl.max(tl.reshape(tl.max(scores, 1), [WIDE // PER, PER]), 1)
    block = at // PER + tl.arange(0, WIDE // PER)
    tl.store(to + block, best, mask=block < n_blocks)


@triton.jit
def rate_blocks(
    q_ptr, wide_ptr, cells_ptr, ratings_ptr, first_ptr, stop_ptr, q_steps, q_len, kv_len, n_wide,
    n_cells, n_blocks, first_group, factor, ceiling, HKV: tl.constexpr, SHARE: tl.constexpr,
    TAKE: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    SUM_CELL: tl.constexpr, CELL: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Coarse pass: how much of a row's attention a cell of each block may hold, at most.

    The rows' sums are taken over means of SUM_CELL keys.
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
    cells = wide_ptr + item.to(tl.int64) * n_wide * BLOCK_D
    end = (stop + SUM_CELL - 1) // SUM_CELL
    whole = tl.minimum(low // SUM_CELL // STEP * STEP, end)
    peak = tl.full([TAKE * ROWS], float("-inf"), tl.float32)
    total = tl.zeros([TAKE * ROWS], tl.float32)
    for at in tl.range(0, whole, STEP, num_stages=STAGES):
        peak, total = _add_cells(
            q, cells, at, end, pos, peak, total, factor, ceiling, SUM_CELL, STEP, BLOCK_D, SOFTCAP,
            False, PRECISION,
        )  # fmt: skip
    for at in tl.range(whole, end, STEP, num_stages=STAGES):
        peak, total = _add_cells(
            q, cells, at, end, pos, peak, total, factor, ceiling, SUM_CELL, STEP, BLOCK_D, SOFTCAP,
            True, PRECISION,
        )  # fmt: skip
    # a row without a head takes no part: its shares are 0
    total *= SUM_CELL // CELL
    lse = tl.where(total > 0, peak + tl.log2(tl.where(total > 0, total, 1.0)), float("inf"))
    cells = cells_ptr + item.to(tl.int64) * n_cells * BLOCK_D
    to = (item * tl.num_programs(0) + here) * tl.num_programs(1) + tl.program_id(1)
    to = ratings_ptr + to.to(tl.int64) * n_blocks
    end = (stop + CELL - 1) // CELL
    whole = tl.minimum(low // CELL // STEP * STEP, end)
    for at in tl.range(0, whole, STEP, num_stages=STAGES):
        _rate_cells(
            q, cells, to, at, end, n_blocks, pos, lse, factor, ceiling, CELL, STEP, BLOCK_D,
            SOFTCAP, False, PRECISION,
        )  # fmt: skip
    for at in tl.range(whole, end, STEP, num_stages=STAGES):
        _rate_cells(
            q, cells, to, at, end, n_blocks, pos, lse, factor, ceiling, CELL, STEP, BLOCK_D,
            SOFTCAP, True, PRECISION,
        )  # fmt: skip


def mean_cells(k: Tensor, layout: Layout, cell: int) -> Float[Tensor, "B Hkv cells D"]:
    """Means of every `cell` keys, padded to a multiple of what the coarse pass loads at once."""
    batch, kv_heads, kv_len, dim = k.shape
    n_cells = -(-kv_len // (cell * STEP)) * STEP
    cells = k.new_empty((batch, kv_heads, n_cells, padded_dim(dim)))
    at_once = min(STEP, 128 // cell)
    _mean_cells[(n_cells // at_once, batch * kv_heads)](
        k, cells, layout.first, layout.stop, tuple(k.stride()[:3]), n_cells, HKV=kv_heads, D=dim,
        BLOCK_D=padded_dim(dim), CELL=cell, AT_ONCE=at_once, num_warps=4,
    )  # fmt: skip
    return cells
