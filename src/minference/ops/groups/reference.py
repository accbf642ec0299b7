"""Blocks of each query tile, by the largest share that a sampled row gives to one of their keys."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minference.index import BLOCK, TILE, Ragged, whole_entries
from minference.ops.build import Layout
from minference.ops.groups.plan import (
    ALWAYS,
    EDGE,
    GROUP_TILES,
    LEAST_WIDER,
    WIDER,
    Plan,
    few_rated,
    group_count,
    list_room,
    near_blocks,
    spread_rows,
)
from minference.ops.scores import softcapped


def read_keys(
    k: Float[Tensor, "B Hkv N D"], layout: Layout, plan: Plan, softcap: float
) -> Float[Tensor, "B Hkv places D"]:
    """The keys as the estimate takes them."""
    return real_keys(k, layout)


def grouped_blocks(
    q: Float[Tensor, "B H L D"],
    keys: Float[Tensor, "B Hkv places D"],
    layout: Layout,
    plan: Plan,
    *,
    scale: float,
    softcap: float = 0.0,
) -> tuple[Ragged, Ragged]:
    """Block lists of every query tile of the chunk, and wider ones of every group; one list for
    the query heads of a KV head."""
    block = torch.arange(keys.shape[2] // BLOCK, device=q.device)
    flags, wider = [], []
    for group in range(group_count(layout)):
        rows, positions = sampled_rows(q, keys.shape[1], layout, group, plan.rows)
        scores, cells, means = (
            row_scores(rows, mean_cells(keys, size), positions, size, scale, softcap)
            for size in (1, plan.cell, BLOCK)
        )
        first, stop = (x[:, None, None, None] for x in near_blocks(layout, group))
        near = (block == 0) | (block >= first)
        if few_rated(plan, layout):
            sums = mean_sums(scores, means, near)
            listed = candidates(cells, sums, near, block < stop, plan.candidates)
            own = listed.repeat_interleave(BLOCK, -1)[:, :, None]
            scores = scores.masked_fill(~own, -math.inf)
        ratings = rate_blocks(scores, row_sums(scores, means, near))
        own = 2 * (layout.first_tile // GROUP_TILES + group) * GROUP_TILES
        own = own[:, None] + 2 * torch.arange(GROUP_TILES, device=q.device)
        own, seen = own[:, None, :, None], block < stop
        always = (block == 0) | (block >= own - 1)
        least = math.log(1 - plan.mass) if plan.mass < 1 else -math.inf
        flags.append(choose(ratings, always, seen & (block <= own + 1), least, plan.most))
        most = plan.wider - LEAST_WIDER
        best = ratings.amax(dim=2, keepdim=True)
        wider.append(choose(best, near, seen, least + math.log(WIDER), most)[:, :, 0])
    lists = tile_lists(torch.stack(flags, dim=2), layout, list_room(layout, plan.most + ALWAYS))
    return lists, _entries(torch.stack(wider, dim=2), list_room(layout, plan.wider))


def real_keys(k: Tensor, layout: Layout) -> Float[Tensor, "B Hkv N D"]:
    """Keys by position, zeros past the last real one, up to a whole number of tiles."""
    count = -(-layout.kv_len // TILE) * TILE
    position = torch.arange(count, device=k.device)
    place = (layout.first[:, None] + position).clamp(max=layout.kv_len - 1)
    keys = k.gather(2, place[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])).float()
    past = position >= (layout.stop - layout.first)[:, None]
    return keys.masked_fill(past[:, None, :, None], 0.0)


def mean_cells(keys: Float[Tensor, "B Hkv N D"], size: int) -> Float[Tensor, "B Hkv cells D"]:
    """Means of every `size` keys."""
    return keys.unflatten(2, (-1, size)).mean(dim=3)


def sampled_rows(
    q: Tensor, kv_heads: int, layout: Layout, group: int, rows: int
) -> tuple[Float[Tensor, "B Hkv S R D"], Int[Tensor, "B 1 S R 1"]]:
    """The sampled rows of a group by KV head, a quarter of them from each tile, and their
    positions; -1 for those of tiles without real rows."""
    share = q.shape[1] // kv_heads
    positions = spread_rows(layout, group, rows, share).flatten(2)
    place = positions + (layout.first - (layout.kv_len - layout.q_len))[:, None, None]
    place = place.clamp(0, layout.q_len - 1).repeat(1, kv_heads, 1)[..., None]
    own = q.gather(2, place.expand(-1, -1, -1, q.shape[3])).float()
    return own.unflatten(1, (kv_heads, share)), positions[:, None, ..., None]


def row_scores(
    rows: Tensor, keys: Tensor, positions: Tensor, size: int, scale: float, softcap: float
) -> Float[Tensor, "B Hkv S R n"]:
    """Scores of cells of `size` keys, from the row of their first key on; -inf before."""
    scores = softcapped(rows @ keys[:, :, None].transpose(3, 4) * scale, softcap)
    begin = torch.arange(scores.shape[-1], device=scores.device) * size
    return scores.masked_fill(begin > positions, -math.inf)


def mean_sums(
    scores: Float[Tensor, "B Hkv S R N"],
    means: Float[Tensor, "B Hkv S R blocks"],
    near: Bool[Tensor, "B 1 1 blocks"],
) -> Float[Tensor, "B Hkv S R 1"]:
    """The log-sum-exp of each row: of every key of the near blocks, where its mass most often is;
    of another block as if all its keys were like their mean."""
    exact = scores.masked_fill(~near.repeat_interleave(BLOCK, -1)[:, :, None], -math.inf)
    mean = (means + math.log(BLOCK)).masked_fill(near[:, :, None], -math.inf)
    return torch.cat([exact, mean], dim=-1).logsumexp(dim=-1, keepdim=True)


def row_sums(
    scores: Float[Tensor, "B Hkv S R N"],
    means: Float[Tensor, "B Hkv S R blocks"],
    near: Bool[Tensor, "B 1 1 blocks"],
) -> Float[Tensor, "B Hkv S R 1"]:
    """As `mean_sums`; but a row that looks something up far away has a larger sum: where the best
    keys of far blocks, of their ends and between them, more than double it, they count too."""
    sums = mean_sums(scores, means, near)
    parts = scores.unflatten(-1, (-1, BLOCK)).split([EDGE, BLOCK - 2 * EDGE, EDGE], dim=-1)
    best = torch.stack([part.amax(dim=-1) for part in parts], dim=-1)
    best = best.masked_fill(near[:, :, None, ..., None], -math.inf).flatten(-2)
    more = torch.cat([sums, best], dim=-1).logsumexp(dim=-1, keepdim=True)
    return torch.where(more - sums > math.log(2), more, sums)


def candidates(
    cells: Float[Tensor, "B Hkv S R cells"],
    sums: Float[Tensor, "B Hkv S R 1"],
    near: Bool[Tensor, "B 1 1 blocks"],
    seen: Bool[Tensor, "B 1 1 blocks"],
    count: int,
) -> Bool[Tensor, "B Hkv 1 blocks"]:
    """The blocks of a group that are rated by their keys: the near ones, and those whose best mean
    has the largest share of a row. Against sums without best keys, so that rows which look
    something up count more and not less."""
    shares = (cells - sums).nan_to_num(nan=-math.inf).unflatten(-1, (near.shape[-1], -1))
    return choose(
        shares.amax(dim=(2, 3, 5))[:, :, None], near, seen, -math.inf, count - LEAST_WIDER
    )


def rate_blocks(
    scores: Float[Tensor, "B Hkv S R N"], sums: Float[Tensor, "B Hkv S R 1"]
) -> Float[Tensor, "B Hkv tiles blocks"]:
    """The logarithm of the largest share of a row of each tile that a key of a block has, or one
    of the nearest keys of its neighbours."""
    shares = (scores - sums).nan_to_num(nan=-math.inf)
    best = shares.unflatten(3, (GROUP_TILES, -1)).amax(dim=(2, 4))
    ends = best.unflatten(-1, (-1, BLOCK // EDGE, EDGE)).amax(dim=-1)
    ratings = ends.amax(dim=-1)
    beyond = torch.full_like(ratings[..., :1], -math.inf)
    before = torch.cat([beyond, ends[..., :-1, -1]], dim=-1)
    behind = torch.cat([ends[..., 1:, 0], beyond], dim=-1)
    return torch.maximum(ratings, torch.maximum(before, behind))


def choose(ratings: Tensor, always: Tensor, seen: Tensor, least: float, most: int) -> Tensor:
    """The best rated blocks, at most so many and none rated below `least`, and those always."""
    ratings = ratings.masked_fill(always | ~seen, -math.inf)
    order = ratings.sort(dim=-1, descending=True, stable=True).indices
    best = torch.arange(ratings.shape[-1], device=ratings.device) < most
    best = torch.zeros_like(ratings, dtype=torch.bool).scatter(-1, order, best.expand_as(order))
    return (always | (best & (ratings >= least) & (ratings > -math.inf))) & seen


def tile_lists(flags: Bool[Tensor, "B Hkv G tiles blocks"], layout: Layout, room: int) -> Ragged:
    """Lists of the chunk's tiles from the flags of its groups' tiles."""
    flags = flags.flatten(2, 3)
    first = layout.first_tile
    slot = (first % GROUP_TILES)[:, None] + torch.arange(layout.chunk_tiles, device=flags.device)
    slot_ = slot.clamp(max=flags.shape[2] - 1)[:, None, :, None]
    flags = flags.gather(2, slot_.expand(-1, flags.shape[1], -1, flags.shape[3]))
    own = first[:, None] + torch.arange(layout.chunk_tiles, device=flags.device)
    there = own * TILE < (layout.stop - layout.first)[:, None]
    return _entries(flags & there[:, None, :, None], room)


def _entries(flags: Bool[Tensor, "B Hkv lists blocks"], room: int) -> Ragged:
    block = torch.arange(flags.shape[3], device=flags.device)
    rows = torch.where(flags, block, flags.shape[3]).sort(dim=-1).values[..., :room]
    rows = torch.nn.functional.pad(rows, (0, room - rows.shape[3]))
    return Ragged.from_rows(whole_entries(rows), flags.sum(dim=-1))
