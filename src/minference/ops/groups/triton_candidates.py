"""Long contexts: the blocks of a group that are worth rating by their keys, and those ratings.

Means of 4 keys, or single keys, choose some blocks of each group, against sums that know of no
best keys: a row that looks something up then counts more, not less. Only these candidates are read
key by key, gathered, 64 at a time. What a row scores best in each of them is stored, because a
row's sum is known only when all have been seen.
"""

import torch
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from minference.index import BLOCK, TILE
from minference.ops._kernel import kernel
from minference.ops._triton import REGISTERS, SIZES
from minference.ops.build import Layout
from minference.ops.groups.plan import EDGE, GROUP_TILES, LEAST_WIDER, Plan, seen_room
from minference.ops.groups.triton_cells import STEP, Cells
from minference.ops.groups.triton_keep import first_of
from minference.ops.groups.triton_rows import MOST, group_span, log2_scores
from minference.ops.groups.triton_spot import PLANES, Rows, program_span

_BLOCK = tl.constexpr(BLOCK)
_TILE = tl.constexpr(TILE)
_GROUP_TILES = tl.constexpr(GROUP_TILES)
_STEP = tl.constexpr(STEP)
_EDGE = tl.constexpr(EDGE)
_PLANES = tl.constexpr(PLANES)


