"""What two lists keep of the guarded rows' attention, on the GPU, in one pass over the keys."""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from minference.index import BLOCK
from minference.ops._kernel import kernel
from minference.ops._triton import REGISTERS, SIZES, at_once, log2_scaling, padded_dim
from minference.ops.build import Layout
from minference.ops.groups.plan import power_of_two
from minference.ops.groups.triton_rows import MOST, log2_scores

SPLITS = 16

SLOTS = 32
"""Guarded rows of a program, at most."""

SUMS = 5
"""Numbers of a row: log2 sums of all keys and of those that the first and second list keep, and of
the largest block that the first and second list drop."""

_BLOCK = tl.constexpr(BLOCK)
_STEP = tl.constexpr(64)
_SUMS = tl.constexpr(SUMS)


@triton.jit
def _rows_of(
    q_ptr, q_steps, b, kv_head, inner, pos, begin, SHARE: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK_D)
    at = b.to(tl.int64) * q_steps[0] + (kv_head * SHARE + inner).to(tl.int64)[:, None] * q_steps[1]
    at += (pos - begin).to(tl.int64)[:, None] * q_steps[2] + column[None, :]
    known = ((pos >= 0) & (inner < SHARE))[:, None] & (column < D)[None, :]
    return tl.load(q_ptr + at, mask=known, other=0.0)


