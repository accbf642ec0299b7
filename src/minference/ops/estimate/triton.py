"""The last-query estimate on the GPU: two passes over K, each tile read once for its query heads.

Pass 1 takes every row's log-sum-exp over ranges of keys; pass 2 sums the weights of each run of 64
keys, counted back from the last one, down its columns and into the four block offsets that it can
touch. Nothing is added atomically, so equal calls give equal bits.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from minference.index import BLOCK
from minference.ops._kernel import kernel
from minference.ops._triton import at_once, log2_scaling, padded_dim
from minference.ops.estimate.reference import ROWS, MassScores
from minference.ops.select.lists import offset_slots

HEADS_AT_ONCE = 4
GROUPS_AT_MOST = 1 << 13

_ROWS = tl.constexpr(ROWS)
_BLOCK = tl.constexpr(BLOCK)
_PARTS = tl.constexpr(4)


@triton.jit
def _last_queries(
    q_ptr, q_steps, b, kv_head, bundle, real, q_start, rows, SHARE: tl.constexpr,
    TAKE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The last 64 rows of TAKE query heads, one below the other, their positions and heads; the
    position of a row that does not count is -1."""
    line = tl.arange(0, TAKE * _ROWS)
    inner = bundle * TAKE + line // _ROWS
    head = kv_head * SHARE + inner
    pos = real - _ROWS + line % _ROWS
    low = tl.maximum(tl.maximum(real - rows, q_start), 0)
    pos = tl.where((pos >= low) & (inner < SHARE), pos, -1)
    column = tl.arange(0, BLOCK_D)
    at = b.to(tl.int64) * q_steps[0] + head.to(tl.int64)[:, None] * q_steps[1]
    at += (pos - q_start).to(tl.int64)[:, None] * q_steps[2] + column[None, :]
    known = (pos >= 0)[:, None] & (column < D)[None, :]
    return tl.load(q_ptr + at, mask=known, other=0.0), pos, head, inner < SHARE


@triton.jit
def _keys(k_from, k_step, key, real, first, D: tl.constexpr, BLOCK_D: tl.constexpr):
    column = tl.arange(0, BLOCK_D)
    at = (first + key).to(tl.int64)[:, None] * k_step + column[None, :]
    known = ((key >= 0) & (key < real))[:, None] & (column < D)[None, :]
    return tl.load(k_from + at, mask=known, other=0.0)