@kernel(do_not_specialize=SIZES)
def rate_cells(
    rows_ptr, cells_ptr, sums_ptr, factors_ptr, ratings_ptr, first_ptr, stop_ptr, q_len, kv_len,
    n_cells, blocks, first_tile, ceiling, splits, each, HKV: tl.constexpr, TILES: tl.constexpr,
    LINES: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr, FP8: tl.constexpr, GROUPS: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """Log2 of the largest share that the best of the CELLS cells of each block has of a sampled row
    of each group, for `each` steps of blocks."""
    HALF: tl.constexpr = tl.float16 if FP8 else tl.float32
    item, own, split, _, _, steps = program_span(
        first_ptr, stop_ptr, q_len, kv_len, first_tile, splits, HKV, TILES
    )
    if split * each >= steps:
        return
    row = tl.arange(0, LINES)
    column = tl.arange(0, BLOCK_D)
    q = tl.load(rows_ptr + (own * LINES + row[:, None]) * BLOCK_D + column[None, :])
    factor = tl.load(factors_ptr + own)
    to = ratings_ptr + own * GROUPS * blocks + tl.arange(0, GROUPS)[None, :] * blocks
    cells = cells_ptr + item.to(tl.int64) * n_cells * BLOCK_D
    place = tl.arange(0, _STEP)[:, None] * BLOCK_D + column[None, :]
    highest = tl.full([_STEP, LINES], float("-inf"), HALF)
    end = tl.minimum((split + 1) * each, steps) * CELLS
    for at in tl.range(split * each * CELLS, end, num_stages=STAGES):
        k = tl.load(cells + at * (_STEP * BLOCK_D) + place)
        scores = tl.dot(k, q.T, input_precision=PRECISION, out_dtype=HALF)
        highest = tl.maximum(highest, scores)
        # the interpreter's numbers have no remainder by a constant
        if (at + 1) // CELLS * CELLS == at + 1:
            shares = log2_scores(highest.to(tl.float32), factor, ceiling, SOFTCAP)
            shares -= tl.load(sums_ptr + own * LINES + row)[None, :]
            if GROUPS == 1:
                best = tl.max(shares, 1)[:, None]
            else:
                best = tl.max(tl.reshape(shares, [_STEP, GROUPS, LINES // GROUPS]), 2)
            block = (tl.arange(0, _STEP) + at // CELLS * _STEP)[:, None]
            tl.store(to + block, best.to(to.dtype.element_ty), mask=block < blocks)
            highest = tl.full([_STEP, LINES], float("-inf"), HALF)


@kernel(do_not_specialize=SIZES)
def take_candidates(
    ratings_ptr, places_ptr, number_ptr, first_ptr, stop_ptr, q_len, kv_len, blocks, programs,
    bundles, first_group, most, HKV: tl.constexpr, GROUPS: tl.constexpr, PARTS: tl.constexpr,
    ROOM: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """The near blocks of a group and the best of the others, in ascending order, then 0."""
    here = tl.program_id(0)
    item = tl.program_id(1)
    _, _, low, stop = group_span(
        first_ptr, stop_ptr, q_len, kv_len, item // HKV, first_group + here
    )
    n = tl.where(low < stop, (stop + _BLOCK - 1) // _BLOCK, 0)
    block = tl.arange(0, NB)
    near = low // _TILE * 2 - 1
    always = ((block == 0) | (block >= near)) & (block < n)
    far = (block < n) & ~always
    best = tl.full([NB], float("-inf"), tl.float32)
    for part in range(0, PARTS * bundles):
        own = (item * programs + here * PARTS // GROUPS) * bundles + part
        ratings = ratings_ptr + (own.to(tl.int64) * GROUPS + here % GROUPS) * blocks
        some = tl.load(ratings + block, mask=far, other=float("-inf"))
        best = tl.maximum(best, some.to(tl.float32))
    rated = far & (best > float("-inf"))
    taken = always | first_of(rated, best, most, ratings_ptr.dtype.element_ty == tl.float16)
    number = tl.sum(taken.to(tl.int32))
    line = item * tl.num_programs(0) + here
    places = places_ptr + line.to(tl.int64) * ROOM
    tl.store(places + tl.cumsum(taken.to(tl.int32), 0) - 1, block, mask=taken)
    # the rest of a step of blocks too
    slot = number + tl.arange(0, _STEP)
    tl.store(places + slot, slot * 0, mask=slot < ROOM)
    tl.store(number_ptr + line, number)


@kernel(do_not_specialize=SIZES)
def score_candidates(
    rows_ptr, keys_ptr, sums_ptr, factors_ptr, places_ptr, number_ptr, scores_ptr, first_ptr,
    stop_ptr, q_len, kv_len, n_keys, programs, groups, first_group, ceiling, HKV: tl.constexpr,
    TILES: tl.constexpr, LINES: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, FP8: tl.constexpr, GROUPS: tl.constexpr,
    PARTS: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """The best score of each candidate's planes for each row, before its factor; adds the best keys
    of the far ones to the sums of rows that they more than double."""
    HALF: tl.constexpr = tl.float16 if FP8 else tl.float32
    OWN: tl.constexpr = LINES // GROUPS
    here = tl.program_id(0)
    item = tl.program_id(2)
    group = here // PARTS
    _, _, low, _ = group_span(first_ptr, stop_ptr, q_len, kv_len, item // HKV, first_group + group)
    near = tl.maximum(low // _TILE * 2 - 1, 1)
    own = (item * programs + here // GROUPS) * tl.num_programs(1) + tl.program_id(1)
    factor = tl.load(factors_ptr + own)
    row = own.to(tl.int64) * LINES + here % GROUPS * OWN + tl.arange(0, OWN)
    column = tl.arange(0, BLOCK_D)
    q = tl.load(rows_ptr + row[:, None] * BLOCK_D + column[None, :])
    number = tl.load(number_ptr + item * groups + group)
    places = places_ptr + (item * groups + group).to(tl.int64) * ROOM + tl.arange(0, _STEP)
    cells = keys_ptr + item.to(tl.int64) * n_keys * BLOCK_D
    to = (item * tl.num_programs(0) + here) * tl.num_programs(1) + tl.program_id(1)
    to = scores_ptr + to.to(tl.int64) * (_PLANES * ROOM * OWN)
    to += tl.arange(0, _STEP)[:, None] * OWN + tl.arange(0, OWN)[None, :]
    highest = tl.full([_STEP, OWN], float("-inf"), HALF)
    total = tl.zeros([OWN], tl.float32)
    for step in range(0, (number + _STEP - 1) // _STEP):
        block = tl.load(places + step * _STEP)
        known = step * _STEP + tl.arange(0, _STEP) < number
        far = (known & (block > 0) & (block < near))[:, None]
        cell = block // _STEP * (_BLOCK * _STEP) + block % _STEP
        first_keys = cells + cell[:, None] * BLOCK_D + column[None, :]
        for key in tl.range(0, _BLOCK, num_stages=STAGES):
            k = tl.load(first_keys + key * (_STEP * BLOCK_D))
            scores = tl.dot(k, q.T, input_precision=PRECISION, out_dtype=HALF)
            highest = tl.maximum(highest, scores)
            if (key == _EDGE - 1) | (key == _BLOCK - _EDGE - 1) | (key == _BLOCK - 1):
                plane = tl.where(key == _EDGE - 1, 1, tl.where(key == _BLOCK - 1, 2, 0))
                tl.store(to + (plane * ROOM + step * _STEP) * OWN, highest)
                shares = log2_scores(highest.to(tl.float32), factor, ceiling, SOFTCAP)
                shares -= tl.load(sums_ptr + row)[None, :]
                total += tl.sum(tl.where(far, tl.exp2(tl.minimum(shares, MOST)), 0.0), 0)
                highest = tl.full([_STEP, OWN], float("-inf"), HALF)
    sums = tl.load(sums_ptr + row)
    tl.store(sums_ptr + row, tl.where(total > 1, sums + tl.log2(1 + total), sums))


@kernel(do_not_specialize=SIZES)
def rate_candidates(
    scores_ptr, sums_ptr, factors_ptr, number_ptr, ratings_ptr, programs, bundles, groups, ceiling,
    TILES: tl.constexpr, LINES: tl.constexpr, SOFTCAP: tl.constexpr, GROUPS: tl.constexpr,
    PARTS: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """Log2 of the largest share of a row of a tile that a key of each candidate's planes has."""
    OWN: tl.constexpr = LINES // GROUPS
    EACH: tl.constexpr = OWN * PARTS // _GROUP_TILES
    tile = tl.program_id(0)
    item = tl.program_id(1)
    group = tile // _GROUP_TILES
    part = tile * PARTS // _GROUP_TILES
    line = tile % (_GROUP_TILES // PARTS) * EACH + tl.arange(0, EACH)
    number = tl.load(number_ptr + item * groups + group)
    to = ratings_ptr + (item * groups * _GROUP_TILES + tile).to(tl.int64) * (_PLANES * ROOM)
    for at in range(0, _PLANES * ROOM, _STEP):
        place = at + tl.arange(0, _STEP)
        if at % ROOM < number:
            best = tl.full([_STEP], float("-inf"), tl.float32)
            for bundle in range(0, bundles):
                own = (item * programs + part // GROUPS) * bundles + bundle
                row = own.to(tl.int64) * LINES + part % GROUPS * OWN + line
                scores = (item * groups * PARTS + part) * bundles + bundle
                scores = scores_ptr + scores.to(tl.int64) * (_PLANES * ROOM * OWN)
                shares = tl.load(scores + place[:, None] * OWN + line[None, :]).to(tl.float32)
                shares = log2_scores(shares, tl.load(factors_ptr + own), ceiling, SOFTCAP)
                best = tl.maximum(best, tl.max(shares - tl.load(sums_ptr + row)[None, :], 1))
            tl.store(to + place, best)


def listed_keys(
    sampled: Rows, cells: Cells, layout: Layout, plan: Plan, group: int, count: int
) -> tuple[
    Float[Tensor, "items count 4 planes room"],
    Int[Tensor, "items count room"],
    Int[Tensor, "items count"],
]:
    """Ratings of the candidates of `count` groups from `group` on, which blocks they are and how
    many; changes the sums of `sampled`."""
    fine = cells.keys if plan.cell == 1 else cells.fine
    assert fine is not None
    slots, tiles, fixed = sampled.factors.shape, sampled.tiles, sampled.fixed
    items, programs, bundles = slots
    groups, parts = max(1, tiles // GROUP_TILES), max(1, GROUP_TILES // tiles)
    blocks, device, dtype = layout.blocks, cells.keys.device, sampled.scores
    bounds = (layout.first, layout.stop, layout.q_len, layout.kv_len)
    splits, each = sampled.splits(blocks)
    coarse = torch.empty((*slots, groups, blocks), dtype=dtype, device=device)
    rate_cells[(programs, bundles * splits, items)](
        sampled.rows, fine, sampled.sums, sampled.factors, coarse, *bounds, fine.shape[2],
        blocks, group * GROUP_TILES, sampled.ceiling, splits, each,
        LINES=sampled.lines, GROUPS=groups, CELLS=BLOCK // plan.cell, **fixed,
    )  # fmt: skip
    room, width = plan.candidates, seen_room(layout, group, count)
    places = torch.empty((items, count, room), dtype=torch.int32, device=device)
    number = torch.empty((items, count), dtype=torch.int32, device=device)
    take_candidates[(count, items)](
        coarse, places, number, *bounds, blocks, programs, bundles, group, room - LEAST_WIDER,
        HKV=fixed["HKV"], GROUPS=groups, PARTS=parts, ROOM=room, NB=width,
        num_warps=min(16, max(4, width // 512)),
    )  # fmt: skip
    own = sampled.lines // groups
    scores = torch.empty(
        (items, count * parts, bundles, PLANES, room, own), dtype=dtype, device=device
    )
    score_candidates[(count * parts, bundles, items)](
        sampled.rows, cells.keys, sampled.sums, sampled.factors, places, number, scores, *bounds,
        cells.keys.shape[2], programs, count, group, sampled.ceiling, LINES=sampled.lines,
        GROUPS=groups, PARTS=parts, ROOM=room, maxnreg=REGISTERS if fixed["FP8"] else None,
        **fixed,
    )  # fmt: skip
    ratings = torch.empty((items, count, GROUP_TILES, PLANES, room), device=device)
    rate_candidates[(count * GROUP_TILES, items)](
        scores, sampled.sums, sampled.factors, number, ratings, programs, bundles, count,
        sampled.ceiling, TILES=tiles, LINES=sampled.lines, SOFTCAP=fixed["SOFTCAP"], GROUPS=groups,
        PARTS=parts, ROOM=room, num_warps=4,
    )  # fmt: skip
    return ratings, places, number
