"""The guard's recall on the GPU: the sum over all keys in splits, the sum over each row's list."""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from minference.index import BLOCK, Ragged
from minference.ops._triton import log2_scaling, padded_dim
from minference.ops.build import Layout
from minference.ops.groups.guard import guard_rows, lists_of_rows

SPLITS = 8
SLOTS = 16

_BLOCK = tl.constexpr(BLOCK)
_SLOTS = tl.constexpr(SLOTS)


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
def _add_block(
    q, k_from, k_step, first, block, pos, peak, total, factor, ceiling, D: tl.constexpr,
    BLOCK_D: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A step of the running maximum and sum over the keys of a block."""
    key = block * _BLOCK + tl.arange(0, _BLOCK)
    column = tl.arange(0, BLOCK_D)
    at = k_from + (first + key).to(tl.int64)[:, None] * k_step + column[None, :]
    seen = key <= tl.max(pos)
    k = tl.load(at, mask=seen[:, None] & (column < D)[None, :], other=0.0)
    scores = tl.dot(q, k.T, input_precision=PRECISION) * factor
    if SOFTCAP:
        scores = ceiling - 2 * ceiling / (tl.exp2(scores) + 1)
    scores = tl.where(key[None, :] <= pos[:, None], scores, float("-inf"))
    risen = tl.maximum(peak, tl.max(scores, 1))
    safe = tl.where(risen == float("-inf"), 0.0, risen)
    total = total * tl.exp2(peak - safe) + tl.sum(tl.exp2(scores - safe[:, None]), 1)
    return risen, total


@triton.jit
def _dense_sums(
    q_ptr, k_ptr, rows_ptr, sums_ptr, first_ptr, q_steps, k_steps, q_len, kv_len, slots, factor,
    ceiling, HKV: tl.constexpr, SHARE: tl.constexpr, TAKE: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr, BUNDLES: tl.constexpr,
):  # fmt: skip
    """Log2 sums of a range of the keys for 16 guarded rows of up to TAKE heads."""
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
    peak = tl.full([TAKE * _SLOTS], float("-inf"), tl.float32)
    total = tl.zeros([TAKE * _SLOTS], tl.float32)
    n = (tl.max(pos) + _BLOCK) // _BLOCK
    each = (n + SPLITS - 1) // SPLITS
    begin = tl.program_id(0) * each
    for block in tl.range(begin, tl.minimum(begin + each, n), num_stages=STAGES):
        peak, total = _add_block(
            q, k_from, k_steps[2], first, block, pos, peak, total, factor, ceiling, D, BLOCK_D,
            SOFTCAP, PRECISION,
        )  # fmt: skip
    lse = tl.where(total > 0, peak + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf"))
    to = ((item * slots + slot) * SHARE + inner).to(tl.int64) * SPLITS + tl.program_id(0)
    tl.store(sums_ptr + to, lse, mask=(slot < slots) & (inner < SHARE))


@triton.jit
def _kept_sums(
    q_ptr, k_ptr, rows_ptr, values_ptr, start_ptr, count_ptr, sums_ptr, first_ptr, q_steps, k_steps,
    q_len, kv_len, slots, factor, ceiling, HKV: tl.constexpr, SHARE: tl.constexpr,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Log2 sums over the listed blocks of one guarded row for every head of the KV head."""
    item = tl.program_id(1)
    b = item // HKV
    first = tl.load(first_ptr + b)
    inner = tl.arange(0, HEADS)
    pos = tl.load(rows_ptr + b * slots + tl.program_id(0)) + inner * 0
    q = _rows_of(
        q_ptr, q_steps, b, item % HKV, inner, pos, kv_len - q_len - first, SHARE, D, BLOCK_D
    )
    k_from = k_ptr + b.to(tl.int64) * k_steps[0] + (item % HKV).to(tl.int64) * k_steps[1]
    peak = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    at = item * slots + tl.program_id(0)
    values = values_ptr + tl.load(start_ptr + at)
    for i in tl.range(0, tl.load(count_ptr + at), num_stages=STAGES):
        peak, total = _add_block(
            q, k_from, k_steps[2], first, tl.load(values + i) >> 2, pos, peak, total, factor,
            ceiling, D, BLOCK_D, SOFTCAP, PRECISION,
        )  # fmt: skip
    lse = tl.where(total > 0, peak + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf"))
    tl.store(sums_ptr + at.to(tl.int64) * SHARE + inner, lse, mask=inner < SHARE)


class GuardSums:
    """The share that lists keep of the guarded rows of one call; their full sums are taken once."""

    def __init__(
        self,
        q: Float[Tensor, "B H L D"],
        k: Float[Tensor, "B Hkv N D"],
        layout: Layout,
        *,
        scale: float,
        softcap: float = 0.0,
    ) -> None:
        q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
        self.q, self.k, self.layout = q, k, layout
        self.rows = guard_rows(layout).to(torch.int32).contiguous()
        batch, heads, q_len, dim = q.shape
        kv_heads, slots = k.shape[1], self.rows.shape[1]
        self.share = heads // kv_heads
        exact = q.dtype == torch.float32
        scaling = log2_scaling(scale, softcap)
        self.sizes = (tuple(q.stride()[:3]), tuple(k.stride()[:3]), q_len, k.shape[2], slots)
        self.sizes += scaling
        self.fixed = {"HKV": kv_heads, "SHARE": self.share, "D": dim, "BLOCK_D": padded_dim(dim)}
        self.fixed |= {"SOFTCAP": bool(softcap), "PRECISION": "ieee" if exact else "tf32"}
        self.fixed |= {"STAGES": 1 if exact else 3, "num_warps": 4}
        take = 1 if exact else min(4, triton.next_power_of_2(self.share))
        bundles = -(-self.share // take)
        sums = q.new_empty((batch, kv_heads, slots, self.share, SPLITS), dtype=torch.float32)
        grid = (SPLITS, -(-slots // SLOTS) * bundles, batch * kv_heads)
        _dense_sums[grid](
            q, k, self.rows, sums, layout.first, *self.sizes, TAKE=take, SPLITS=SPLITS,
            BUNDLES=bundles, **self.fixed,
        )  # fmt: skip
        peak = sums.amax(dim=-1, keepdim=True).clamp(min=-1e30)
        self.dense = peak[..., 0] + (sums - peak).exp2().sum(dim=-1).log2()

    def __call__(self, lists: Ragged, tiles: int) -> Float[Tensor, "B Hkv slots"]:
        """A mean over the query heads of a KV head; 1 for rows that are not."""
        own = lists_of_rows(lists, tiles, self.rows, self.layout)
        sums = torch.empty_like(self.dense)
        grid = (self.rows.shape[1], self.q.shape[0] * self.k.shape[1])
        heads = max(16, triton.next_power_of_2(self.share))
        _kept_sums[grid](
            self.q, self.k, self.rows, own.values, own.start, own.count, sums, self.layout.first,
            *self.sizes, HEADS=heads, **self.fixed,
        )  # fmt: skip
        kept = (sums - self.dense).exp2().clamp(max=1.0).mean(dim=-1)
        return torch.where((self.rows >= 0)[:, None], kept, 1.0)
