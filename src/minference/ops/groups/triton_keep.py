"""Selection: the best rated blocks of each tile, and more of each group for the guard."""

import triton
import triton.language as tl

from minference.index import BLOCK, TILE
from minference.ops._kernel import kernel
from minference.ops._triton import SIZES
from minference.ops.groups.plan import GROUP_TILES
from minference.ops.groups.triton_rows import group_span

_BLOCK = tl.constexpr(BLOCK)
_TILE = tl.constexpr(TILE)
_TILES = tl.constexpr(GROUP_TILES)
_HIGHEST = tl.constexpr(1 << 30)


@triton.jit
def _best_ratings(ratings, block, end, n_blocks, n):
    """The best rating of each block below `end`: of its own three planes, of the last keys of the
    block before and of the first ones of the block behind."""
    known = block < end
    best = tl.load(ratings + block, mask=known, other=float("-inf"))
    for plane in tl.static_range(1, 3):
        own = ratings + plane * n_blocks + block
        best = tl.maximum(best, tl.load(own, mask=known, other=float("-inf")))
    before = ratings + 2 * n_blocks + block - 1
    best = tl.maximum(best, tl.load(before, mask=known & (block > 0), other=float("-inf")))
    behind = ratings + n_blocks + block + 1
    best = tl.maximum(best, tl.load(behind, mask=known & (block + 1 < n), other=float("-inf")))
    return best.to(tl.float32)


@triton.jit
def first_of(rated, best, limit, HALF: tl.constexpr):
    """At most `limit` of the rated blocks: the best ones, of equal ones the first. HALF: ratings
    are halves, in floats."""
    # of floats one bit, so that sums of two fit; of halves those that they do not have
    SPARE: tl.constexpr = 13 if HALF else 1
    bits = best.to(tl.int32, bitcast=True)
    # integers in the order of the floats
    bits = tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF) >> SPARE
    found = tl.sum(rated.to(tl.int32))
    # `over`: at most `limit` are that good; `under`: more are
    under = tl.min(tl.where(rated, bits, _HIGHEST)) - 1
    over = tl.max(tl.where(rated, bits, under)) + 1
    over = tl.where(found > limit, over, under + 1)
    while (over > under + 1) & (found != limit):
        middle = (under + over) >> 1
        found = tl.sum((rated & (bits >= middle)).to(tl.int32))
        over = tl.where(found <= limit, middle, over)
        under = tl.where(found <= limit, under, middle)
    kept = rated & (bits >= over)
    spare = limit - tl.sum(kept.to(tl.int32))
    level = rated & (bits == over - 1)
    return kept | (level & (tl.cumsum(level.to(tl.int32), 0) <= spare))


