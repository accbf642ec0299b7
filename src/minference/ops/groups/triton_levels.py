"""The guard on the GPU in three launches: which blocks the guarded rows' lists have, what they keep
of the rows' attention, and the lists that follow from it."""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from minference.index import TILE, Ragged, whole_entries
from minference.ops._kernel import kernel
from minference.ops._triton import SIZES
from minference.ops.build import Layout
from minference.ops.groups.guard import DROPPED, Guarded, Kept, stride_of
from minference.ops.groups.plan import GROUP, GROUP_TILES, group_count, power_of_two
from minference.ops.groups.triton_guard import SPLITS, SUMS, row_sums

_TILE = tl.constexpr(TILE)
_TILES = tl.constexpr(GROUP_TILES)
_GROUP = tl.constexpr(GROUP)
_SPLITS = tl.constexpr(SPLITS)
_SUMS = tl.constexpr(SUMS)
_DROPPED = tl.constexpr(DROPPED)
_AT_ONCE = tl.constexpr(128)


@triton.jit
def _mark(flags, values_ptr, start_ptr, count_ptr, at, bit):
    """Sets a bit of the flags of a list's blocks."""
    values = values_ptr + tl.load(start_ptr + at)
    count = tl.load(count_ptr + at)
    for i in range(0, count, _AT_ONCE):
        place = i + tl.arange(0, _AT_ONCE)
        block = tl.load(values + place, mask=place < count, other=0) >> 2
        old = tl.load(flags + block, mask=place < count, other=0)
        tl.store(flags + block, old | bit, mask=place < count)


