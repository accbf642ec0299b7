"""Exact top-k of columns and block offsets on the GPU: a radix select over the bits of masses.

A budget's worth of the best groups of columns bounds what can be kept, so a few thousand columns
are left to rank out of a million. Two launches choose the lists of all heads: the first ranks
groups and offsets, a program a list; the second collects the columns above the bound, and whichever
program of a list comes last ranks them. Equal inputs give equal lists, whatever comes last.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Int
from torch import Tensor

from minference.index import Ragged
from minference.ops._kernel import kernel
from minference.ops.estimate.triton import LineSums, offset_mass
from minference.ops.select.lists import offset_slots

CHUNK = 2048
PROGRAMS = 32
WIDE = 64
_BINS = tl.constexpr(256)
_BLOCK = tl.constexpr(64)
_TOP = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _rank_of(score, place, forced):
    """Integers that order the scores: forced places first, what is no number before numbers, -1 for
    places that do not exist."""
    bits = score.to(tl.int32, bitcast=True) & _TOP
    return tl.where(score < 0, -1, tl.where(place < forced, _TOP, bits))


@triton.jit
def _ranked(scores, place, n, forced, real, tiles, PARTS: tl.constexpr):
    """Ranks of places of one list of scores, or of the offsets that `LineSums.parts` describe."""
    if PARTS:
        score = tl.where(place < n, offset_mass(scores, place, real, tiles), -1.0)
    else:
        score = tl.load(scores + place, mask=place < n, other=-1.0)
    return _rank_of(score, place, forced)


@triton.jit
def _digits(rank, prefix, SHIFT: tl.constexpr):
    """Histogram of 8 bits of the ranks that start with `prefix`. [256]"""
    ours = rank >= 0
    if SHIFT < 24:
        ours &= (rank >> (SHIFT + 8)) == prefix
    return tl.histogram((rank >> SHIFT) & 255, _BINS, mask=ours)


@triton.jit
def _choose_digit(counts, prefix, wanted):
    """Extend `prefix` by the digit at which the `wanted` best ranks end; those still wanted."""
    above = tl.sum(counts) - tl.cumsum(counts, 0)
    digit = tl.maximum(tl.sum((above + counts >= wanted).to(tl.int32)) - 1, 0)
    # nothing wanted would name a digit that no rank has
    digit = tl.where(wanted > 0, digit, 0)
    wanted -= tl.sum(tl.where(tl.arange(0, _BINS) == digit, above, 0))
    return (prefix << 8) | digit, wanted


@triton.jit
def _edge(
    scores, n, forced, limit, real, tiles, PARTS: tl.constexpr, TURNS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """The first 8 * TURNS bits of the rank at which the `limit` best end, and how many of that
    rank are kept."""
    edge = limit * 0
    ties = limit
    for turn in tl.static_range(TURNS):
        counts = tl.zeros([_BINS], tl.int32)
        for at in range(0, n, CHUNK):
            place = at + tl.arange(0, CHUNK)
            rank = _ranked(scores, place, n, forced, real, tiles, PARTS)
            counts += _digits(rank, edge, 24 - 8 * turn)
        edge, ties = _choose_digit(counts, edge, ties)
    return edge, ties


@triton.jit
def _write_offsets(
    parts, values, count, bits, n, forced, limit, words, real, tiles, CHUNK: tl.constexpr
):
    """The best offsets of one list, their number and their bitmap."""
    edge, ties = _edge(parts, n, forced, limit, real, tiles, True, 4, CHUNK)
    levels = limit * 0
    done = limit * 0
    for at in range(0, n, CHUNK):
        place = at + tl.arange(0, CHUNK)
        rank = _ranked(parts, place, n, forced, real, tiles, True)
        rank = tl.where(limit > 0, rank, -1)
        at_edge = (rank == edge).to(tl.int32)
        order = tl.cumsum(at_edge, 0) - 1 + levels
        kept = (rank > edge) | ((at_edge != 0) & (order < ties))
        to = done + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(values + to, place - 1, mask=kept)
        flags = tl.reshape(kept.to(tl.int32), [CHUNK // 32, 32]) << tl.arange(0, 32)[None, :]
        word = at // 32 + tl.arange(0, CHUNK // 32)
        tl.store(bits + word, tl.sum(flags, 1), mask=word < words)
        levels += tl.sum(at_edge)
        done += tl.sum(kept.to(tl.int32))
    tl.store(count, done)


@kernel
def _rank_lists(
    tops_ptr, parts_ptr, state_ptr, column_start_ptr, values_ptr, start_ptr, count_ptr, bits_ptr,
    heads_ptr, limits_ptr, first_ptr, stop_ptr, all_heads, heads, kv_len, tiles, slots, forced,
    words, GROUPS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Program 2 x ranks the groups of columns of list x, program 2 x + 1 its offsets."""
    item = tl.program_id(0) // 2
    row = item.to(tl.int64)
    b = item // heads
    own = item % heads
    source = (b * all_heads + tl.load(heads_ptr + own)).to(tl.int64)
    real = tl.load(stop_ptr + b) - tl.load(first_ptr + b)
    # columns at most, where their list begins in a batch row, and offsets at most
    limits = limits_ptr + own * 3
    if tl.program_id(0) % 2 == 0:
        limit = tl.load(limits)
        room = tl.load(limits_ptr + heads * 3)
        tl.store(column_start_ptr + row, b.to(tl.int64) * room + tl.load(limits + 1))
        used = (kv_len - real + _BLOCK - 1) // _BLOCK + (real + _BLOCK - 1) // _BLOCK
        tops = tops_ptr + source * tiles * GROUPS
        # the first 16 bits: a bound from below, which lets a few more columns pass
        edge, _ = _edge(tops, used * GROUPS, 0, limit, 0, 0, False, 2, CHUNK)
        # with no budget a bound that nothing reaches, then the programs that have arrived
        tl.store(state_ptr + row * 2, tl.where(limit > 0, edge << 16, _TOP))
        tl.store(state_ptr + row * 2 + 1, 0)
    else:
        tl.store(start_ptr + row, row * slots)
        _write_offsets(
            parts_ptr + source * 4 * tiles, values_ptr + row * slots, count_ptr + row,
            bits_ptr + row * words, slots, forced, tl.load(limits + 2), words, real, tiles, CHUNK,
        )  # fmt: skip