@triton.jit
def _list_span(first_ptr, stop_ptr, q_len, kv_len, b, group, part):
    """Of a tile, or of its group where there is no such part: first and past-the-last row of the
    group, the tile, past its last block and the group's, and the first of the blocks at its
    diagonal."""
    whole = part == _TILES
    _, _, low, stop = group_span(first_ptr, stop_ptr, q_len, kv_len, b, group)
    n = tl.where(low < stop, (stop + _BLOCK - 1) // _BLOCK, 0)
    tile = low // (_TILES * _TILE) * _TILES + part
    near = tl.where(whole, low // _TILE * 2 - 1, 2 * tile - 1)
    end = tl.where(whole, n, tl.minimum(n, 2 * tile + 2))
    return low, stop, tile, end, n, near


@triton.jit
def _write_list(
    best, block, known, values_ptr, count_ptr, wider_ptr, wider_count_ptr, first_ptr, stop_ptr,
    q_len, kv_len, first_group, groups, tiles, least, wider_least, most, wider, HKV: tl.constexpr,
    ROOM: tl.constexpr, WIDER_ROOM: tl.constexpr,
):  # fmt: skip
    """Write the list of a tile, or the wider one of its group: block 0, the local ones, and the
    best of those rated at least `least`, in ascending order, as they come."""
    here = tl.program_id(0)
    item = tl.program_id(1)
    part = tl.program_id(2)
    whole = part == _TILES
    b = item // HKV
    low, stop, tile, end, _, near = _list_span(
        first_ptr, stop_ptr, q_len, kv_len, b, first_group + here, part
    )
    always = ((block == 0) | (block >= near)) & (block < end) & known
    rated = (block < end) & known & ~always & (best >= tl.where(whole, wider_least, least))
    rated &= best > float("-inf")
    taken = always | first_of(rated, best, tl.where(whole, wider, most), False)
    to = tl.cumsum(taken.to(tl.int32), 0) - 1
    slot = tile - tl.maximum(kv_len - q_len - tl.load(first_ptr + b), 0) // _TILE
    there = (slot >= 0) & (low < stop) & (tile * _TILE < stop)
    number = tl.sum(taken.to(tl.int32))
    if whole:
        line = (item * groups + first_group + here).to(tl.int64)
        tl.store(wider_ptr + line * WIDER_ROOM + to, block * 4 + 3, mask=taken)
        tl.store(wider_count_ptr + line, number)
    else:
        line = (item * tiles + slot).to(tl.int64)
        tl.store(values_ptr + line * ROOM + to, block * 4 + 3, mask=tl.where(there, taken, False))
        tl.store(count_ptr + line, number, mask=there)


@kernel(do_not_specialize=SIZES)
def take_blocks(
    ratings_ptr, values_ptr, count_ptr, wider_ptr, wider_count_ptr, first_ptr, stop_ptr, q_len,
    kv_len, n_blocks, rated_groups, first_group, groups, tiles, least, wider_least, most, wider,
    HKV: tl.constexpr, ROOM: tl.constexpr, WIDER_ROOM: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """Write the list of a tile, or the wider one of its group, from ratings of every block."""
    here = tl.program_id(0)
    item = tl.program_id(1)
    part = tl.program_id(2)
    whole = part == _TILES
    _, _, _, end, n, _ = _list_span(
        first_ptr, stop_ptr, q_len, kv_len, item // HKV, first_group + here, part
    )
    block = tl.arange(0, NB)
    best = tl.full([NB], float("-inf"), tl.float32)
    at = (item * rated_groups + here).to(tl.int64) * _TILES
    for other in range(tl.where(whole, 0, part), tl.where(whole, _TILES, part + 1)):
        ratings = ratings_ptr + (at + other) * 3 * n_blocks
        best = tl.maximum(best, _best_ratings(ratings, block, end, n_blocks, n))
    _write_list(
        best, block, block < end, values_ptr, count_ptr, wider_ptr, wider_count_ptr, first_ptr,
        stop_ptr, q_len, kv_len, first_group, groups, tiles, least, wider_least, most, wider, HKV,
        ROOM, WIDER_ROOM,
    )  # fmt: skip


@triton.jit
def _listed_ratings(ratings, places, number, place, kind, ROOM: tl.constexpr):
    """Candidates and the blocks beside them: which block, whether it stands here (beside two
    candidates it stands once), and its best rating, as in `_best_ratings`."""
    known = place < number
    block = tl.load(places + place, mask=known, other=-9)
    before = tl.load(places + place - 1, mask=known & (place > 0), other=-9)
    behind = tl.load(places + place + 1, mask=place + 1 < number, other=_HIGHEST)
    own = tl.load(ratings + place, mask=known, other=float("-inf"))
    first = tl.load(ratings + ROOM + place, mask=known, other=float("-inf"))
    last = tl.load(ratings + 2 * ROOM + place, mask=known, other=float("-inf"))
    ahead = (kind == 1) & (before == block - 1) | (kind == 0) & (before == block - 2)
    ahead = known & (place > 0) & ahead
    beyond = tl.load(ratings + 2 * ROOM + place - 1, mask=ahead, other=float("-inf"))
    after = (place + 1 < number) & (kind == 1) & (behind == block + 1)
    beyond_too = tl.load(ratings + ROOM + place + 1, mask=after, other=float("-inf"))
    best = tl.where(kind == 2, last, first)
    best = tl.where(kind == 1, tl.maximum(tl.maximum(own, first), last), best)
    best = tl.maximum(best, tl.maximum(beyond, beyond_too))
    alone = (kind == 1) | (kind == 0) & (before < block - 1) | (kind == 2) & (behind > block + 2)
    block += kind - 1
    return block, known & alone & (block >= 0), best


@kernel(do_not_specialize=SIZES)
def take_listed(
    ratings_ptr, places_ptr, number_ptr, values_ptr, count_ptr, wider_ptr, wider_count_ptr,
    first_ptr, stop_ptr, q_len, kv_len, first_group, groups, tiles, least, wider_least, most, wider,
    HKV: tl.constexpr, ROOM: tl.constexpr, WIDER_ROOM: tl.constexpr, LISTED: tl.constexpr,
    SLOTS: tl.constexpr,
):  # fmt: skip
    """As `take_blocks`, among the candidates of a group and the blocks beside them."""
    here = tl.program_id(0)
    item = tl.program_id(1)
    part = tl.program_id(2)
    whole = part == _TILES
    at = item * tl.num_programs(0) + here
    number = tl.load(number_ptr + at)
    places = places_ptr + at.to(tl.int64) * LISTED
    slot = tl.arange(0, SLOTS)
    best = tl.full([SLOTS], float("-inf"), tl.float32)
    block, known, _ = _listed_ratings(ratings_ptr, places, number * 0, slot // 4, slot % 4, LISTED)
    for other in range(tl.where(whole, 0, part), tl.where(whole, _TILES, part + 1)):
        ratings = ratings_ptr + (at.to(tl.int64) * _TILES + other) * 3 * LISTED
        block, known, own = _listed_ratings(ratings, places, number, slot // 4, slot % 4, LISTED)
        best = tl.maximum(best, own)
    _write_list(
        best, block, known & (slot % 4 < 3), values_ptr, count_ptr, wider_ptr, wider_count_ptr,
        first_ptr, stop_ptr, q_len, kv_len, first_group, groups, tiles, least, wider_least, most,
        wider, HKV, ROOM, WIDER_ROOM,
    )  # fmt: skip
