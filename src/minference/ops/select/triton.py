"""Exact top-k selection on the GPU: a radix select over the bits of non-negative floats.

Columns: four counting passes of 8 bits over all heads at once, then a pass that counts and one
that writes, each cut into ranges of places. Offsets are few, so one program serves a head.
"""

from itertools import accumulate

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from minference.index import BLOCK, Ragged, device_ints

CHUNK = 2048
PROGRAMS = 32
_BINS = tl.constexpr(256)
_TOP = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _ranked(scores, place, n, forced):
    """Integers that order the scores: forced places first, -1 for places that do not exist."""
    score = tl.load(scores + place, mask=place < n, other=-1.0)
    bits = score.to(tl.int32, bitcast=True) & _TOP
    return tl.where(score >= 0, tl.where(place < forced, _TOP, bits), -1)


@triton.jit
def _count_digits(scores, begin, end, n, forced, prefix, SHIFT: tl.constexpr, CHUNK: tl.constexpr):
    """Histogram of 8 bits of the ranks that start with `prefix`. [256]"""
    counts = tl.zeros([_BINS], tl.int32)
    for at in range(begin, end, CHUNK):
        place = at + tl.arange(0, CHUNK)
        rank = _ranked(scores, place, n, forced)
        ours = (place < end) & (rank >= 0)
        if SHIFT < 24:
            ours &= (rank >> (SHIFT + 8)) == prefix
        counts += tl.histogram((rank >> SHIFT) & 255, _BINS, mask=ours)
    return counts


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
def _partial_counts(
    scores_ptr, partial_ptr, state_ptr, limit_ptr, heads, n, forced, span, SHIFT: tl.constexpr,
    PROGRAMS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One counting pass; first folds the counts of the pass before into `state` (prefix, wanted).

    Every program of a row folds alike, and program 0 writes the state of this pass.
    """
    row = tl.program_id(1).to(tl.int64)
    part = tl.program_id(0)
    prefix = row.to(tl.int32) * 0
    wanted = tl.load(limit_ptr + tl.program_id(1) % heads)
    if SHIFT < 24:
        _fold: tl.constexpr = (16 - SHIFT) // 8  # passes before the last folded one
        if _fold > 0:
            before = state_ptr + (row * 4 + _fold - 1) * 2
            prefix = tl.load(before)
            wanted = tl.load(before + 1)
        prefix, wanted = _fold_counts(partial_ptr, row, _fold, prefix, wanted, PROGRAMS)
        if part == 0:
            tl.store(state_ptr + (row * 4 + _fold) * 2, prefix)
            tl.store(state_ptr + (row * 4 + _fold) * 2 + 1, wanted)
    begin = part * span
    counts = _count_digits(
        scores_ptr + row * n, begin, tl.minimum(begin + span, n), n, forced, prefix, SHIFT, CHUNK
    )
    PASS: tl.constexpr = (24 - SHIFT) // 8
    to = partial_ptr + ((row * 4 + PASS) * PROGRAMS + part) * _BINS + tl.arange(0, _BINS)
    tl.store(to, counts)


@triton.jit
def _fold_counts(partial_ptr, row, fold, prefix, wanted, PROGRAMS: tl.constexpr):
    part = tl.arange(0, PROGRAMS)[:, None]
    at = ((row * 4 + fold) * PROGRAMS + part) * _BINS + tl.arange(0, _BINS)[None, :]
    return _choose_digit(tl.sum(tl.load(partial_ptr + at), 0), prefix, wanted)


@triton.jit
def _threshold(partial_ptr, state_ptr, row, PROGRAMS: tl.constexpr):
    """Rank at which the best end, and how many of that rank are kept."""
    before = state_ptr + (row * 4 + 2) * 2
    return _fold_counts(partial_ptr, row, 3, tl.load(before), tl.load(before + 1), PROGRAMS)


@triton.jit
def _count_kept(
    scores_ptr, partial_ptr, state_ptr, kept_ptr, n, forced, span, PROGRAMS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Places of a range above the threshold, and at it."""
    row = tl.program_id(1).to(tl.int64)
    part = tl.program_id(0)
    edge, _ = _threshold(partial_ptr, state_ptr, row, PROGRAMS)
    end = tl.minimum((part + 1) * span, n)
    above = part * 0
    level = part * 0
    for at in range(part * span, end, CHUNK):
        place = at + tl.arange(0, CHUNK)
        rank = _ranked(scores_ptr + row * n, place, n, forced)
        above += tl.sum(((rank > edge) & (place < end)).to(tl.int32))
        level += tl.sum(((rank == edge) & (place < end)).to(tl.int32))
    tl.store(kept_ptr + (row * PROGRAMS + part) * 2, above)
    tl.store(kept_ptr + (row * PROGRAMS + part) * 2 + 1, level)


@triton.jit
def _keep(rank, edge, ties, level, inside):
    """Which places are kept: above the edge, and the first `ties` of those at it, of which `level`
    came before. Also how many are at the edge here."""
    at_edge = inside & (rank == edge)
    order = tl.cumsum(at_edge.to(tl.int32), 0) - 1 + level
    return (inside & (rank > edge)) | (at_edge & (order < ties)), tl.sum(at_edge.to(tl.int32))


@triton.jit
def _write_kept(
    scores_ptr, partial_ptr, state_ptr, kept_ptr, values_ptr, start_ptr, count_ptr, limit_ptr,
    heads, n, forced, span, PROGRAMS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    part = tl.program_id(0)
    edge, ties = _threshold(partial_ptr, state_ptr, row, PROGRAMS)
    limit = tl.load(limit_ptr + tl.program_id(1) % heads)
    other = tl.arange(0, PROGRAMS)
    above = tl.load(kept_ptr + (row * PROGRAMS + other) * 2)
    level = tl.load(kept_ptr + (row * PROGRAMS + other) * 2 + 1)
    levels = tl.sum(tl.where(other < part, level, 0))
    done = tl.sum(tl.where(other < part, above, 0)) + tl.minimum(levels, ties)
    every = tl.sum(above) + tl.minimum(tl.sum(level), ties)
    values = values_ptr + tl.load(start_ptr + row)
    end = tl.minimum((part + 1) * span, n)
    for at in range(part * span, end, CHUNK):
        place = at + tl.arange(0, CHUNK)
        rank = _ranked(scores_ptr + row * n, place, n, forced)
        inside = (place < end) & (rank >= 0) & (limit > 0)
        kept, here = _keep(rank, edge, ties, levels, inside)
        to = done + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(values + to, place, mask=kept & (to < limit))
        levels += here
        done += tl.sum(kept.to(tl.int32))
    if part == 0:
        tl.store(count_ptr + row, tl.minimum(every, limit))


def _limits(budgets: tuple[int, ...], forced: int, n: int) -> tuple[int, ...]:
    return tuple(min(max(budget, forced), n) for budget in budgets)


def select_columns(
    column_scores: Float[Tensor, "B H N"], budgets: tuple[int, ...], sink: int
) -> Ragged:
    """The columns of most mass, the first `sink` always, ties to the smaller position.

    The lists stand one after another, each with room for its budget.
    """
    scores = column_scores.contiguous()
    batch, heads, n = scores.shape
    limits = _limits(budgets, sink, n)
    limit = device_ints(limits, scores.device)
    starts = tuple(accumulate(limits * batch, initial=0))[:-1]
    start = device_ints(starts, scores.device).long()
    shape = (batch, heads, 1)
    values = torch.zeros(max(1, batch * sum(limits)), dtype=torch.int32, device=scores.device)
    count = torch.empty(shape, dtype=torch.int32, device=scores.device)
    parts = min(PROGRAMS, triton.next_power_of_2(triton.cdiv(n, CHUNK)))
    partial = count.new_empty((batch * heads, 4, parts, 256))
    state, kept = (
        count.new_empty((batch * heads, 4, 2)),
        count.new_empty((batch * heads, parts, 2)),
    )
    span = -(-n // parts)
    grid = (parts, batch * heads)
    for shift in (24, 16, 8, 0):
        _partial_counts[grid](
            scores, partial, state, limit, heads, n, sink, span, shift, parts, CHUNK
        )
    _count_kept[grid](scores, partial, state, kept, n, sink, span, parts, CHUNK)
    _write_kept[grid](
        scores, partial, state, kept, values, start, count, limit, heads, n, sink, span, parts,
        CHUNK,
    )  # fmt: skip
    return Ragged(values, start.view(shape), count)


@triton.jit
def _select_offsets(
    masses_ptr, values_ptr, count_ptr, bits_ptr, limit_ptr, heads, n, forced, words,
    CHUNK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    masses = masses_ptr + row * n
    limit = tl.load(limit_ptr + tl.program_id(0) % heads)
    edge = limit * 0
    ties = limit
    for turn in tl.static_range(4):
        counts = _count_digits(masses, 0, n, n, forced, edge, 24 - 8 * turn, CHUNK)
        edge, ties = _choose_digit(counts, edge, ties)
    levels = limit * 0
    done = limit * 0
    for at in range(0, n, CHUNK):
        place = at + tl.arange(0, CHUNK)
        rank = _ranked(masses, place, n, forced)
        inside = (place < n) & (rank >= 0) & (limit > 0)
        kept, here = _keep(rank, edge, ties, levels, inside)
        to = done + tl.cumsum(kept.to(tl.int32), 0) - 1
        kept &= to < limit
        tl.store(values_ptr + row * n + to, place - 1, mask=kept)
        flags = tl.reshape(kept.to(tl.int32), [CHUNK // 32, 32]) << tl.arange(0, 32)[None, :]
        word = at // 32 + tl.arange(0, CHUNK // 32)
        tl.store(bits_ptr + row * words + word, tl.sum(flags, 1), mask=word < words)
        levels += here
        done += tl.sum(kept.to(tl.int32))
    tl.store(count_ptr + row, done)


def select_offsets(
    offset_masses: Float[Tensor, "B H n"], budgets: tuple[int, ...], local: int
) -> tuple[Ragged, Int[Tensor, "B H 1 W"]]:
    """The offsets of most mass and their bitmap, those of distances below `local` always, ties to
    the smaller offset."""
    masses = offset_masses.contiguous()
    batch, heads, n = masses.shape
    forced = (local - 1 + BLOCK - 1) // BLOCK + 2
    limit = device_ints(_limits(budgets, forced, n), masses.device)
    values = torch.zeros((batch, heads, n), dtype=torch.int32, device=masses.device)
    count = values.new_empty((batch, heads, 1))
    bits = values.new_empty((batch, heads, 1, -(-n // 32)))
    _select_offsets[(batch * heads,)](
        masses, values, count, bits, limit, heads, n, forced, bits.shape[3], CHUNK
    )
    start = torch.arange(batch * heads, device=masses.device).view(batch, heads, 1) * n
    return Ragged(values.view(-1), start, count), bits
