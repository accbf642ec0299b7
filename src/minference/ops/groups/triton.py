"""The grouped estimate on the GPU, coarse to fine, without a host read or a rows x keys buffer.

A program serves one group of one KV head: 64 rows of up to four query heads are one tile of 256
rows, so every key is read once for all of them. Means of 16 keys choose candidate blocks; the
candidates' exact scores give each tile's masses; each tile keeps the fewest blocks that hold its
share. Nothing is added atomically, so equal calls give equal bits.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from minference.index import BLOCK, TILE, Ragged
from minference.ops._triton import log2_scaling, padded_dim
from minference.ops.build import Layout
from minference.ops.groups.plan import GROUP_TILES, Plan, group_count, list_room

RATED_AT_ONCE = 2
"""Query heads of a program of the coarse pass: with two, two programs share a multiprocessor; at
128K that took 4.9 ms on an H100, four heads 5.9 ms."""

WEIGHED_AT_ONCE = 4
"""Query heads of a program of the fine pass."""

STEP = 64
"""Cells of a step of the coarse pass."""

LISTS_AT_ONCE = 4096
"""Groups whose scratch, cap x rows floats each, exists at one time."""

_BLOCK = tl.constexpr(BLOCK)
_TILE = tl.constexpr(TILE)
_TILES = tl.constexpr(GROUP_TILES)


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
def _span(first_ptr, stop_ptr, q_len, kv_len, b, group):
    """First real query position of the chunk; first and past-the-last row of a group."""
    first = tl.load(first_ptr + b)
    begin = kv_len - q_len - first
    low = tl.maximum(begin, 0)
    start = (low // (_TILES * _TILE) + group) * (_TILES * _TILE)
    stop = tl.minimum(start + _TILES * _TILE, tl.load(stop_ptr + b) - first)
    return first, begin, tl.maximum(start, low), stop


@triton.jit
def _spread_queries(
    q_ptr, q_steps, b, kv_head, bundle, begin, low, stop, SHARE: tl.constexpr, TAKE: tl.constexpr,
    ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The sampled rows, each for TAKE query heads in turn, and their positions; -1 where there is
    no head."""
    line = tl.arange(0, TAKE * ROWS)
    inner = bundle * TAKE + line % TAKE
    pos = low + (2 * (line // TAKE) + 1) * tl.maximum(stop - low, 0) // (2 * ROWS)
    pos = tl.where((inner < SHARE) & (low < stop), pos, -1)
    column = tl.arange(0, BLOCK_D)
    at = b.to(tl.int64) * q_steps[0] + (kv_head * SHARE + inner).to(tl.int64)[:, None] * q_steps[1]
    at += (pos - begin).to(tl.int64)[:, None] * q_steps[2] + column[None, :]
    known = (pos >= 0)[:, None] & (column < D)[None, :]
    return tl.load(q_ptr + at, mask=known, other=0.0), pos


@triton.jit
def _capped(scores, factor, ceiling, SOFTCAP: tl.constexpr):
    """Scores in units of log2."""
    if SOFTCAP:
        return ceiling - 2 * ceiling / (tl.exp2(scores * factor) + 1)
    return scores * factor


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
    scores = _capped(tl.dot(q, k.T, input_precision=PRECISION), factor, ceiling, SOFTCAP)
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
    scores = _capped(tl.dot(k, q.T, input_precision=PRECISION), factor, ceiling, SOFTCAP)
    scores -= lse[None, :]
    if MASKED:
        scores = tl.where((cell * CELL)[:, None] <= pos[None, :], scores, float("-inf"))
    best = tl.max(tl.reshape(tl.max(scores, 1), [WIDE // PER, PER]), 1)
    block = at // PER + tl.arange(0, WIDE // PER)
    tl.store(to + block, best, mask=block < n_blocks)


@triton.jit
def _rate_blocks(
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
    _, begin, low, stop = _span(first_ptr, stop_ptr, q_len, kv_len, b, first_group + here)
    q, pos = _spread_queries(
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


@triton.jit
def _take_candidates(
    ratings_ptr, places_ptr, count_ptr, first_ptr, stop_ptr, q_len, kv_len, n_blocks, bundles,
    first_group, floor, share, HKV: tl.constexpr, CAP: tl.constexpr, NB: tl.constexpr,
    BUNDLES: tl.constexpr,
):  # fmt: skip
    """The best rated blocks of a group, in ascending order: block 0 and the local ones always."""
    here = tl.program_id(0)
    item = tl.program_id(1)
    b = item // HKV
    _, _, low, stop = _span(first_ptr, stop_ptr, q_len, kv_len, b, first_group + here)
    n = tl.where(low < stop, (stop + _BLOCK - 1) // _BLOCK, 0)
    limit = tl.minimum(tl.minimum(floor + (n * share).to(tl.int32), n), CAP)
    block = tl.arange(0, NB)
    at = (item * tl.num_programs(0) + here).to(tl.int64)
    best = tl.full([NB], float("-inf"), tl.float32)
    for bundle in tl.static_range(BUNDLES):
        ratings = ratings_ptr + (at * bundles + bundle) * n_blocks + block
        best = tl.maximum(best, tl.load(ratings, mask=block < n, other=float("-inf")))
    forced = (block == 0) | (block >= low // _TILE * 2 - 1)
    # shares are at most 1, so a negative exponent: larger ones have smaller bit patterns
    bits = (-tl.minimum(best, 0.0)).to(tl.int32, bitcast=True)
    bits = tl.where(forced, -1, bits)
    bits = tl.where(block < n, bits, 0x7FFFFFFF)
    under = limit * 0 - 2
    over = limit * 0 + 0x7FFFFFF0
    # `under`: at most `limit` blocks have such bits or fewer; `over`: more of them, or all
    for _ in range(31):
        middle = under + (over - under) // 2
        fits = tl.sum((bits <= middle).to(tl.int32)) <= limit
        under = tl.where(fits, middle, under)
        over = tl.where(fits, over, middle)
    kept = bits <= under
    spare = limit - tl.sum(kept.to(tl.int32))
    level = (bits == under + 1) & (block < n)
    kept |= level & (tl.cumsum(level.to(tl.int32), 0) <= spare)
    to = tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.store(places_ptr + at * CAP + to, block, mask=kept & (to < CAP))
    tl.store(count_ptr + at, tl.sum(kept.to(tl.int32)))


@triton.jit
def _weigh_candidates(
    q_ptr, k_ptr, places_ptr, count_ptr, scratch_ptr, masses_ptr, first_ptr, stop_ptr, q_steps,
    k_steps, q_len, kv_len, first_group, factor, ceiling, HKV: tl.constexpr, SHARE: tl.constexpr,
    TAKE: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    CAP: tl.constexpr, SOME: tl.constexpr, STAGES: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Fine pass: the attention of the sampled rows over the candidates' keys, by block and tile."""
    here = tl.num_programs(0) - 1 - tl.program_id(0)
    item = tl.program_id(2)
    b = item // HKV
    first, begin, low, stop = _span(first_ptr, stop_ptr, q_len, kv_len, b, first_group + here)
    q, pos = _spread_queries(
        q_ptr, q_steps, b, item % HKV, tl.program_id(1), begin, low, stop, SHARE, TAKE, ROWS, D,
        BLOCK_D,
    )  # fmt: skip
    column = tl.arange(0, BLOCK_D)
    k_from = k_ptr + b.to(tl.int64) * k_steps[0] + (item % HKV).to(tl.int64) * k_steps[1]
    row = tl.arange(0, TAKE * ROWS)
    group = (item * tl.num_programs(0) + here).to(tl.int64)
    places = places_ptr + group * CAP
    own = group * tl.num_programs(1) + tl.program_id(1)
    scratch = scratch_ptr + own * CAP * TAKE * ROWS
    n = tl.load(count_ptr + group)
    peak = tl.full([TAKE * ROWS], float("-inf"), tl.float32)
    total = tl.zeros([TAKE * ROWS], tl.float32)
    for i in tl.range(0, n, num_stages=STAGES):
        key = tl.load(places + i) * _BLOCK + tl.arange(0, _BLOCK)
        at = k_from + (first + key).to(tl.int64)[:, None] * k_steps[2] + column[None, :]
        k = tl.load(at, mask=(key < stop)[:, None] & (column < D)[None, :], other=0.0)
        scores = _capped(tl.dot(q, k.T, input_precision=PRECISION), factor, ceiling, SOFTCAP)
        scores = tl.where(key[None, :] <= pos[:, None], scores, float("-inf"))
        most = tl.max(scores, 1)
        safe = tl.where(most == float("-inf"), 0.0, most)
        held = most + tl.log2(tl.maximum(tl.sum(tl.exp2(scores - safe[:, None]), 1), 1.0))
        tl.store(scratch + i * TAKE * ROWS + row, held)
        risen = tl.maximum(peak, held)
        safe = tl.where(risen == float("-inf"), 0.0, risen)
        total = total * tl.exp2(peak - safe) + tl.exp2(held - safe)
        peak = risen
    lse = tl.where(total > 0, peak + tl.log2(tl.where(total > 0, total, 1.0)), float("inf"))
    tile = pos // _TILE - low // (_TILES * _TILE) * _TILES
    # other warps wrote what is read now
    tl.debug_barrier()
    some = tl.arange(0, SOME)
    for i in tl.range(0, n, SOME):
        at = scratch + (i + some)[:, None] * TAKE * ROWS + row[None, :]
        there = (i + some) < n
        held = tl.load(at, mask=there[:, None], other=float("-inf"))
        weight = tl.exp2(held - lse[None, :])
        for part in tl.static_range(_TILES):
            mass = tl.sum(tl.where((tile == part)[None, :], weight, 0.0), 1)
            tl.store(masses_ptr + (own * _TILES + part) * CAP + i + some, mass, mask=there)


@triton.jit
def _offset_masses(places, masses, n, own, CAP: tl.constexpr, SOME: tl.constexpr):
    """Mass, over the tiles of a group, at the relative offset of each entry of `own`, [4 * CAP].

    `own` and the entries compared with it are blocks less twice the number of their tile.
    """
    sums = tl.zeros([_TILES * CAP], tl.float32)
    for part in range(0, _TILES):
        for i in range(0, n, SOME):
            other = i + tl.arange(0, SOME)
            block = tl.load(places + other, mask=other < n, other=1 << 29) - 2 * part
            mass = tl.load(masses + part * CAP + other, mask=other < n, other=0.0)
            sums += tl.sum(tl.where(own[:, None] == block[None, :], mass[None, :], 0.0), 1)
    return sums


@triton.jit
def _keep_blocks(
    places_ptr, count_ptr, masses_ptr, values_ptr, kept_ptr, first_ptr, stop_ptr, q_len, kv_len,
    first_group, tiles, mass, HKV: tl.constexpr, CAP: tl.constexpr, SOME: tl.constexpr,
):  # fmt: skip
    """The fewest entries (block, tile) that hold the share `mass` of a group's mass, those first
    whose block or whose offset holds most over the group's tiles."""
    here = tl.program_id(0)
    item = tl.program_id(1)
    b = item // HKV
    _, _, low, stop = _span(first_ptr, stop_ptr, q_len, kv_len, b, first_group + here)
    at = (item * tl.num_programs(0) + here).to(tl.int64)
    places = places_ptr + at * CAP
    masses = masses_ptr + at * _TILES * CAP
    n = tl.load(count_ptr + at)
    entry = tl.arange(0, _TILES * CAP)
    part, candidate = entry // CAP, entry % CAP
    known = candidate < n
    block = tl.load(places + candidate, mask=known, other=1 << 28)
    weight = tl.load(masses + entry, mask=known, other=0.0)
    score = _offset_masses(places, masses, n, block - 2 * part, CAP, SOME)
    by_block = weight * 0
    for other in tl.static_range(_TILES):
        by_block += tl.load(masses + other * CAP + candidate, mask=known, other=0.0)
    score = tl.maximum(score, by_block)
    wanted = tl.sum(weight) * mass
    bits = score.to(tl.int32, bitcast=True)
    under = n * 0
    over = n * 0 + 0x7F800000
    # `under`: entries with at least these bits hold enough; `over`: they do not
    for _ in range(31):
        middle = under + (over - under) // 2
        enough = tl.sum(tl.where(bits >= middle, weight, 0.0)) >= wanted
        under = tl.where(enough, middle, under)
        over = tl.where(enough, over, middle)
    tile = low // (_TILES * _TILE) * _TILES + part
    kept = (bits >= under) & (weight + score > 0)
    kept |= (block == 0) | (block >= 2 * tile - 1)
    kept &= known & (block <= 2 * tile + 1)
    rank = tl.reshape(tl.cumsum(tl.reshape(kept.to(tl.int32), [_TILES, CAP]), 1), [_TILES * CAP])
    first_tile = tl.maximum(kv_len - q_len - tl.load(first_ptr + b), 0) // _TILE
    slot = tile - first_tile
    there = (slot >= 0) & (low < stop) & (tile * _TILE < stop)
    to = (item * tiles + slot).to(tl.int64)
    tl.store(values_ptr + to * CAP + rank - 1, block * 4 + 3, mask=kept & there)
    last = candidate == CAP - 1
    tl.store(kept_ptr + to, rank, mask=there & last)


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


def grouped_blocks(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B Hkv N D"],
    layout: Layout,
    plan: Plan,
    *,
    scale: float,
    softcap: float = 0.0,
) -> tuple[Ragged, Ragged]:
    """Block lists of every query tile and candidates of every group, as the reference defines
    them."""
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    batch, heads, q_len, dim = q.shape
    kv_heads, kv_len = k.shape[1:3]
    share = heads // kv_heads
    exact = q.dtype == torch.float32
    rated, take = (
        1 if exact else min(most, triton.next_power_of_2(share))
        for most in (RATED_AT_ONCE, WEIGHED_AT_ONCE)
    )
    parts, bundles = -(-share // rated), -(-share // take)
    items, tiles = batch * kv_heads, layout.chunk_tiles
    blocks = 2 * -(-kv_len // TILE)
    cap = list_room(layout, plan.cap)
    device = q.device
    values = torch.empty(items * tiles * cap, dtype=torch.int32, device=device)
    kept = torch.zeros((batch, kv_heads, tiles), dtype=torch.int32, device=device)
    wide, cells = (mean_cells(k, layout, n) for n in (plan.sum_cell, plan.cell))
    groups = group_count(layout)
    step = max(1, min(groups, LISTS_AT_ONCE // (items * bundles)))
    ratings = torch.empty((items, step, parts, blocks), device=device)
    scratch = torch.empty((items, step, bundles, cap, take * plan.rows), device=device)
    masses = torch.empty((items, step, bundles, GROUP_TILES, cap), device=device)
    found = values.new_empty((batch, kv_heads, groups, cap))
    number = kept.new_zeros((batch, kv_heads, groups))
    scaling = log2_scaling(scale, softcap)
    bounds = (layout.first, layout.stop)
    own = {"HKV": kv_heads, "SHARE": share, "ROWS": plan.rows, "D": dim}
    own |= {"BLOCK_D": padded_dim(dim), "SOFTCAP": bool(softcap)}
    own |= {"PRECISION": "ieee" if exact else "tf32", "STAGES": 1 if exact else 3}
    for group in range(0, groups, step):
        n = min(step, groups - group)
        places, count = values.new_empty((items, n, cap)), kept.new_empty((items, n))
        _rate_blocks[(n, parts, items)](
            q, wide, cells, ratings, *bounds, tuple(q.stride()[:3]), q_len, kv_len, wide.shape[2],
            cells.shape[2], blocks, group, *scaling, SUM_CELL=plan.sum_cell, CELL=plan.cell,
            STEP=STEP, TAKE=rated, num_warps=4, **own,
        )  # fmt: skip
        _take_candidates[(n, items)](
            ratings, places, count, *bounds, q_len, kv_len, blocks, parts, group, plan.floor,
            plan.share, HKV=kv_heads, CAP=cap, NB=triton.next_power_of_2(blocks), BUNDLES=parts,
        )  # fmt: skip
        _weigh_candidates[(n, bundles, items)](
            q, k, places, count, scratch, masses, *bounds, tuple(q.stride()[:3]),
            tuple(k.stride()[:3]), q_len, kv_len, group, *scaling, CAP=cap, SOME=16, TAKE=take,
            num_warps=8, **own,
        )  # fmt: skip
        total = masses
        if bundles > 1:
            some = masses.view(-1)[: items * n * bundles * GROUP_TILES * cap]
            total = some.view(items, n, bundles, -1).sum(dim=2)
        _keep_blocks[(n, items)](
            places, count, total, values, kept, *bounds, q_len, kv_len, group, tiles, plan.mass,
            HKV=kv_heads, CAP=cap, SOME=16, num_warps=8,
        )  # fmt: skip
        found[:, :, group : group + n] = places.view(batch, kv_heads, n, cap) * 4 + 3
        number[:, :, group : group + n] = count.view(batch, kv_heads, n)
    rows = torch.arange(items * tiles, device=device).view(kept.shape) * cap
    return Ragged(values, rows, kept), Ragged.from_rows(found, number)
