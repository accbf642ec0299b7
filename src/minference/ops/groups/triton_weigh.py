"""The fine pass: exact masses of a group's candidate blocks."""

import triton
import triton.language as tl

from minference.index import BLOCK, TILE
from minference.ops.groups.plan import GROUP_TILES
from minference.ops.groups.triton_rows import group_span, log2_scores, spread_queries

_BLOCK = tl.constexpr(BLOCK)
_TILE = tl.constexpr(TILE)
_TILES = tl.constexpr(GROUP_TILES)


@triton.jit
def weigh_candidates(
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
    first, begin, low, stop = group_span(first_ptr, stop_ptr, q_len, kv_len, b, first_group + here)
    q, pos = spread_queries(
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
        scores = log2_scores(tl.dot(q, k.T, input_precision=PRECISION), factor, ceiling, SOFTCAP)
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
