"""The grouped estimate's scores: what share of a sampled row's attention a key of a block has.

A program has 256 rows, 64 for each of up to four query heads of a KV head, from as many query tiles
as that takes, so each key is read once for all of them. Two passes: a row's sum, over means of
blocks where they are far away; then the largest score of each block against it, once more where
that shows a sum to be too small. In e4m3 the second pass adds up in half precision: its tile of
64 x 256 scores and that of the largest ones so far leave room for two programs or three on a
multiprocessor.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from minference.index import BLOCK, TILE
from minference.ops._kernel import kernel
from minference.ops._triton import REGISTERS, SIZES, WIDE_DIM, at_once, log2_scaling, padded_dim
from minference.ops.build import Layout
from minference.ops.groups.plan import EDGE, GROUP, GROUP_TILES, Plan, power_of_two
from minference.ops.groups.triton_cells import STEP, Cells, cell_slot
from minference.ops.groups.triton_rows import MOST, log2_scores

SCORED_AT_ONCE = 4
"""Most query heads of a program."""

ROWS_AT_ONCE = 64
"""Rows of each query head of a program."""

PROGRAMS = 4096
"""Least programs of the second pass, where the keys suffice: ten times what runs at once."""

PLANES = 3
"""Ratings of a block: without its ends, of its first keys, of its last keys."""

_BLOCK = tl.constexpr(BLOCK)
_TILE = tl.constexpr(TILE)
_GROUP_TILES = tl.constexpr(GROUP_TILES)
_GROUP = tl.constexpr(GROUP)
_STEP = tl.constexpr(STEP)
_EDGE = tl.constexpr(EDGE)
_PLANES = tl.constexpr(PLANES)
_LOG_BLOCK = tl.constexpr(BLOCK.bit_length() - 1)


@triton.jit
def _span(first_ptr, stop_ptr, q_len, kv_len, b, tile, TILES: tl.constexpr):
    """First query position of the chunk; start of TILES tiles, counted from that of the chunk's
    first group; first position in them and past the last one."""
    first = tl.load(first_ptr + b)
    begin = kv_len - q_len - first
    start = tl.maximum(begin, 0) // _GROUP * _GROUP + tile * _TILE
    stop = tl.minimum(start + TILES * _TILE, tl.load(stop_ptr + b) - first)
    return begin, start, tl.maximum(start, begin), stop


@triton.jit
def program_span(
    first_ptr, stop_ptr, q_len, kv_len, first_tile, splits, HKV: tl.constexpr, TILES: tl.constexpr
):  # fmt: skip
    """What a program rates: whose keys, which of the `Rows`, and which split of the steps; first
    query position of the chunk, start of its tiles, and the steps of blocks that their groups see,
    tiles without rows too."""
    WHOLE: tl.constexpr = TILES if TILES > 4 else 4
    here = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    item = tl.program_id(2)
    split = tl.program_id(1) % splits
    bundle, bundles = tl.program_id(1) // splits, tl.num_programs(1) // splits
    own = ((item * tl.num_programs(0) + here) * bundles + bundle).to(tl.int64)
    tile = first_tile + here * TILES
    group = tile // _GROUP_TILES * _GROUP_TILES
    begin, start, low, stop = _span(first_ptr, stop_ptr, q_len, kv_len, item // HKV, group, WHOLE)
    start += (tile - group) * _TILE
    steps = tl.where(low < stop, (stop + _STEP * _BLOCK - 1) // (_STEP * _BLOCK), 0)
    return item, own, split, begin, start, steps


@triton.jit
def _sampled_queries(
    q_ptr, q_steps, b, kv_head, bundle, begin, start, low, stop, SHARE: tl.constexpr,
    TAKE: tl.constexpr, TILES: tl.constexpr, EACH: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """EACH sampled rows of TILES tiles for TAKE query heads in turn, their unit, and their
    positions: -1 where there is no row or no head."""
    line = tl.arange(0, TILES * EACH * TAKE)
    inner = bundle * TAKE + line % TAKE
    row = line // TAKE
    part = start + row // EACH * _TILE
    a = tl.maximum(part, low)
    last = tl.minimum(part + _TILE, stop) - a - 1
    row = row % EACH
    place = (_TILE - 1) * (2 * SHARE * row + 2 * inner - (SHARE - 1)) // (2 * SHARE * (EACH - 1))
    place = tl.where(row == 0, 0, tl.where(row == EACH - 1, _TILE - 1, place))
    pos = tl.where((inner < SHARE) & (last >= 0), a + place * last // (_TILE - 1), -1)
    column = tl.arange(0, BLOCK_D)
    at = b.to(tl.int64) * q_steps[0] + (kv_head * SHARE + inner).to(tl.int64)[:, None] * q_steps[1]
    at += (pos - begin).to(tl.int64)[:, None] * q_steps[2] + column[None, :]
    known = (pos >= 0)[:, None] & (column < D)[None, :]
    q = tl.load(q_ptr + at, mask=known, other=0.0)
    unit = 1.0
    if FP8:
        # with cells within 32 no sum of products passes the largest half, 65504
        largest = tl.max(tl.max(tl.abs(q.to(tl.float32)), 1), 0)
        unit = tl.where(largest > 0, largest / (1920 // BLOCK_D), 1.0)
        q = (q.to(tl.float32) / unit).to(tl.float8e4nv)
    return q, unit, pos


@triton.jit
def _scores_at(
    at, q, factor, ceiling, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, SUMS: tl.constexpr
):  # fmt: skip
    """Log2 scores of the cells at some addresses, their products added up in the dtype SUMS."""
    scores = tl.dot(q, tl.load(at).T, input_precision=PRECISION, out_dtype=SUMS)
    return log2_scores(scores.to(tl.float32), factor, ceiling, SOFTCAP)


@triton.jit
def _weights(scores, peak, most):
    """Sum of what each row sees, relative to 2 ** peak, a key at most 2 ** most."""
    return tl.sum(tl.exp2(tl.minimum(scores - peak[:, None], most)), 1)


@triton.jit
def _most_of(seen):
    """Log2 of the most that each place of a step weighs for rows that see so many of them: `MOST`,
    or nothing. In arithmetic, since the results of as many comparisons would fill registers."""
    seen = tl.minimum(tl.maximum(seen, 0), _STEP).to(tl.float32) * 1024 - 512
    place = tl.arange(0, _STEP).to(tl.float32) * 1024
    return tl.minimum(seen[:, None] - place[None, :], MOST)


@kernel(do_not_specialize=SIZES)
def sum_rows(
    q_ptr, keys_ptr, means_ptr, unit_ptr, rows_ptr, sums_ptr, factors_ptr, first_ptr, stop_ptr,
    q_steps, q_len, kv_len, n_keys, n_means, first_tile, factor, ceiling, HKV: tl.constexpr,
    SHARE: tl.constexpr, TAKE: tl.constexpr, TILES: tl.constexpr, EACH: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Log2 of each sampled row's sum of exponentials: over the keys of block 0 and of the blocks
    near its group; further away a block counts as if all its keys were their mean. Stores the rows
    and their factor too, as the second pass takes them.

    Exponentials are relative to the row's best score in block 0, as in the guard; a key with
    2 ** 100 times more weight counts as if it had just that."""
    LINES: tl.constexpr = TILES * EACH * TAKE
    HALF: tl.constexpr = tl.float16 if FP8 else tl.float32
    here = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    item = tl.program_id(2)
    b = item // HKV
    tile = first_tile + here * TILES
    begin, start, low, stop = _span(first_ptr, stop_ptr, q_len, kv_len, b, tile, TILES)
    q, unit, pos = _sampled_queries(
        q_ptr, q_steps, b, item % HKV, tl.program_id(1), begin, start, low, stop, SHARE, TAKE,
        TILES, EACH, D, BLOCK_D, FP8,
    )  # fmt: skip
    stop = tl.where(low < stop, stop, 0)
    factor *= unit * tl.load(unit_ptr + item)
    own = ((item * tl.num_programs(0) + here) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    at = own * LINES + tl.arange(0, LINES)
    column = tl.arange(0, BLOCK_D)
    stored = rows_ptr + at[:, None] * BLOCK_D + column[None, :]
    tl.store(stored, q)
    tl.store(factors_ptr + own, factor)
    if FP8:
        # loaded, they go to the products by shared memory and leave registers free
        tl.debug_barrier()
        q = tl.load(stored)
    line = tl.arange(0, _STEP)
    cells = keys_ptr + item.to(tl.int64) * n_keys * BLOCK_D
    at_key = cells + cell_slot(line, _BLOCK)[:, None] * BLOCK_D + column[None, :]
    scores = _scores_at(at_key, q, factor, ceiling, SOFTCAP, PRECISION, tl.float32)
    peak = tl.max(tl.where(line[None, :] <= pos[:, None], scores, float("-inf")), 1)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    total = _weights(scores, peak, _most_of(pos + 1))
    # the first near block of each row's group, and of the first one
    near = tl.maximum(tl.maximum(pos // _GROUP * _GROUP, begin) // _TILE * 2 - 1, 1)
    begin = tl.maximum(tl.maximum(low // _GROUP * _GROUP, begin) // _TILE * 2 - 1, 1)
    for block in tl.range(begin, (stop + _BLOCK - 1) // _BLOCK, num_stages=STAGES):
        slot = cell_slot(block * _BLOCK + line, _BLOCK)
        at_key = cells + slot[:, None] * BLOCK_D + column[None, :]
        scores = _scores_at(at_key, q, factor, ceiling, SOFTCAP, PRECISION, tl.float32)
        seen = tl.where(block >= near, pos + 1 - block * _BLOCK, 0)
        total += _weights(scores, peak, _most_of(seen))
    cells = means_ptr + item.to(tl.int64) * n_means * BLOCK_D
    tile = line[:, None] * BLOCK_D + column[None, :]
    steps = tl.where(stop > 0, (tl.max(near) + _STEP - 1) // _STEP, 0)
    whole = tl.minimum(tl.maximum(begin // _STEP, 1), steps)
    for step in tl.range(1, whole, num_stages=STAGES):
        at_key = cells + step * (_STEP * BLOCK_D) + tile
        scores = _scores_at(at_key, q, factor, ceiling, SOFTCAP, PRECISION, HALF)
        total += _weights(scores, peak - _LOG_BLOCK, MOST)
    # block 0 is not far, and rows of other groups have other near blocks
    for part in tl.range(0, steps - whole + 1, num_stages=STAGES):
        step = tl.where(part == 0, 0, whole + part - 1)
        at_key = cells + step * (_STEP * BLOCK_D) + tile
        scores = _scores_at(at_key, q, factor, ceiling, SOFTCAP, PRECISION, HALF)
        most = _most_of(near - step * _STEP)
        most = tl.where((step * _STEP + line > 0)[None, :], most, float("-inf"))
        total += _weights(scores, peak - _LOG_BLOCK, most)
    # a row that is none takes no part: its shares are 0
    real = (pos >= 0) & (total > 0)
    sums = tl.where(real, peak + tl.log2(tl.where(real, total, 1.0)), float("inf"))
    tl.store(sums_ptr + at, sums)


@triton.jit
def _store_ratings(scores, to, key, step, blocks, TILES: tl.constexpr, LINES: tl.constexpr):
    """The ratings that a key of each block of a step completes."""
    ratings = tl.max(tl.reshape(scores, [_STEP, TILES, LINES // TILES]), 2)
    # without the ends, the first keys, the last keys
    plane = tl.where(key == _EDGE - 1, 1, tl.where(key == _BLOCK - 1, 2, 0))
    block = step * _STEP + tl.arange(0, _STEP)
    to += (tl.arange(0, TILES)[None, :] * _PLANES + plane) * blocks + block[:, None]
    tl.store(to, ratings.to(to.dtype.element_ty), mask=(block < blocks)[:, None])


@triton.jit
def _add_far(scores, added, step, begin, start, TILES: tl.constexpr, LINES: tl.constexpr):
    """Add the shares of a step's far blocks to what was added for each row."""
    low = (start + tl.arange(0, LINES) // (LINES // TILES) * _TILE) // _GROUP * _GROUP
    near = tl.maximum(tl.maximum(low, begin) // _TILE * 2 - 1, 1)
    block = step * _STEP + tl.arange(0, _STEP)
    far = (block > 0)[:, None] & (block[:, None] < near[None, :])
    shares = tl.where(far, tl.exp2(tl.minimum(scores, MOST)), 0.0)
    # no other program adds to these; a load and a store would need a barrier, which ends the
    # pipeline
    tl.atomic_add(added, tl.sum(shares, 0), sem="relaxed")


@kernel(do_not_specialize=SIZES)
def rate_keys(
    rows_ptr, keys_ptr, sums_ptr, added_ptr, new_ptr, factors_ptr, ratings_ptr, first_ptr, stop_ptr,
    q_len, kv_len, n_keys, blocks, first_tile, ceiling, splits, each, HKV: tl.constexpr,
    TILES: tl.constexpr, LINES: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, FP8: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """Log2 of the largest share that a key of each block has of a sampled row of each tile, for
    `each` steps of blocks; -inf for a tile without rows. Blocks that a tile does not see as a whole
    get some number.

    The best keys of the far blocks may add much to a row's sum, which means hide. So the first
    call finds how much, and for programs with a row whose sum more than doubles it is made AGAIN.
    """
    HALF: tl.constexpr = tl.float16 if FP8 else tl.float32
    item, own, split, begin, start, steps = program_span(
        first_ptr, stop_ptr, q_len, kv_len, first_tile, splits, HKV, TILES
    )
    if split * each >= steps:
        return
    row = tl.arange(0, LINES)
    sums = sums_ptr + own * LINES + row
    added = added_ptr + own * splits * LINES + row
    if AGAIN:
        total = tl.zeros([LINES], tl.float32)
        for other in range(0, (steps + each - 1) // each):
            total += tl.load(added + other * LINES)
        if tl.max(total) <= 1:
            return
        old = tl.load(sums)
        sums = new_ptr + (own * splits + split) * LINES + row
        tl.store(sums, tl.where(total > 1, old + tl.log2(1 + total), old))
    else:
        added += split * LINES
        tl.store(added, row * 0.0)
    tl.debug_barrier()
    column = tl.arange(0, BLOCK_D)
    q = tl.load(rows_ptr + (own * LINES + row[:, None]) * BLOCK_D + column[None, :])
    factor = tl.load(factors_ptr + own)
    to = ratings_ptr + own * (TILES * _PLANES) * blocks
    cells = keys_ptr + item.to(tl.int64) * n_keys * BLOCK_D
    place = tl.arange(0, _STEP)[:, None] * BLOCK_D + column[None, :]
    highest = tl.full([_STEP, LINES], float("-inf"), HALF)
    end = tl.minimum((split + 1) * each, steps) * _BLOCK
    for at in tl.range(split * each * _BLOCK, end, num_stages=STAGES):
        k = tl.load(cells + at * (_STEP * BLOCK_D) + place)
        scores = tl.dot(k, q.T, input_precision=PRECISION, out_dtype=HALF)
        highest = tl.maximum(highest, scores)
        step = at // _BLOCK
        key = at - step * _BLOCK
        if (key == _EDGE - 1) | (key == _BLOCK - _EDGE - 1) | (key == _BLOCK - 1):
            shares = log2_scores(highest.to(tl.float32), factor, ceiling, SOFTCAP)
            shares -= tl.load(sums)[None, :]
            _store_ratings(shares, to, key, step, blocks, TILES, LINES)
            if not AGAIN:
                _add_far(shares, added, step, begin, start, TILES, LINES)
            highest = tl.full([_STEP, LINES], float("-inf"), HALF)


class Rows(NamedTuple):
    """The sampled rows of some groups as the programs that score them take them.

    Attributes:
        rows: of each program, by query tile, row and query head.
        sums: log2 of each row's sum of exponentials.
        factors: of each program, from products of its rows to log2.
        tiles: query tiles of a program.
        lines: rows of a program.
        ceiling: of soft-capped scores, in log2.
        fixed: what kernels that read them are compiled for.
    """

    rows: Float[Tensor, "items programs bundles lines D"]
    sums: Float[Tensor, "items programs bundles lines"]
    factors: Float[Tensor, "items programs bundles"]
    tiles: int
    lines: int
    ceiling: float
    fixed: dict[str, Any]

    @property
    def scores(self) -> torch.dtype:
        """What products are added up in."""
        return torch.float16 if self.fixed["FP8"] else torch.float32

    def splits(self, blocks: int) -> tuple[int, int]:
        """Programs that share the steps of so many blocks, and steps of each."""
        steps = -(-blocks // STEP)
        each = -(-steps // min(steps, -(-PROGRAMS // self.factors.numel())))
        return -(-steps // each), each


def sample_rows(
    q: Float[Tensor, "B H L D"],
    cells: Cells,
    layout: Layout,
    plan: Plan,
    group: int,
    count: int,
    *,
    scale: float,
    softcap: float,
) -> Rows:
    """The sampled rows of at least `count` groups from `group` on, with their sums."""
    batch, heads, q_len, dim = q.shape
    kv_heads = cells.unit.shape[1]
    share, items, tiles = heads // kv_heads, batch * kv_heads, tiles_at_once(plan)
    fp8, exact = cells.keys.element_size() == 1, q.dtype == torch.float32
    each = plan.rows * tiles // GROUP_TILES
    most = SCORED_AT_ONCE if fp8 else at_once(SCORED_AT_ONCE, dim)
    take = min(most, most * ROWS_AT_ONCE // each, power_of_two(share))
    take = 1 if exact else max(1, take)
    bundles, lines = -(-share // take), take * each
    programs = -(-count * GROUP_TILES // tiles)
    slots = (items, programs, bundles)
    rows = cells.keys.new_empty((*slots, lines, padded_dim(dim)))
    sums = torch.empty((*slots, lines), device=q.device)
    factors = torch.empty(slots, device=q.device)
    fixed = {"HKV": kv_heads, "TILES": tiles, "BLOCK_D": padded_dim(dim), "FP8": fp8}
    fixed |= {"PRECISION": "ieee" if exact else "tf32", "SOFTCAP": bool(softcap)}
    # what wider keys leave of some GPUs' shared memory
    stages = 3 if dim <= WIDE_DIM else 2
    fixed |= {"STAGES": stages if fp8 else 1, "num_warps": 8}
    factor, ceiling = log2_scaling(scale, softcap)
    sum_rows[(programs, bundles, items)](
        q, cells.keys, cells.means, cells.unit, rows, sums, factors, layout.first, layout.stop,
        tuple(q.stride()[:3]), q_len, layout.kv_len, cells.keys.shape[2], cells.means.shape[2],
        group * GROUP_TILES, factor, ceiling, SHARE=share, TAKE=take,
        EACH=plan.rows // GROUP_TILES, D=dim, maxnreg=REGISTERS if fp8 else None, **fixed,
    )  # fmt: skip
    return Rows(rows, sums, factors, tiles, lines, ceiling, fixed)


def score_keys(
    sampled: Rows, cells: Cells, layout: Layout, group: int
) -> Float[Tensor, "items groups 4 planes blocks"]:
    """Ratings of every block for the groups of `sampled`, from `group` on, in log2; the reference
    takes the best of a block's planes and its neighbours' nearest ones. The blocks that a tile
    keeps anyway have other numbers."""
    slots, tiles = sampled.factors.shape, sampled.tiles
    items, programs, bundles = slots
    blocks, device = layout.blocks, cells.keys.device
    ratings = torch.empty((*slots, tiles, PLANES, blocks), dtype=sampled.scores, device=device)
    splits, each = sampled.splits(blocks)
    added, new = (torch.empty((*slots, splits, sampled.lines), device=device) for _ in range(2))
    for again in (False, True):
        rate_keys[(programs, bundles * splits, items)](
            sampled.rows, cells.keys, sampled.sums, added, new, sampled.factors, ratings,
            layout.first, layout.stop, layout.q_len, layout.kv_len, cells.keys.shape[2], blocks,
            group * GROUP_TILES, sampled.ceiling, splits, each, LINES=sampled.lines, AGAIN=again,
            **sampled.fixed,
        )  # fmt: skip
    best = ratings.amax(dim=2) if bundles > 1 else ratings[:, :, 0]
    return best.view(items, programs * tiles // GROUP_TILES, GROUP_TILES, PLANES, blocks)


def tiles_at_once(plan: Plan) -> int:
    """Query tiles of a program, for 64 rows of a head."""
    return max(1, ROWS_AT_ONCE * GROUP_TILES // plan.rows)