@triton.jit
def _products(a, b, scaling, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """Scores and the factor that takes them to units of log2."""
    factor, ceiling = scaling
    scores = tl.dot(a, b, input_precision=PRECISION)
    if SOFTCAP:
        return ceiling - 2 * ceiling / (tl.exp2(scores * factor) + 1), 1.0
    return scores, factor


@kernel
def _row_sums(
    q_ptr, k_ptr, lse_ptr, first_ptr, stop_ptr, q_steps, k_steps, q_len, kv_len, rows, scaling,
    span, HKV: tl.constexpr, SHARE: tl.constexpr, TAKE: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Each row's log-sum-exp in base 2 over one range of keys."""
    split = tl.program_id(0)
    b = tl.program_id(2) // HKV
    kv_head = tl.program_id(2) % HKV
    first = tl.load(first_ptr + b)
    real = tl.load(stop_ptr + b) - first
    q, pos, head, there = _last_queries(
        q_ptr, q_steps, b, kv_head, tl.program_id(1), real, kv_len - q_len - first, rows, SHARE,
        TAKE, D, BLOCK_D,
    )  # fmt: skip
    k_from = k_ptr + b.to(tl.int64) * k_steps[0] + kv_head.to(tl.int64) * k_steps[1]
    # finite, so that rows without a key yet need no case of their own
    peak = tl.full([TAKE * _ROWS], -1e30, tl.float32)
    total = tl.zeros([TAKE * _ROWS], tl.float32)
    end = tl.minimum((split + 1) * span, (real + _BLOCK - 1) // _BLOCK)
    for j in tl.range(split * span, end, num_stages=STAGES):
        key = j * _BLOCK + tl.arange(0, _BLOCK)
        k = _keys(k_from, k_steps[2], key, real, first, D, BLOCK_D)
        scores, factor = _products(q, k.T, scaling, SOFTCAP, PRECISION)
        if (j + 2) * _BLOCK > real:
            scores = tl.where(key[None, :] <= pos[:, None], scores, float("-inf"))
        risen = tl.maximum(peak, tl.max(scores, 1) * factor)
        total = total * tl.exp2(peak - risen)
        total += tl.sum(tl.exp2(scores * factor - risen[:, None]), 1)
        peak = risen
    lse = tl.where(total > 0, peak + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf"))
    line = (b * HKV * SHARE + head).to(tl.int64) * _ROWS + tl.arange(0, TAKE * _ROWS) % _ROWS
    tl.store(lse_ptr + line * SPLITS + split, lse, mask=there)


@triton.jit
def _whole_rows(lse_ptr, line, known, splits, SPLITS: tl.constexpr):
    """Log-sum-exp in base 2 of whole rows; infinite, so that weights are 0, for unknown ones."""
    split = tl.arange(0, SPLITS)
    at = lse_ptr + line[:, None] * splits + split[None, :]
    mask = known[:, None] & (split < splits)[None, :]
    parts = tl.load(at, mask=mask, other=float("-inf"))  # [rows, SPLITS]
    peak = tl.max(parts, 1)
    dead = peak == float("-inf")
    peak = tl.where(dead, 0.0, peak)
    total = tl.sum(tl.exp2(parts - peak[:, None]), 1)
    return tl.where(dead, float("inf"), peak + tl.log2(tl.where(dead, 1.0, total)))


@triton.jit
def _tile_counts(first_ptr, stop_ptr, b, kv_len):
    """First real place, number of real keys, tiles of 64 places that hold none, and all tiles;
    tile t holds the keys from `real - 64 (t - behind + 1)` on."""
    first = tl.load(first_ptr + b)
    real = tl.load(stop_ptr + b) - first
    behind = (kv_len - real + _BLOCK - 1) // _BLOCK
    return first, real, behind, behind + (real + _BLOCK - 1) // _BLOCK


@triton.jit
def _block_sums(weights, key, live, TAKE: tl.constexpr):
    """Column sums [64, TAKE] of weights [64 keys, TAKE * 64 rows], and their mass at the block
    offsets m - 2 to m + 1 of tile m from the end, [TAKE, 2, 2]. `key` numbers the keys 0 to 63.

    Key i and row r are 64 m + u apart, u = r - i in [-63, 63]. Of a distance 64 m + u, offset m - 1
    gets (64 - u) / 128, m gets 1 / 2 and m + 1 gets u / 128; for u < 0 that is -u / 128 in m - 2,
    1 / 2 in m - 1 and (64 + u) / 128 in m.
    """
    weights = tl.reshape(weights, [_BLOCK, TAKE, _ROWS])
    row = tl.arange(0, _ROWS).to(tl.float32)[None, None, :]
    sums = tl.sum(weights, 2)
    behind = tl.maximum(key[:, None, None] - row, 0.0)  # -u where u < 0
    below = tl.sum(weights * behind, 2)
    above = tl.sum(weights * row, 2) - key[:, None] * sums + below
    below /= 128
    above /= 128
    half = sums / 2
    masses = tl.join(tl.join(below, half - below), tl.join(half - above, above))
    # one sum over the keys for all four: each costs barriers between the warps
    masses = tl.sum(tl.where(live[:, None, None, None], masses, 0.0), 0)
    return tl.where(live[:, None], sums, 0.0), masses


@triton.jit
def _line_tile(
    t, q, pos, lse, k_from, k_step, columns_ptr, tops_ptr, parts_ptr, list_of, inner, bounds,
    kv_len, tiles, scaling, SHARE: tl.constexpr, TAKE: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, GROUP: tl.constexpr, DIAGONAL: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Column sums, group maxima and offset parts of one run of 64 keys."""
    GROUPS: tl.constexpr = _BLOCK // GROUP
    first, real, behind = bounds
    m = t - behind
    key = real - (m + 1) * _BLOCK + tl.arange(0, _BLOCK)
    k = _keys(k_from, k_step, key, real, first, D, BLOCK_D)
    scores, factor = _products(k, q.T, scaling, SOFTCAP, PRECISION)  # [64 keys, TAKE * 64 rows]
    weights = tl.exp2(scores * factor - lse[None, :])
    if DIAGONAL:
        weights = tl.where(key[:, None] <= pos[None, :], weights, 0.0)
    live = (key >= 0) & (key < real)
    # a sum of floats, which the compiler does not lift out of the loop: it would keep a tile of
    # constants in registers
    number = key.to(tl.float32) + ((m + 1) * _BLOCK - real).to(tl.float32)
    sums, masses = _block_sums(weights, number, live, TAKE)
    sums = tl.where((key < real)[:, None], sums, -1.0)
    to = columns_ptr + list_of[None, :] * kv_len + key[:, None]
    mine = inner < SHARE
    tl.store(to, sums, mask=((key >= 0) & (key < kv_len))[:, None] & mine[None, :])
    tops = tl.where(live[:, None], sums, -1.0)
    tops = tl.max(tl.reshape(tops, [GROUPS, GROUP, TAKE]), 1)  # [GROUPS, TAKE]
    at = (list_of[None, :] * tiles + t) * GROUPS + tl.arange(0, GROUPS)[:, None]
    tl.store(tops_ptr + at, tops, mask=mine[None, :])
    pair = tl.arange(0, 2)
    part = pair[None, :, None] * 2 + pair[None, None, :]
    at = (list_of[:, None, None] * _PARTS + part) * tiles + m
    tl.store(parts_ptr + at, masses, mask=tl.where(m >= 0, mine, False)[:, None, None])


@kernel
def _line_sums(
    q_ptr, k_ptr, lse_ptr, columns_ptr, tops_ptr, parts_ptr, first_ptr, stop_ptr, q_steps, k_steps,
    q_len, kv_len, rows, scaling, splits, tiles, HKV: tl.constexpr, SHARE: tl.constexpr,
    TAKE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr,
    GROUP: tl.constexpr, STAGES: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(2) // HKV
    kv_head = tl.program_id(2) % HKV
    first, real, behind, end = _tile_counts(first_ptr, stop_ptr, b, kv_len)
    q, pos, head, there = _last_queries(
        q_ptr, q_steps, b, kv_head, tl.program_id(1), real, kv_len - q_len - first, rows, SHARE,
        TAKE, D, BLOCK_D,
    )  # fmt: skip
    line = (b * HKV * SHARE + head).to(tl.int64) * _ROWS + tl.arange(0, TAKE * _ROWS) % _ROWS
    lse = _whole_rows(lse_ptr, line, there & (pos >= 0), splits, SPLITS)
    k_from = k_ptr + b.to(tl.int64) * k_steps[0] + kv_head.to(tl.int64) * k_steps[1]
    inner = tl.program_id(1) * TAKE + tl.arange(0, TAKE)
    list_of = (b * HKV * SHARE + kv_head * SHARE + inner).to(tl.int64)
    bounds = (first, real, behind)
    if (tl.program_id(0) == 0) & (real > 0):
        _line_tile(
            behind, q, pos, lse, k_from, k_steps[2], columns_ptr, tops_ptr, parts_ptr, list_of,
            inner, bounds, kv_len, tiles, scaling, SHARE, TAKE, D, BLOCK_D, GROUP, True, SOFTCAP,
            PRECISION,
        )  # fmt: skip
    # every other tile
    span = (end + tl.num_programs(0) - 2) // tl.num_programs(0)
    begin = tl.program_id(0) * span
    for i in tl.range(begin, tl.minimum(begin + span, end - 1), num_stages=STAGES):
        _line_tile(
            i + (i >= behind).to(tl.int32), q, pos, lse, k_from, k_steps[2], columns_ptr, tops_ptr,
            parts_ptr, list_of, inner, bounds, kv_len, tiles, scaling, SHARE, TAKE, D, BLOCK_D,
            GROUP, False, SOFTCAP, PRECISION,
        )  # fmt: skip


@triton.jit
def offset_mass(parts, slot, real, tiles):
    """Mass of block offsets (slot x is offset x - 1) from what `_line_sums` left of one head."""
    mass = tl.zeros(slot.shape, tl.float32)
    for part in tl.static_range(_PARTS):
        # tile m passes mass on to the offsets m - 2, m - 1, m and m + 1
        m = slot + 1 - part
        known = (m >= 0) & (m < (real + _BLOCK - 1) // _BLOCK)
        mass += tl.load(parts + part * tiles + m, mask=known, other=0.0)
    # what rounding leaves below zero would read as "does not exist"
    return tl.maximum(mass, 0.0)


@kernel
def _offset_sums(
    parts_ptr, masses_ptr, first_ptr, stop_ptr, heads, tiles, slots, SLOTS: tl.constexpr
):
    item = tl.program_id(1).to(tl.int64)
    b = tl.program_id(1) // heads
    real = tl.load(stop_ptr + b) - tl.load(first_ptr + b)
    slot = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    mass = offset_mass(parts_ptr + item * _PARTS * tiles, slot, real, tiles)
    tl.store(masses_ptr + item * slots + slot, mass, mask=slot < slots)


class EstimateLaunch(NamedTuple):
    """How the two passes cut their work; programs are those of all KV heads together."""

    row_programs: int
    row_stages: int
    line_programs: int
    line_stages: int
    line_registers: int | None
    """Most registers a thread, so that two programs share a multiprocessor."""


LAUNCH = EstimateLaunch(256, 2, 256, 2, 128)
MAX_SPLITS = 32


class LineSums(NamedTuple):
    """What the two passes leave: column sums, the largest of every `group` of them from the end
    on, and the parts of the offsets' masses; see `offset_mass`."""

    columns: Float[Tensor, "B H N"]
    tops: Float[Tensor, "B H T groups"]
    parts: Float[Tensor, "B H 4 T"]

    @property
    def group(self) -> int:
        """Columns of which each entry of `tops` is the largest."""
        return BLOCK // self.tops.shape[3]


def _group(kv_len: int) -> int:
    """Columns a group: so few that the groups outnumber budgets, and at most some 16K groups."""
    return min(BLOCK, max(4, triton.next_power_of_2(kv_len // GROUPS_AT_MOST)))


def line_sums(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B Hkv N D"],
    first: Int[Tensor, " B"],
    stop: Int[Tensor, " B"],
    *,
    scale: float,
    softcap: float = 0.0,
    rows: int = ROWS,
) -> LineSums:
    """Column sums of the last `rows` real queries (64 at most) and what offsets are made from.

    Raises:
        ValueError: more rows than the kernels hold.
    """
    if not 1 <= rows <= ROWS:
        raise ValueError(
            f"rows must be 1 to {ROWS} in the Triton estimate, got {rows}; use impl='torch'"
        )
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    batch, heads, q_len, dim = q.shape
    kv_heads, kv_len = k.shape[1:3]
    share = heads // kv_heads
    exact = q.dtype == torch.float32
    take = 1 if exact else min(at_once(HEADS_AT_ONCE, dim), triton.next_power_of_2(share))
    bundles = -(-share // take)
    others = bundles * batch * kv_heads
    blocks, group = -(-kv_len // BLOCK), _group(kv_len)
    tiles = blocks + 1
    splits = max(1, min(blocks, MAX_SPLITS, LAUNCH.row_programs // others))
    sizes = [(ROWS, splits), (kv_len,), (tiles, BLOCK // group), (4, tiles)]
    lse, *left = (
        torch.empty((batch, heads, *x), dtype=torch.float32, device=q.device) for x in sizes
    )
    scaling = log2_scaling(scale, softcap)
    given = (tuple(q.stride()[:3]), tuple(k.stride()[:3]), q_len, kv_len, rows, scaling)
    fixed = {"HKV": kv_heads, "SHARE": share, "TAKE": take, "D": dim, "SOFTCAP": bool(softcap)}
    fixed |= {"BLOCK_D": padded_dim(dim), "PRECISION": "ieee" if exact else "tf32"}
    fixed |= {"num_warps": 8 if take == 4 else 4}
    _row_sums[(splits, bundles, batch * kv_heads)](
        q, k, lse, first, stop, *given, -(-blocks // splits), SPLITS=splits,
        STAGES=1 if exact else LAUNCH.row_stages, **fixed,
    )  # fmt: skip
    programs = max(1, min(tiles, LAUNCH.line_programs // others))
    _line_sums[(programs, bundles, batch * kv_heads)](
        q, k, lse, *left, first, stop, *given, splits, tiles,
        SPLITS=triton.next_power_of_2(splits), GROUP=group,
        STAGES=1 if exact else LAUNCH.line_stages,
        maxnreg=None if exact else LAUNCH.line_registers, **fixed,
    )  # fmt: skip
    return LineSums(*left)


def last_query_masses(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B Hkv N D"],
    first: Int[Tensor, " B"],
    stop: Int[Tensor, " B"],
    *,
    scale: float,
    softcap: float = 0.0,
    rows: int = ROWS,
) -> MassScores:
    """Column and block-offset sums of the last `rows` real queries (64 at most), as the reference
    defines them, without a host read.

    Raises:
        ValueError: more rows than the kernels hold.
    """
    sums = line_sums(q, k, first, stop, scale=scale, softcap=softcap, rows=rows)
    batch, heads, kv_len = sums.columns.shape
    slots = offset_slots(kv_len)
    masses = sums.columns.new_empty((batch, heads, slots))
    _offset_sums[(-(-slots // 256), batch * heads)](
        sums.parts, masses, first, stop, heads, sums.parts.shape[3], slots, 256
    )
    return MassScores(sums.columns, masses)