@triton.jit
def _log2_of(total, peak):
    """Log2 of a sum relative to 2 ** peak; -inf of nothing."""
    return tl.where(total > 0, peak + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf"))


@kernel(do_not_specialize=SIZES)
def _row_sums(
    q_ptr, k_ptr, rows_ptr, flags_ptr, sums_ptr, first_ptr, q_steps, k_steps, q_len, kv_len, slots,
    blocks, factor, ceiling, HKV: tl.constexpr, SHARE: tl.constexpr, TAKE: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, BUNDLES: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """The five numbers of some guarded rows of up to TAKE heads, for a range of the keys.

    64 blocks are added up at a time, their first keys first, so that a block's sum is taken
    element by element. Exponentials are relative to the row's best score in block 0, which every
    program has; a key that has 2 ** 100 times more weight counts as if it had just that.
    """
    item = tl.program_id(2)
    b = item // HKV
    first = tl.load(first_ptr + b)
    line = tl.arange(0, TAKE * SLOTS)
    slot = tl.program_id(1) // BUNDLES * SLOTS + line // TAKE
    inner = tl.program_id(1) % BUNDLES * TAKE + line % TAKE
    pos = tl.load(rows_ptr + b * slots + slot, mask=slot < slots, other=-1)
    q = _rows_of(
        q_ptr, q_steps, b, item % HKV, inner, pos, kv_len - q_len - first, SHARE, D, BLOCK_D
    )
    column = tl.arange(0, BLOCK_D)
    there = (column < D)[None, :]
    k_from = k_ptr + b.to(tl.int64) * k_steps[0] + (item % HKV).to(tl.int64) * k_steps[1]
    k_from += first.to(tl.int64) * k_steps[2] + column[None, :]
    last = tl.max(pos)
    key = tl.arange(0, _BLOCK)
    k = tl.load(k_from + key[:, None] * k_steps[2], mask=(key <= last)[:, None] & there, other=0.0)
    scores = tl.dot(q, k.T, input_precision=PRECISION)
    scores = log2_scores(scores, factor, ceiling, SOFTCAP)
    peak = tl.max(tl.where(key[None, :] <= pos[:, None], scores, float("-inf")), 1)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.zeros([SLOTS * TAKE], tl.float32)
    kept, kept_too, dropped, dropped_too = total, total, total, total
    held = tl.zeros([SLOTS * TAKE, _STEP], tl.float32)
    steps = (last + _STEP * _BLOCK) // (_STEP * _BLOCK)
    each = (steps + SPLITS - 1) // SPLITS
    begin = tl.program_id(0) * each
    own = tl.program_id(1) // BUNDLES * SLOTS + tl.arange(0, SLOTS)
    flags_ptr += (item * slots + own).to(tl.int64)[:, None] * blocks
    for at in tl.range(begin * _BLOCK, tl.minimum(begin + each, steps) * _BLOCK, num_stages=STAGES):
        step = at // _BLOCK
        block = step * _STEP + tl.arange(0, _STEP)
        key = block * _BLOCK + (at - step * _BLOCK)
        k = tl.load(
            k_from + key.to(tl.int64)[:, None] * k_steps[2],
            mask=(key <= last)[:, None] & there,
            other=0.0,
        )
        scores = tl.dot(q, k.T, input_precision=PRECISION)
        scores = log2_scores(scores, factor, ceiling, SOFTCAP) - peak[:, None]
        weights = tl.exp2(tl.minimum(scores, MOST))
        held += tl.where(key[None, :] <= pos[:, None], weights, 0.0)
        if (at + 1) // _BLOCK * _BLOCK == at + 1:
            known = (own < slots)[:, None] & (block < blocks)[None, :]
            flags = tl.load(flags_ptr + block[None, :], mask=known, other=0)
            flags = tl.broadcast_to(flags[:, None, :], [SLOTS, TAKE, _STEP])
            flags = tl.reshape(flags, [SLOTS * TAKE, _STEP])
            listed, listed_too = (flags & 1) > 0, (flags & 2) > 0
            total += tl.sum(held, 1)
            kept += tl.sum(tl.where(listed, held, 0.0), 1)
            kept_too += tl.sum(tl.where(listed_too, held, 0.0), 1)
            dropped = tl.maximum(dropped, tl.max(tl.where(listed, 0.0, held), 1))
            dropped_too = tl.maximum(dropped_too, tl.max(tl.where(listed_too, 0.0, held), 1))
            held = tl.zeros([SLOTS * TAKE, _STEP], tl.float32)
    to = ((item * slots + slot) * SHARE + inner).to(tl.int64) * SPLITS + tl.program_id(0)
    to = sums_ptr + to * _SUMS
    real = (slot < slots) & (inner < SHARE)
    tl.store(to, _log2_of(total, peak), mask=real)
    tl.store(to + 1, _log2_of(kept, peak), mask=real)
    tl.store(to + 2, _log2_of(kept_too, peak), mask=real)
    tl.store(to + 3, _log2_of(dropped, peak), mask=real)
    tl.store(to + 4, _log2_of(dropped_too, peak), mask=real)


def row_sums(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B Hkv N D"],
    rows: Int[Tensor, "B slots"],
    flags: Int[Tensor, "items slots blocks"],
    layout: Layout,
    *,
    scale: float,
    softcap: float,
) -> Float[Tensor, "B Hkv slots heads splits numbers"]:
    """The five numbers of every guarded row and query head, for each split of the keys."""
    batch, heads, q_len, dim = q.shape
    kv_heads, slots = k.shape[1], rows.shape[1]
    share = heads // kv_heads
    exact = q.dtype == torch.float32
    take = 1 if exact else min(4, power_of_two(share))
    bundles = -(-share // take)
    guarded = at_once(SLOTS, dim)
    sums = q.new_empty((batch, kv_heads, slots, share, SPLITS, SUMS), dtype=torch.float32)
    _row_sums[(SPLITS, -(-slots // guarded) * bundles, batch * kv_heads)](
        q, k, rows, flags, sums, layout.first, tuple(q.stride()[:3]), tuple(k.stride()[:3]), q_len,
        k.shape[2], slots, flags.shape[2], *log2_scaling(scale, softcap), HKV=kv_heads, SHARE=share,
        TAKE=take, D=dim, BLOCK_D=padded_dim(dim), SPLITS=SPLITS, STAGES=1 if exact else 3,
        SOFTCAP=bool(softcap), PRECISION="ieee" if exact else "tf32", BUNDLES=bundles,
        SLOTS=guarded, num_warps=8, maxnreg=None if exact else REGISTERS,
    )  # fmt: skip
    return sums
