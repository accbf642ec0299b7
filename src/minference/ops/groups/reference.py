"""Blocks of each query tile, estimated coarse to fine from rows spread over its group."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minference.index import BLOCK, TILE, Ragged
from minference.ops.build import Layout
from minference.ops.groups.plan import GROUP_TILES, Plan, group_count, list_room, spread_rows


def grouped_blocks(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B Hkv N D"],
    layout: Layout,
    plan: Plan,
    *,
    scale: float,
    softcap: float = 0.0,
) -> tuple[Ragged, Ragged]:
    """Block lists of every query tile of the chunk, and candidates of every group; one list for
    the query heads of a KV head."""
    keys = real_keys(k, layout)
    flags, found = [], []
    for group in range(group_count(layout)):
        rows, positions, tiles = sampled_rows(q, k.shape[1], layout, group, plan.rows)
        scores = row_scores(rows, keys, scale, softcap)
        cells, wide = (
            row_scores(rows, mean_cells(keys, layout, cell), scale, softcap)
            for cell in (plan.cell, plan.sum_cell)
        )
        ratings = rate_blocks(cells, wide, positions, plan)
        candidates = choose_candidates(ratings, positions, layout, plan)
        masses = tile_masses(scores, positions, tiles, candidates)
        flags.append(keep_blocks(masses, candidates, tiles, plan.mass))
        found.append(candidates)
    room = list_room(layout, plan.cap)
    lists = tile_lists(torch.stack(flags, dim=2), layout, room)
    return lists, _entries(torch.stack(found, dim=2), room)


def real_keys(k: Tensor, layout: Layout) -> Float[Tensor, "B Hkv N D"]:
    """Keys by position, zeros past the last real one, up to a whole number of tiles."""
    count = -(-layout.kv_len // TILE) * TILE
    position = torch.arange(count, device=k.device)
    place = (layout.first[:, None] + position).clamp(max=layout.kv_len - 1)
    keys = k.gather(2, place[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])).float()
    past = position >= (layout.stop - layout.first)[:, None]
    return keys.masked_fill(past[:, None, :, None], 0.0)


def mean_cells(
    keys: Float[Tensor, "B Hkv N D"], layout: Layout, cell: int
) -> Float[Tensor, "B Hkv cells D"]:
    """Mean of the real keys of each cell."""
    begin = torch.arange(keys.shape[2] // cell, device=keys.device) * cell
    real = ((layout.stop - layout.first)[:, None] - begin).clamp(1, cell)
    return keys.unflatten(2, (-1, cell)).sum(dim=3) / real[:, None, :, None]


def sampled_rows(
    q: Tensor, kv_heads: int, layout: Layout, group: int, rows: int
) -> tuple[Float[Tensor, "B Hkv S R D"], Int[Tensor, "B 1 1 R"], Int[Tensor, "B R"]]:
    """The sampled rows of a group by KV head, their positions, and their tiles counted from the
    group's first; position and tile are -1 in a group without real rows."""
    positions, real = spread_rows(layout, group, rows)
    place = positions + layout.first[:, None] - (layout.kv_len - layout.q_len)
    place = place.clamp(0, layout.q_len - 1)[:, None, :, None]
    own = q.gather(2, place.expand(-1, q.shape[1], -1, q.shape[3])).float()
    positions = torch.where(real[:, None], positions, -1)
    tiles = torch.where(real[:, None], positions // TILE % GROUP_TILES, -1)
    return own.unflatten(1, (kv_heads, -1)), positions[:, None, None], tiles


def row_scores(
    rows: Tensor, keys: Tensor, scale: float, softcap: float
) -> Float[Tensor, "B Hkv S R n"]:
    scores = rows @ keys[:, :, None].transpose(3, 4) * scale
    return softcap * (scores / softcap).tanh() if softcap else scores


def _attention(scores: Tensor, hidden: Tensor) -> Tensor:
    """Softmax over what is not hidden; 0 for rows that see nothing."""
    return scores.masked_fill(hidden, float("-inf")).softmax(dim=-1).nan_to_num(0.0)


def rate_blocks(
    scores: Float[Tensor, "B Hkv S R cells"],
    wide: Float[Tensor, "B Hkv S R wide"],
    positions: Int[Tensor, "B 1 1 R"],
    plan: Plan,
) -> Float[Tensor, "B Hkv blocks"]:
    """The largest share of a row's attention that a cell of a block has; a cell counts from its
    first key on. In a row's sum each block counts with its best wide cell."""
    hidden = (
        torch.arange(x.shape[-1], device=x.device) * size > positions[..., None]
        for x, size in ((scores, plan.cell), (wide, plan.sum_cell))
    )
    scores, wide = (
        x.masked_fill(h, float("-inf")) for x, h in zip((scores, wide), hidden, strict=True)
    )
    total = wide.unflatten(-1, (-1, BLOCK // plan.sum_cell)).amax(dim=-1)
    total = total.logsumexp(dim=-1, keepdim=True) + math.log(BLOCK // plan.cell)
    best = (scores - total).nan_to_num(nan=float("-inf")).amax(dim=(2, 3))
    return best.unflatten(-1, (-1, BLOCK // plan.cell)).amax(dim=-1)


def choose_candidates(
    ratings: Float[Tensor, "B Hkv blocks"],
    positions: Int[Tensor, "B 1 1 R"],
    layout: Layout,
    plan: Plan,
) -> Bool[Tensor, "B Hkv blocks"]:
    """The best rated blocks; block 0, the group's own and the one before them always."""
    size, block = GROUP_TILES * TILE, torch.arange(ratings.shape[2], device=ratings.device)
    begin = (layout.kv_len - layout.q_len - layout.first).clamp(min=0)
    group = positions[:, 0, 0, 0] // size
    low = torch.maximum(group * size, begin)
    stop = torch.minimum((group + 1) * size, layout.stop - layout.first)
    count = torch.where(positions[:, 0, 0, 0] < 0, 0, -(-stop // BLOCK))[:, None, None]
    seen = block < count
    forced = seen & ((block == 0) | (block >= (low // TILE * 2 - 1)[:, None, None]))
    limit = (plan.floor + (count * plan.share).int()).clamp(max=plan.cap)
    ranked = ratings.masked_fill(forced, torch.inf).masked_fill(~seen, -torch.inf)
    order = ranked.sort(dim=-1, descending=True, stable=True).indices
    return (
        torch.zeros_like(forced)
        .expand_as(ranked)
        .scatter(-1, order, (block < limit).expand_as(order))
        & seen
    )


def tile_masses(
    scores: Float[Tensor, "B Hkv S R N"],
    positions: Int[Tensor, "B 1 1 R"],
    tiles: Int[Tensor, "B R"],
    candidates: Bool[Tensor, "B Hkv blocks"],
) -> Float[Tensor, "B Hkv tiles blocks"]:
    """Attention of the sampled rows over the candidates' keys, by tile and block, summed over the
    rows and query heads."""
    key = torch.arange(scores.shape[-1], device=scores.device)
    hidden = (key > positions[..., None]) | ~candidates.repeat_interleave(BLOCK, -1)[
        :, :, None, None
    ]
    weights = _attention(scores, hidden).unflatten(-1, (-1, BLOCK)).sum(dim=(2, 5))
    own = (tiles[:, None] == torch.arange(GROUP_TILES, device=tiles.device)[:, None]).float()
    return own[:, None] @ weights


def keep_blocks(
    masses: Float[Tensor, "B Hkv tiles blocks"],
    candidates: Bool[Tensor, "B Hkv blocks"],
    tiles: Int[Tensor, "B R"],
    mass: float,
) -> Bool[Tensor, "B Hkv tiles blocks"]:
    """The fewest entries (tile, block) that hold the share `mass` of all, those first whose block
    or whose offset holds most over the group's tiles; equals come together."""
    blocks = masses.shape[3]
    part = torch.arange(GROUP_TILES, device=masses.device)[:, None]
    slot = 2 * part - torch.arange(blocks, device=masses.device) + blocks - 1
    slot = slot.flatten().expand(*masses.shape[:2], -1)
    by_offset = masses.new_zeros(*masses.shape[:2], blocks + 2 * GROUP_TILES)
    by_offset = by_offset.scatter_add(2, slot, masses.flatten(2))
    score = torch.maximum(by_offset.gather(2, slot).view_as(masses), masses.sum(2, keepdim=True))
    score = (score * candidates[:, :, None]).flatten(2)
    ordered, order = score.sort(dim=-1, descending=True, stable=True)
    before = masses.flatten(2).gather(2, order).cumsum(dim=-1)
    wanted = mass * masses.sum(dim=(2, 3))[..., None]
    enough = before >= wanted
    edge = torch.where(enough, ordered, 0.0).amax(dim=-1, keepdim=True)
    return (score.view_as(masses) >= edge[..., None]) & (score.view_as(masses) > 0)


def tile_lists(flags: Bool[Tensor, "B Hkv G tiles blocks"], layout: Layout, room: int) -> Ragged:
    """Lists of the chunk's tiles from the flags of its groups' tiles; block 0, a tile's own and
    the one before always."""
    flags = flags.flatten(2, 3)
    begin = (layout.kv_len - layout.q_len - layout.first).clamp(min=0)
    first = begin // TILE
    slot = (first % GROUP_TILES)[:, None] + torch.arange(layout.chunk_tiles, device=flags.device)
    last = flags.shape[2] - 1
    slot_ = slot.clamp(max=last)[:, None, :, None]
    flags = flags.gather(2, slot_.expand(-1, flags.shape[1], -1, flags.shape[3]))
    block = torch.arange(flags.shape[3], device=flags.device)
    own = 2 * (first[:, None] + torch.arange(layout.chunk_tiles, device=flags.device))
    own = own[:, None, :, None]
    real = (layout.stop - layout.first)[:, None, None, None]
    there = (block * BLOCK < real) & (own * BLOCK < real)
    flags = (flags | (block == 0) | (block >= own - 1)) & (block <= own + 1) & there
    return _entries(flags, room)


def _entries(flags: Bool[Tensor, "B Hkv lists blocks"], room: int) -> Ragged:
    block = torch.arange(flags.shape[3], device=flags.device)
    rows = torch.where(flags, block, flags.shape[3]).sort(dim=-1).values[..., :room]
    rows = torch.nn.functional.pad(rows, (0, room - rows.shape[3]))
    return Ragged.from_rows(rows * 4 + 3, flags.sum(dim=-1))
