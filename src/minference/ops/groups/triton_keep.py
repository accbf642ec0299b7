"""Selection: a group's candidates by their rating, its blocks by their masses."""

import triton
import triton.language as tl

from minference.index import BLOCK, TILE
from minference.ops.groups.plan import GROUP_TILES
from minference.ops.groups.triton_rows import group_span

_BLOCK = tl.constexpr(BLOCK)
_TILE = tl.constexpr(TILE)
_TILES = tl.constexpr(GROUP_TILES)


@triton.jit
def take_candidates(
    ratings_ptr, places_ptr, count_ptr, first_ptr, stop_ptr, q_len, kv_len, n_blocks, bundles,
    first_group, floor, share, HKV: tl.constexpr, CAP: tl.constexpr, NB: tl.constexpr,
    BUNDLES: tl.constexpr,
):  # fmt: skip
    """The best rated blocks of a group, in ascending order: block 0 and the local ones always."""
    here = tl.program_id(0)
    item = tl.program_id(1)
    b = item // HKV
    _, _, low, stop = group_span(first_ptr, stop_ptr, q_len, kv_len, b, first_group + here)
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
def keep_blocks(
    places_ptr, count_ptr, masses_ptr, values_ptr, kept_ptr, first_ptr, stop_ptr, q_len, kv_len,
    first_group, tiles, mass, HKV: tl.constexpr, CAP: tl.constexpr, SOME: tl.constexpr,
):  # fmt: skip
    """The fewest entries (block, tile) that hold the share `mass` of a group's mass, those first
    whose block or whose offset holds most over the group's tiles."""
    here = tl.program_id(0)
    item = tl.program_id(1)
    b = item // HKV
    _, _, low, stop = group_span(first_ptr, stop_ptr, q_len, kv_len, b, first_group + here)
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
