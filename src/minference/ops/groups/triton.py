"""The grouped estimate on the GPU, coarse to fine, without a host read or a rows x keys buffer.

A program serves one group of one KV head: 64 rows of up to four query heads are one tile of 256
rows, so every key is read once for all of them. Means of 16 keys choose candidate blocks; the
candidates' exact scores give each tile's masses; each tile keeps the fewest blocks that hold its
share. Nothing is added atomically, so equal calls give equal bits.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from minference.index import TILE, Ragged
from minference.ops._triton import log2_scaling, padded_dim
from minference.ops.build import Layout
from minference.ops.groups.plan import GROUP_TILES, Plan, group_count, list_room, power_of_two
from minference.ops.groups.triton_keep import keep_blocks, take_candidates
from minference.ops.groups.triton_rate import mean_cells, rate, rated_at_once
from minference.ops.groups.triton_weigh import weigh_candidates

WEIGHED_AT_ONCE = 4
"""Query heads of a program of the fine pass."""

LISTS_AT_ONCE = 4096
"""Groups whose scratch, cap x rows floats each, exists at one time."""


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
    take = 1 if exact else min(WEIGHED_AT_ONCE, power_of_two(share))
    parts, bundles = -(-share // rated_at_once(q.dtype, share)), -(-share // take)
    items, tiles = batch * kv_heads, layout.chunk_tiles
    blocks = 2 * -(-kv_len // TILE)
    cap = list_room(layout, plan.cap)
    device = q.device
    values = torch.empty(items * tiles * cap, dtype=torch.int32, device=device)
    kept = torch.zeros((batch, kv_heads, tiles), dtype=torch.int32, device=device)
    cells = mean_cells(k, layout, plan.cell, plan.sum_cell, shifted=not softcap)
    groups = group_count(layout)
    step = max(1, min(groups, LISTS_AT_ONCE // (items * bundles)))
    room = torch.empty(items * step * parts * blocks, device=device)
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
        ratings = room.narrow(0, 0, items * n * parts * blocks).view(items, n, parts, blocks)
        rate(q, cells, layout, plan, ratings, group, scale=scale, softcap=softcap)
        take_candidates[(n, items)](
            ratings, places, count, *bounds, q_len, kv_len, blocks, parts, group, plan.floor,
            plan.share, HKV=kv_heads, CAP=cap, NB=power_of_two(blocks), BUNDLES=parts,
        )  # fmt: skip
        weigh_candidates[(n, bundles, items)](
            q, k, places, count, scratch, masses, *bounds, tuple(q.stride()[:3]),
            tuple(k.stride()[:3]), q_len, kv_len, group, *scaling, CAP=cap, SOME=16, TAKE=take,
            num_warps=8, **own,
        )  # fmt: skip
        total = masses
        if bundles > 1:
            some = masses.view(-1)[: items * n * bundles * GROUP_TILES * cap]
            total = some.view(items, n, bundles, -1).sum(dim=2)
        keep_blocks[(n, items)](
            places, count, total, values, kept, *bounds, q_len, kv_len, group, tiles, plan.mass,
            HKV=kv_heads, CAP=cap, SOME=16, num_warps=8,
        )  # fmt: skip
        found[:, :, group : group + n] = places.view(batch, kv_heads, n, cap) * 4 + 3
        number[:, :, group : group + n] = count.view(batch, kv_heads, n)
    rows = torch.arange(items * tiles, device=device).view(kept.shape) * cap
    return Ragged(values, rows, kept), Ragged.from_rows(found, number)