@triton.jit
def _near(scores, found, counts, at, n, forced, PARTS: tl.constexpr, WIDE: tl.constexpr, span):
    """Places of the next columns that every part found, and their ranks. [PARTS, WIDE]"""
    inside = at + tl.arange(0, WIDE)
    from_part = tl.arange(0, PARTS)[:, None].to(tl.int64) * span + inside[None, :]
    known = inside[None, :] < counts[:, None]
    place = tl.load(found + from_part, mask=known, other=n)
    score = tl.load(scores + place, mask=known, other=-1.0)
    return place, _rank_of(score, place, forced)


@triton.jit
def _rank_columns(
    scores, found, counts, values, count, n, forced, limit, span, PARTS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Keep the `limit` best of the columns that the parts of one list found, in order of place."""
    most = tl.max(counts, 0)
    edge = limit * 0
    ties = limit
    for turn in tl.static_range(4):
        digits = tl.zeros([_BINS], tl.int32)
        for at in range(0, most, WIDE):
            _, rank = _near(scores, found, counts, at, n, forced, PARTS, WIDE, span)
            digits += _digits(tl.reshape(rank, [PARTS * WIDE]), edge, 24 - 8 * turn)
        edge, ties = _choose_digit(digits, edge, ties)
    above = tl.zeros([PARTS], tl.int32)
    level = tl.zeros([PARTS], tl.int32)
    for at in range(0, most, WIDE):
        _, rank = _near(scores, found, counts, at, n, forced, PARTS, WIDE, span)
        above += tl.sum((rank > edge).to(tl.int32), 1)
        level += tl.sum((rank == edge).to(tl.int32), 1)
    levels = tl.cumsum(level, 0) - level
    kept_here = above + tl.minimum(level, tl.maximum(ties - levels, 0))
    done = tl.cumsum(kept_here, 0) - kept_here
    for at in range(0, most, WIDE):
        place, rank = _near(scores, found, counts, at, n, forced, PARTS, WIDE, span)
        at_edge = (rank == edge).to(tl.int32)
        order = tl.cumsum(at_edge, 1) - 1 + levels[:, None]
        kept = (rank > edge) | ((at_edge != 0) & (order < ties))
        to = done[:, None] + tl.cumsum(kept.to(tl.int32), 1) - 1
        tl.store(values + to, place, mask=kept)
        levels += tl.sum(at_edge, 1)
        done += tl.sum(kept.to(tl.int32), 1)
    tl.store(count, tl.sum(kept_here, 0))


@kernel
def _collect_columns(
    scores_ptr, state_ptr, found_ptr, counts_ptr, values_ptr, start_ptr, count_ptr, heads_ptr,
    limits_ptr, all_heads, heads, n, forced, span, PARTS: tl.constexpr, CHUNK: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    item = tl.program_id(1)
    row = item.to(tl.int64)
    own = item % heads
    source = (item // heads * all_heads + tl.load(heads_ptr + own)).to(tl.int64)
    scores = scores_ptr + source * n
    found = found_ptr + row * PARTS * span
    edge = tl.load(state_ptr + row * 2)
    done = part * 0
    end = tl.minimum((part + 1) * span, n)
    for at in range(part * span, end, CHUNK):
        place = at + tl.arange(0, CHUNK)
        score = tl.load(scores + place, mask=place < end, other=-1.0)
        near = _rank_of(score, place, forced) >= edge
        to = part.to(tl.int64) * span + done + tl.cumsum(near.to(tl.int32), 0) - 1
        tl.store(found + to, place, mask=near)
        done += tl.sum(near.to(tl.int32))
    tl.store(counts_ptr + row * PARTS + part, done)
    # every thread's stores come before the arrival
    tl.debug_barrier()
    if tl.atomic_add(state_ptr + row * 2 + 1, 1, sem="acq_rel") == PARTS - 1:
        _rank_columns(
            scores, found, tl.load(counts_ptr + row * PARTS + tl.arange(0, PARTS)),
            values_ptr + tl.load(start_ptr + row), count_ptr + row, n, forced,
            tl.load(limits_ptr + own * 3), span, PARTS, WIDE,
        )  # fmt: skip


def best_lines(
    sums: LineSums,
    first: Int[Tensor, " B"],
    stop: Int[Tensor, " B"],
    heads: Int[Tensor, " h"],
    limits: Int[Tensor, " n"],
    room: int,
    sink: int,
    local: int,
) -> tuple[Ragged, Ragged, Int[Tensor, "B h 1 W"]]:
    """The columns and the offsets of most mass of some heads, and the offsets' bitmap.

    The first `sink` columns and the first `local` slots of offsets are always kept. The lists stand
    one after another, those of columns each with room for its budget.

    Args:
        sums: what the estimate left.
        first: buffer place of each batch row's first real key.
        stop: buffer place after its last real key.
        heads: numbers of the heads to choose for.
        limits: three numbers a list, and one: the columns at most, the columns of the lists before
            it, the offsets at most; then `room`.
        room: columns at most of all lists of a batch row.
        sink: columns from the first on.
        local: slots from the first on.
    """
    device = sums.columns.device
    batch, all_heads, n = sums.columns.shape
    tiles, groups = sums.tops.shape[2:]
    lists, slots = len(heads), offset_slots(n)
    words = -(-slots // 32)
    parts = min(PROGRAMS, triton.next_power_of_2(triton.cdiv(n, CHUNK)))
    span = -(-n // parts)

    def ints(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def ragged(values: int) -> Ragged:
        shape = (batch, lists, 1)
        return Ragged(ints(max(1, values)), ints(*shape, dtype=torch.int64), ints(*shape))

    by_column, by_offset = ragged(batch * room), ragged(batch * lists * slots)
    bits, state = ints(batch, lists, 1, words), ints(batch * lists, 2)
    found, counts = ints(batch * lists, parts * span), ints(batch * lists, parts)
    _rank_lists[(2 * batch * lists,)](
        sums.tops, sums.parts, state, by_column.start, by_offset.values, by_offset.start,
        by_offset.count, bits, heads, limits, first, stop, all_heads, lists, n, tiles, slots, local,
        words, groups, CHUNK, num_warps=8,
    )  # fmt: skip
    _collect_columns[(parts, batch * lists)](
        sums.columns, state, found, counts, by_column.values, by_column.start, by_column.count,
        heads, limits, all_heads, lists, n, sink, span, parts, CHUNK, WIDE, num_warps=8,
    )  # fmt: skip
    return by_column, by_offset, bits
