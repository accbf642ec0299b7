"""The last-query estimate on the GPU: two passes over K, each tile read once for its query heads.

Pass 1 takes every row's log-sum-exp over ranges of keys; pass 2 sums the weights of each block of
64 keys down its columns and into the five block offsets that it can touch. Nothing is added
atomically, so equal calls give equal bits.
"""

import math

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from minference.index import BLOCK, TILE
from minference.ops._triton import padded_dim
from minference.ops.estimate.reference import ROWS, MassScores

SPLITS = 64
HEADS_AT_ONCE = 4
LOG2_E = math.log2(math.e)

_ROWS = tl.constexpr(ROWS)
_BLOCK = tl.constexpr(BLOCK)
_PARTS = tl.constexpr(8)


@triton.jit
def _last_queries(
    q_ptr, q_steps, b, kv_head, bundle, real, q_start, rows, SHARE: tl.constexpr,
    TAKE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The last 64 rows of TAKE query heads, one below the other, their positions and heads; the
    position of a row that does not count is -1."""
    line = tl.arange(0, TAKE * _ROWS)
    inner = bundle * TAKE + line // _ROWS
    head = kv_head * SHARE + inner
    pos = real - _ROWS + line % _ROWS
    low = tl.maximum(tl.maximum(real - rows, q_start), 0)
    pos = tl.where((pos >= low) & (inner < SHARE), pos, -1)
    column = tl.arange(0, BLOCK_D)
    at = b.to(tl.int64) * q_steps[0] + head.to(tl.int64)[:, None] * q_steps[1]
    at += (pos - q_start).to(tl.int64)[:, None] * q_steps[2] + column[None, :]
    known = (pos >= 0)[:, None] & (column < D)[None, :]
    return tl.load(q_ptr + at, mask=known, other=0.0), pos, head, inner < SHARE


@triton.jit
def _keys(k_from, k_step, key, real, first, D: tl.constexpr, BLOCK_D: tl.constexpr):
    column = tl.arange(0, BLOCK_D)
    at = (first + key).to(tl.int64)[:, None] * k_step + column[None, :]
    return tl.load(k_from + at, mask=(key < real)[:, None] & (column < D)[None, :], other=0.0)


@triton.jit
def _capped(scores, factor, ceiling, SOFTCAP: tl.constexpr):
    """Scores in units of log2."""
    if SOFTCAP:
        return ceiling - 2 * ceiling / (tl.exp2(scores * factor) + 1)
    return scores * factor


@triton.jit
def _row_sums(
    q_ptr, k_ptr, lse_ptr, first_ptr, stop_ptr, q_steps, k_steps, q_len, kv_len, rows, factor,
    ceiling, span, HKV: tl.constexpr, SHARE: tl.constexpr, TAKE: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0)
    b = tl.program_id(2) // HKV
    kv_head = tl.program_id(2) % HKV
    first = tl.load(first_ptr + b)
    real = tl.load(stop_ptr + b) - first
    q, pos, head, there = _last_queries(
        q_ptr, q_steps, b, kv_head, tl.program_id(1), real, kv_len - q_len - first, rows, SHARE,
        TAKE, D, BLOCK_D,
    )  # fmt: skip
    k_from = k_ptr + b.to(tl.int64) * k_steps[0] + kv_head.to(tl.int64) * k_steps[1]
    peak = tl.full([TAKE * _ROWS], float("-inf"), tl.float32)
    total = tl.zeros([TAKE * _ROWS], tl.float32)
    end = tl.minimum((split + 1) * span, (real + _BLOCK - 1) // _BLOCK)
    for j in tl.range(split * span, end, num_stages=STAGES):
        key = j * _BLOCK + tl.arange(0, _BLOCK)
        k = _keys(k_from, k_steps[2], key, real, first, D, BLOCK_D)
        scores = _capped(tl.dot(q, k.T, input_precision=PRECISION), factor, ceiling, SOFTCAP)
        scores = tl.where(key[None, :] <= pos[:, None], scores, float("-inf"))
        risen = tl.maximum(peak, tl.max(scores, 1))
        safe = tl.where(risen == float("-inf"), 0.0, risen)
        total = total * tl.exp2(peak - safe) + tl.sum(tl.exp2(scores - safe[:, None]), 1)
        peak = risen
    lse = tl.where(total > 0, peak + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf"))
    line = (b * HKV * SHARE + head).to(tl.int64) * _ROWS + tl.arange(0, TAKE * _ROWS) % _ROWS
    # natural logarithm, as logsumexp combines the splits
    tl.store(lse_ptr + line * SPLITS + split, lse * 0.6931471805599453, mask=there)


@triton.jit
def _block_sums(weights, shift, key_in_block, row, TAKE: tl.constexpr):
    """Column sums [64, TAKE] of weights [64 keys, TAKE * 64 rows], and their mass at the offsets
    a - 2 .. a + 2, each [TAKE].

    A pair's distance is 64 a + u with u = shift + row - key, in [-63, 126]. With u = 64 z + w,
    0 <= w < 64, a tile's 128 rows see the distance w / 128 in offset a + z + 1, 1 / 2 in a + z and
    (64 - w) / 128 in a + z - 1.
    """
    weights = tl.reshape(weights, [_BLOCK, TAKE, _ROWS])
    u = (shift + row)[None, None, :] - key_in_block[:, None, None]
    by_u = weights * u.to(tl.float32)
    sums = tl.sum(weights, 2)
    low = tl.sum(tl.where(u < 0, weights, 0.0), 2) * 64
    high = tl.sum(tl.where(u >= 64, weights, 0.0), 2) * 64
    low_w = tl.sum(tl.where(u < 0, by_u, 0.0), 2) + low
    high_w = tl.sum(tl.where(u >= 64, by_u, 0.0), 2) - high
    middle = sums * 64 - low - high
    middle_w = tl.sum(by_u, 2) - (low_w - low) - (high_w + high)
    m0 = tl.sum(low - low_w, 0) / 128
    m1 = tl.sum(low + middle - middle_w, 0) / 128
    m2 = tl.sum(low_w + middle + high - high_w, 0) / 128
    m3 = tl.sum(middle_w + high, 0) / 128
    m4 = tl.sum(high_w, 0) / 128
    return sums, m0, m1, m2, m3, m4


@triton.jit
def _line_sums(
    q_ptr, k_ptr, lse_ptr, columns_ptr, parts_ptr, first_ptr, stop_ptr, q_steps, k_steps, q_len,
    kv_len, rows, factor, ceiling, span, blocks, HKV: tl.constexpr, SHARE: tl.constexpr,
    TAKE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(2) // HKV
    kv_head = tl.program_id(2) % HKV
    first = tl.load(first_ptr + b)
    real = tl.load(stop_ptr + b) - first
    q, pos, head, there = _last_queries(
        q_ptr, q_steps, b, kv_head, tl.program_id(1), real, kv_len - q_len - first, rows, SHARE,
        TAKE, D, BLOCK_D,
    )  # fmt: skip
    row = tl.arange(0, _ROWS)
    line = (b * HKV * SHARE + head).to(tl.int64) * _ROWS + tl.arange(0, TAKE * _ROWS) % _ROWS
    lse = tl.load(lse_ptr + line, mask=there & (pos >= 0), other=0.0) * 1.4426950408889634
    k_from = k_ptr + b.to(tl.int64) * k_steps[0] + kv_head.to(tl.int64) * k_steps[1]
    inner = tl.program_id(1) * TAKE + tl.arange(0, TAKE)
    list_of = (b * HKV * SHARE + kv_head * SHARE + inner).to(tl.int64)
    begin = tl.program_id(0) * span
    for j in tl.range(begin, tl.minimum(begin + span, blocks), num_stages=STAGES):
        inside = tl.arange(0, _BLOCK)
        key = j * _BLOCK + inside
        k = _keys(k_from, k_steps[2], key, real, first, D, BLOCK_D)
        scores = tl.dot(k, q.T, input_precision=PRECISION)  # [64 keys, TAKE * 64 rows]
        scores = _capped(scores, factor, ceiling, SOFTCAP)
        weights = tl.exp2(scores - lse[None, :])
        weights = tl.where(key[:, None] <= pos[None, :], weights, 0.0)
        sums, m0, m1, m2, m3, m4 = _block_sums(weights, (real - _ROWS) & 63, inside, row, TAKE)
        sums = tl.where((key < real)[:, None], sums, -1.0)
        to = columns_ptr + list_of[None, :] * kv_len + key[:, None]
        tl.store(to, sums, mask=(key < kv_len)[:, None] & (inner < SHARE)[None, :])
        part = parts_ptr + (list_of * blocks + j) * _PARTS
        tl.store(part, m0, mask=inner < SHARE)
        tl.store(part + 1, m1, mask=inner < SHARE)
        tl.store(part + 2, m2, mask=inner < SHARE)
        tl.store(part + 3, m3, mask=inner < SHARE)
        tl.store(part + 4, m4, mask=inner < SHARE)


@triton.jit
def _offset_sums(
    parts_ptr, masses_ptr, first_ptr, stop_ptr, heads, blocks, slots, SLOTS: tl.constexpr
):
    item = tl.program_id(1)
    b = item // heads
    real = tl.load(stop_ptr + b) - tl.load(first_ptr + b)
    slot = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    block = ((real - _ROWS) >> 6) - (slot - 1) - 2
    mass = tl.zeros([SLOTS], tl.float32)
    for part in tl.static_range(5):
        known = (block + part >= 0) & (block + part < blocks)
        at = (item.to(tl.int64) * blocks + block + part) * _PARTS + part
        mass += tl.load(parts_ptr + at, mask=known, other=0.0)
    # what rounding leaves below zero would read as "does not exist"
    to = masses_ptr + item.to(tl.int64) * slots + slot
    tl.store(to, tl.maximum(mass, 0.0), mask=slot < slots)


def last_query_masses(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B Hkv N D"],
    first: Int[Tensor, " B"],
    stop: Int[Tensor, " B"],
    *,
    scale: float,
    softcap: float = 0.0,
    rows: int = ROWS,
) -> MassScores:
    """Column and block-offset sums of the last `rows` real queries (64 at most), as the reference
    defines them, without a host read.

    Raises:
        ValueError: more rows than the kernels hold.
    """
    if not 1 <= rows <= ROWS:
        raise ValueError(
            f"rows must be 1 to {ROWS} in the Triton estimate, got {rows}; use impl='torch'"
        )
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    batch, heads, q_len, dim = q.shape
    kv_heads, kv_len = k.shape[1:3]
    share = heads // kv_heads
    exact = q.dtype == torch.float32
    take = 1 if exact else min(HEADS_AT_ONCE, triton.next_power_of_2(share))
    blocks = -(-kv_len // BLOCK)
    splits = min(SPLITS, blocks)
    scaling = (scale * LOG2_E, 0.0)
    if softcap:
        scaling = (2 * LOG2_E * scale / softcap, softcap * LOG2_E)
    lse = q.new_empty((batch, heads, ROWS, splits), dtype=torch.float32)
    columns = q.new_empty((batch, heads, kv_len), dtype=torch.float32)
    parts = q.new_empty((batch, heads, blocks, 8), dtype=torch.float32)
    slots = 2 * -(-kv_len // TILE) + 2
    masses = q.new_empty((batch, heads, slots), dtype=torch.float32)
    sizes = (tuple(q.stride()[:3]), tuple(k.stride()[:3]), q_len, kv_len, rows, *scaling)
    fixed = {"HKV": kv_heads, "SHARE": share, "TAKE": take, "D": dim, "SOFTCAP": bool(softcap)}
    fixed |= {"BLOCK_D": padded_dim(dim), "STAGES": 1 if exact else 3}
    fixed |= {"PRECISION": "ieee" if exact else "tf32", "num_warps": 8 if take == 4 else 4}
    grid = (splits, -(-share // take), batch * kv_heads)
    span = -(-blocks // splits)
    _row_sums[grid](q, k, lse, first, stop, *sizes, span, SPLITS=splits, **fixed)
    total = lse.logsumexp(dim=-1)
    _line_sums[grid](q, k, total, columns, parts, first, stop, *sizes, span, blocks, **fixed)
    _offset_sums[(-(-slots // 256), batch * heads)](
        parts, masses, first, stop, heads, blocks, slots, 256
    )
    return MassScores(columns, masses)
