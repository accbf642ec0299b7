"""The grouped estimate on the GPU, without a host read or a rows x keys buffer.

A program serves one group of one KV head: 64 rows of up to four query heads are one tile of 256
rows, so every key is read once for all of them. Nothing is added atomically, so equal calls give
equal bits.
"""

import math
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minference.index import Ragged
from minference.ops.build import Layout
from minference.ops.groups.plan import (
    ALWAYS,
    GROUP_TILES,
    LEAST_WIDER,
    WIDER,
    Plan,
    few_rated,
    group_count,
    list_room,
    power_of_two,
    seen_room,
)
from minference.ops.groups.triton_candidates import listed_keys
from minference.ops.groups.triton_cells import Cells, copy_keys
from minference.ops.groups.triton_keep import take_blocks, take_listed
from minference.ops.groups.triton_spot import PLANES, sample_rows, score_keys

RATED_AT_ONCE = 1 << 28
"""Ratings of blocks, or scores of candidates, that exist at one time."""


def read_keys(k: Float[Tensor, "B Hkv N D"], layout: Layout, plan: Plan, softcap: float) -> Cells:
    """The keys as the estimate takes them."""
    k = k if k.stride(-1) == 1 else k.contiguous()
    fine = plan.cell > 1 and few_rated(plan, layout)
    return copy_keys(k, layout, shifted=not softcap, fine=fine)


def grouped_blocks(
    q: Float[Tensor, "B H L D"],
    keys: Cells,
    layout: Layout,
    plan: Plan,
    *,
    scale: float,
    softcap: float = 0.0,
) -> tuple[Ragged, Ragged]:
    """Block lists of every query tile and wider ones of every group, as the reference defines
    them."""
    q = q if q.stride(-1) == 1 else q.contiguous()
    (batch, kv_heads), kv_len = keys.unit.shape, layout.kv_len
    items, tiles, groups = batch * kv_heads, layout.chunk_tiles, group_count(layout)
    blocks = layout.blocks
    room, wider_room = (list_room(layout, n) for n in (plan.most + ALWAYS, plan.wider))
    values, wider = (
        torch.empty(items * lists * entries, dtype=torch.int32, device=q.device)
        for lists, entries in ((tiles, room), (groups, wider_room))
    )
    # tiles without rows have no program that writes
    count = torch.zeros((batch, kv_heads, tiles), dtype=torch.int32, device=q.device)
    number = torch.empty((batch, kv_heads, groups), dtype=torch.int32, device=q.device)
    listed = few_rated(plan, layout)
    least = math.log2(1 - plan.mass) if plan.mass < 1 else -math.inf
    rated = GROUP_TILES * PLANES * blocks
    if listed:
        rated = blocks + PLANES * plan.candidates * plan.rows * (q.shape[1] // kv_heads)
    step = max(1, min(groups, RATED_AT_ONCE // (items * rated)))
    bounds = (layout.first, layout.stop, layout.q_len, kv_len)
    limits = (groups, tiles, least, least + math.log2(WIDER), plan.most, plan.wider - LEAST_WIDER)
    fixed = {"HKV": kv_heads, "ROOM": room, "WIDER_ROOM": wider_room}
    for group in range(0, groups, step):
        n = min(step, groups - group)
        rows = sample_rows(q, keys, layout, plan, group, n, scale=scale, softcap=softcap)
        if listed:
            ratings, places, found = listed_keys(rows, keys, layout, plan, group, n)
            take_listed[(n, items, GROUP_TILES + 1)](
                ratings, places, found, values, count, wider, number, *bounds, group, *limits,
                LISTED=plan.candidates, SLOTS=power_of_two(4 * plan.candidates), **fixed,
                num_warps=4,
            )  # fmt: skip
            continue
        ratings = score_keys(rows, keys, layout, group)
        width = seen_room(layout, group, n)
        take_blocks[(n, items, GROUP_TILES + 1)](
            ratings, values, count, wider, number, *bounds, blocks, ratings.shape[1], group,
            *limits, NB=width, **fixed, num_warps=min(32, max(4, width // 256)),
        )  # fmt: skip
    return (
        Ragged(values, _starts("tiles", tuple(count.shape), room, q.device), count),
        Ragged(wider, _starts("groups", tuple(number.shape), wider_room, q.device), number),
    )


@lru_cache(maxsize=64)
def _starts(
    lists: str, shape: tuple[int, ...], room: int, device: torch.device
) -> Int[Tensor, "B Hkv lists"]:
    """Where lists of equal room begin, kept so that a call costs no launch for them; a tensor for
    each kind of lists, since what an operator returns must not be the same twice."""
    return torch.arange(0, math.prod(shape) * room, room, device=device).view(shape)
