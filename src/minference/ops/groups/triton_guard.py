"""What two lists keep of the guarded rows' attention, on the GPU, in one pass over the keys."""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from minference.index import BLOCK
from minference.ops._triton import log2_scaling, padded_dim
from minference.ops.build import Layout
from minference.ops.groups.plan import power_of_two

SPLITS = 8
SLOTS = 16

SUMS = 5
"""Numbers of a row: log2 sums of all keys and of those that the first and second list keep, and of
the largest block that the first and second list drop."""

_BLOCK = tl.constexpr(BLOCK)
_SLOTS = tl.constexpr(SLOTS)
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
def _block_sums(
    q, k_from, k_step, first, block, pos, factor, ceiling, D: tl.constexpr, BLOCK_D: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The log2 sum of each row over the keys of a block."""
    key = block * _BLOCK + tl.arange(0, _BLOCK)
    column = tl.arange(0, BLOCK_D)
    at = k_from + (first + key).to(tl.int64)[:, None] * k_step + column[None, :]
    seen = key <= tl.max(pos)
    k = tl.load(at, mask=seen[:, None] & (column < D)[None, :], other=0.0)
    scores = tl.dot(q, k.T, input_precision=PRECISION) * factor
    if SOFTCAP:
        scores = ceiling - 2 * ceiling / (tl.exp2(scores) + 1)
    scores = tl.where(key[None, :] <= pos[:, None], scores, float("-inf"))
    most = tl.max(scores, 1)
    safe = tl.where(most == float("-inf"), 0.0, most)
    return most + tl.log2(tl.maximum(tl.sum(tl.exp2(scores - safe[:, None]), 1), 1.0))


@triton.jit
def _log2_of(total, peak):
    """Log2 of a sum relative to 2 ** peak; -inf of nothing."""
    return tl.where(total > 0, peak + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf"))


@triton.jit
def _row_sums(
    q_ptr, k_ptr, rows_ptr, flags_ptr, sums_ptr, first_ptr, q_steps, k_steps, q_len, kv_len, slots,
    blocks, factor, ceiling, HKV: tl.constexpr, SHARE: tl.constexpr, TAKE: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, BUNDLES: tl.constexpr,
):  # fmt: skip
    """The five numbers of 16 guarded rows of up to TAKE heads, for a range of the keys."""
    item = tl.program_id(2)
    b = item // HKV
    first = tl.load(first_ptr + b)
    line = tl.arange(0, TAKE * _SLOTS)
    slot = tl.program_id(1) // BUNDLES * _SLOTS + line // TAKE
    inner = tl.program_id(1) % BUNDLES * TAKE + line % TAKE
    pos = tl.load(rows_ptr + b * slots + slot, mask=slot < slots, other=-1)
    q = _rows_of(
        q_ptr, q_steps, b, item % HKV, inner, pos, kv_len - q_len - first, SHARE, D, BLOCK_D
    )
    k_from = k_ptr + b.to(tl.int64) * k_steps[0] + (item % HKV).to(tl.int64) * k_steps[1]
    none = tl.full([TAKE * _SLOTS], float("-inf"), tl.float32)
    peak, dropped, dropped_too = none, none, none
    total = tl.zeros([TAKE * _SLOTS], tl.float32)
    kept, kept_too = total, total
    n = (tl.max(pos) + _BLOCK) // _BLOCK
    each = (n + SPLITS - 1) // SPLITS
    begin = tl.program_id(0) * each
    flags_ptr += (item * slots + slot).to(tl.int64) * blocks
    for block in tl.range(begin, tl.minimum(begin + each, n), num_stages=STAGES):
        held = _block_sums(
            q, k_from, k_steps[2], first, block, pos, factor, ceiling, D, BLOCK_D, SOFTCAP,
            PRECISION,
        )  # fmt: skip
        flags = tl.load(flags_ptr + block, mask=slot < slots, other=0).to(tl.int32)
        listed, listed_too = (flags & 1) > 0, (flags & 2) > 0
        dropped = tl.maximum(dropped, tl.where(listed, float("-inf"), held))
        dropped_too = tl.maximum(dropped_too, tl.where(listed_too, float("-inf"), held))
        risen = tl.maximum(peak, held)
        safe = tl.where(risen == float("-inf"), 0.0, risen)
        old, new = tl.exp2(peak - safe), tl.exp2(held - safe)
        total = total * old + new
        kept = kept * old + tl.where(listed, new, 0.0)
        kept_too = kept_too * old + tl.where(listed_too, new, 0.0)
        peak = risen
    to = ((item * slots + slot) * SHARE + inner).to(tl.int64) * SPLITS + tl.program_id(0)
    to = sums_ptr + to * _SUMS
    real = (slot < slots) & (inner < SHARE)
    tl.store(to, _log2_of(total, peak), mask=real)
    tl.store(to + 1, _log2_of(kept, peak), mask=real)
    tl.store(to + 2, _log2_of(kept_too, peak), mask=real)
    tl.store(to + 3, dropped, mask=real)
    tl.store(to + 4, dropped_too, mask=real)


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
    sums = q.new_empty((batch, kv_heads, slots, share, SPLITS, SUMS), dtype=torch.float32)
    _row_sums[(SPLITS, -(-slots // SLOTS) * bundles, batch * kv_heads)](
        q, k, rows, flags, sums, layout.first, tuple(q.stride()[:3]), tuple(k.stride()[:3]), q_len,
        k.shape[2], slots, flags.shape[2], *log2_scaling(scale, softcap), HKV=kv_heads, SHARE=share,
        TAKE=take, D=dim, BLOCK_D=padded_dim(dim), SPLITS=SPLITS, STAGES=1 if exact else 3,
        SOFTCAP=bool(softcap), PRECISION="ieee" if exact else "tf32", BUNDLES=bundles, num_warps=4,
    )  # fmt: skip
    return sums