@kernel(do_not_specialize=SIZES)
def mark_blocks(
    rows_ptr, flags_ptr, values_ptr, start_ptr, count_ptr, wider_ptr, wider_start_ptr,
    wider_count_ptr, first_ptr, stop_ptr, q_len, kv_len, slots, stride, blocks, tiles, groups,
    HKV: tl.constexpr,
):  # fmt: skip
    """Position of each guarded row, bit 0 of the blocks in its list, bit 1 of the wider one's."""
    slot = tl.program_id(0)
    item = tl.program_id(1)
    b = item // HKV
    first = tl.load(first_ptr + b)
    begin = tl.maximum(kv_len - q_len - first, 0)
    group = begin // _GROUP + stride * slot
    low = tl.maximum(group * _GROUP, begin)
    many = tl.minimum((group + 1) * _GROUP, tl.load(stop_ptr + b) - first) - low
    row = low + (group * 167 + 61) % tl.maximum(many, 1)
    tl.store(rows_ptr + b * slots + slot, tl.where(many > 0, row, -1))
    flags = flags_ptr + (item * slots + slot).to(tl.int64) * blocks
    for i in range(0, blocks, _AT_ONCE):
        block = i + tl.arange(0, _AT_ONCE)
        tl.store(flags + block, block * 0, mask=block < blocks)
    # other threads' stores come first
    tl.debug_barrier()
    if many > 0:
        at = item * tiles + tl.minimum(row // _TILE - begin // _TILE, tiles - 1)
        _mark(flags, values_ptr, start_ptr, count_ptr, at, 1)
        tl.debug_barrier()
        at = item * groups + tl.minimum(row // _GROUP - begin // _GROUP, groups - 1)
        _mark(flags, wider_ptr, wider_start_ptr, wider_count_ptr, at, 2)


@triton.jit
def _kept(sums, real, dense, peak, which, SHARE: tl.constexpr):
    """What a list keeps of a row's attention, a mean over its heads, and the largest share of a
    head that one block has which it drops."""
    kept = tl.sum(tl.exp2(tl.load(sums + 1 + which, mask=real, other=float("-inf")) - peak), 1)
    most = tl.max(tl.exp2(tl.load(sums + 3 + which, mask=real, other=float("-inf")) - peak), 1)
    return tl.sum(kept / dense, 0) / SHARE, tl.max(most / dense, 0)


@kernel(do_not_specialize=SIZES)
def choose_lists(
    rows_ptr, sums_ptr, kept_ptr, level_ptr, start_ptr, count_ptr, wider_start_ptr,
    wider_count_ptr, start_to_ptr, count_to_ptr, first_ptr, q_len, kv_len, slots, stride, blocks,
    tiles, groups, wider_base, every_base, target, HKV: tl.constexpr, SHARE: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    """The list of each tile, then what each guarded row's lists keep and which one it takes."""
    at = tl.program_id(0)
    item = tl.program_id(1)
    b = item // HKV
    begin = tl.maximum(kv_len - q_len - tl.load(first_ptr + b), 0)
    tile = begin // _TILE + at
    group = tile // _TILES - begin // _GROUP
    slot = tl.where(at < tiles, tl.minimum(group // stride, slots - 1), at - tiles)
    line = item * slots + slot
    inner = tl.arange(0, HEADS)[:, None]
    split = tl.arange(0, _SPLITS)[None, :]
    sums = sums_ptr + ((line * SHARE + inner) * _SPLITS + split).to(tl.int64) * _SUMS
    there = tl.load(rows_ptr + b * slots + slot) >= 0
    real = tl.where(there, (inner < SHARE) & (split >= 0), False)
    full = tl.load(sums, mask=real, other=float("-inf"))
    peak = tl.maximum(tl.max(full, 1), -1e30)[:, None]
    dense = tl.sum(tl.exp2(full - peak), 1)
    dense = tl.where(dense > 0, dense, 1.0)
    recall, dropped = _kept(sums, real, dense, peak, 0, SHARE)
    wider_recall, wider_dropped = _kept(sums, real, dense, peak, 1, SHARE)
    enough = (recall >= target) & (dropped < _DROPPED)
    wider_enough = (wider_recall >= target) & (wider_dropped < _DROPPED)
    level = tl.where(enough | (there == 0), 0, tl.where(wider_enough, 1, 2))
    if at < tiles:
        of = item * tiles + at
        to = item * groups + tl.minimum(group, groups - 1)
        start, count = tl.load(start_ptr + of), tl.load(count_ptr + of)
        every = tl.where(count > 0, tl.minimum(2 * tile + 2, blocks), 0)
        start = tl.where(level == 1, tl.load(wider_start_ptr + to) + wider_base, start)
        tl.store(start_to_ptr + of, tl.where(level == 2, start * 0 + every_base, start))
        count = tl.where(level == 1, tl.load(wider_count_ptr + to), count)
        tl.store(count_to_ptr + of, tl.where(level == 2, every, count))
    else:
        tl.store(level_ptr + line, level)
        plane = tl.num_programs(1) * slots
        tl.store(kept_ptr + line, tl.where(there, recall, 1.0))
        tl.store(kept_ptr + plane + line, tl.where(there, dropped, 0.0))
        tl.store(kept_ptr + 2 * plane + line, tl.where(there, wider_recall, 1.0))
        tl.store(kept_ptr + 3 * plane + line, tl.where(there, wider_dropped, 0.0))


def guard(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B Hkv N D"],
    lists: Ragged,
    wider: Ragged,
    layout: Layout,
    target: float,
    *,
    scale: float,
    softcap: float = 0.0,
) -> tuple[Guarded, tuple[Kept, Kept]]:
    """As `guard.guard`, and what the lists and the wider ones keep."""
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    batch, kv_heads = k.shape[:2]
    items, share = batch * kv_heads, q.shape[1] // kv_heads
    stride, blocks = stride_of(layout), layout.blocks
    slots = -(-group_count(layout) // stride)
    tiles, groups = lists.count.shape[2], wider.count.shape[2]
    whole, more = ((x.start.contiguous(), x.count.contiguous()) for x in (lists, wider))
    rows = torch.empty((batch, slots), dtype=torch.int32, device=q.device)
    flags = torch.empty((items, slots, blocks), dtype=torch.uint8, device=q.device)
    sizes = (layout.q_len, layout.kv_len, slots, stride, blocks, tiles, groups)
    mark_blocks[(slots, items)](
        rows, flags, lists.values, *whole, wider.values, *more, layout.first, layout.stop, *sizes,
        HKV=kv_heads, num_warps=4,
    )  # fmt: skip
    sums = row_sums(q, k, rows, flags, layout, scale=scale, softcap=softcap)
    kept = torch.empty((4, batch, kv_heads, slots), device=q.device)
    level = torch.empty((batch, kv_heads, slots), dtype=torch.int64, device=q.device)
    start, count = torch.empty_like(whole[0]), torch.empty_like(whole[1])
    values = torch.cat([lists.values, wider.values, _every(blocks, q.device)])
    base = lists.values.numel()
    choose_lists[(tiles + slots, items)](
        rows, sums, kept, level, *whole, *more, start, count, layout.first, *sizes, base,
        base + wider.values.numel(), target, HKV=kv_heads, SHARE=share, HEADS=power_of_two(share),
        num_warps=1,
    )  # fmt: skip
    done = Guarded(Ragged(values, start, count), kept[0], level)
    return done, (Kept(kept[0], kept[1]), Kept(kept[2], kept[3]))


@lru_cache(maxsize=16)
def _every(blocks: int, device: torch.device) -> Int[Tensor, " blocks"]:
    return whole_entries(torch.arange(blocks, dtype=torch.int32, device=device))
