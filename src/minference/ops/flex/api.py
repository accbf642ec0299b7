"""Key tiles by lines or by pooled scores, whichever the head's last queries ask for (FlexPrefill,
arXiv 2502.20766), all heads at once."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minference.index import TILE, Ragged
from minference.ops.build import Layout
from minference.ops.checks import check_qkv
from minference.ops.estimate.api import last_query_lines
from minference.ops.scores import softcapped
from minference.ops.tiles.lists import (
    fewest,
    key_tiles,
    keys_by_position,
    queries_of_tiles,
    tile_lists,
    tile_numbers,
    unfilled_lists,
)

CHUNK = 1 << 26
"""Pairs of a query tile and a key tile held at a time."""


def flex_tiles(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B Hkv N D"],
    layout: Layout,
    *,
    gamma: float,
    tau: float,
    least: int,
    scale: float,
    softcap: float = 0.0,
) -> Ragged:
    """Key tiles of every query tile.

    Args:
        q: queries; row r is key position N - L + r of the buffer.
        k: keys.
        layout: which places hold real tokens.
        gamma: share of the attention that lines, or pooled blocks, hold.
        tau: a head is query-aware below that divergence.
        least: fewest tiles of columns, and of slashes, of every head.
        scale: factor of the scores.
        softcap: as in `sparse_attention`.

    Returns:
        Block entries for groups of one tile, from the chunk's first tile on.
    """
    check_qkv(q, k)
    numbers = (layout.first, layout.stop, gamma, tau, least, scale, softcap)
    return Ragged(*_flex_tiles(q, k, *numbers))


@torch.library.custom_op("minference::flex_tiles", mutates_args=())
def _flex_tiles(
    q: Tensor,
    k: Tensor,
    first: Tensor,
    stop: Tensor,
    gamma: float,
    tau: float,
    least: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    layout = Layout(first, stop, q.shape[2], k.shape[2])
    weights = last_query_lines(q, k, first, stop, scale=scale, softcap=softcap, rows=TILE)
    means = _key_means(k, layout)
    aware = _divergence(_last_pooled(q, means, layout, scale, softcap), weights.columns) < tau
    columns, slashes = (_line_tiles(x, aware, gamma, least) for x in weights)
    step = max(1, CHUNK // (len(q) * layout.chunk_tiles * key_tiles(layout)))
    lists = []
    for begin in range(0, q.shape[1], step):
        own = slice(begin, begin + step)
        flags = _spread(columns[:, own], slashes[:, own], layout)
        if bool(aware[:, own].any()):
            kv_head = torch.arange(q.shape[1], device=q.device)[own] * k.shape[1] // q.shape[1]
            scores = _tile_scores(q[:, own], means[:, kv_head], layout, scale, softcap)
            flags |= _best_pairs(scores, gamma) & aware[:, own, None, None]
        lists.append(tile_lists([flags]))
    return _joined(lists)


@_flex_tiles.register_fake
def _(q, k, first, stop, gamma, tau, least, scale, softcap):  # noqa: ANN001, ANN202
    return unfilled_lists(q, k, first, stop)


def _joined(lists: list[Ragged]) -> tuple[Tensor, Tensor, Tensor]:
    """Lists of runs of heads as those of all heads."""
    starts, total = [], 0
    for part in lists:
        starts.append(part.start + total)
        total += len(part.values)
    values = torch.cat([part.values for part in lists])
    return values, torch.cat(starts, dim=1), torch.cat([part.count for part in lists], dim=1)


def _key_means(k: Tensor, layout: Layout) -> Float[Tensor, "B Hkv keys D"]:
    keys, real = keys_by_position(k, layout)
    return _means(keys, real)


def _means(
    rows: Float[Tensor, "B H R D"], real: Bool[Tensor, "B R"]
) -> Float[Tensor, "B H tiles D"]:
    """Mean of each tile's real rows; the others are zeros."""
    count = real.unflatten(1, (-1, TILE)).sum(dim=-1).clamp(min=1)
    sums = rows.unflatten(2, (-1, TILE)).sum(dim=3, dtype=torch.float32)
    return sums / count[:, None, :, None]


def _last_pooled(
    q: Tensor, means: Tensor, layout: Layout, scale: float, softcap: float
) -> Float[Tensor, "B H keys"]:
    """Softmax of the scores between the mean of the last 128 queries and the mean of each key
    tile."""
    batch, heads, q_len, dim = q.shape
    place = layout.stop[:, None] - TILE + torch.arange(TILE, device=q.device)
    row = place - (layout.kv_len - q_len)
    real = (row >= 0) & (place >= layout.first[:, None])
    wide = row.clamp(0, q_len - 1)[:, None, :, None].expand(-1, heads, -1, dim)
    last = q.gather(2, wide).masked_fill_(~real[:, None, :, None], 0)
    last = _means(last, real).view(batch, means.shape[1], -1, dim)
    scores = softcapped(last @ means.transpose(2, 3) * scale, softcap).view(batch, heads, -1)
    number = torch.arange(means.shape[2], device=q.device)
    future = number * TILE >= (layout.stop - layout.first)[:, None]
    return scores.masked_fill(future[:, None], -torch.inf).softmax(dim=-1)


def _tile_sums(weights: Float[Tensor, "B H N"]) -> Float[Tensor, "B H keys"]:
    masses = weights.clamp(min=0)
    masses = torch.nn.functional.pad(masses, (0, -masses.shape[-1] % TILE))
    return masses.unflatten(-1, (-1, TILE)).sum(dim=-1)


def _divergence(
    pooled: Float[Tensor, "B H keys"], columns: Float[Tensor, "B H N"]
) -> Float[Tensor, "B H"]:
    """Square root of the Jensen-Shannon divergence between the pooled and the true weights."""
    true = _tile_sums(columns)
    true = true / true.sum(dim=-1, keepdim=True)
    middle = (pooled + true) / 2
    both = torch.stack([pooled, true])
    parts = (torch.xlogy(both, both) - torch.xlogy(both, middle)).sum(dim=-1)
    return parts.mean(dim=0).clamp(min=0).sqrt()


def _line_tiles(
    weights: Float[Tensor, "B H N"], aware: Bool[Tensor, "B H"], gamma: float, least: int
) -> Bool[Tensor, "B H keys"]:
    """The best tiles of columns or of distances, one more than whole tiles of the lines that hold
    the share `gamma`; tile 0 always, and `least` in query-aware heads."""
    masses = weights.clamp(min=0)
    total = masses.sum(dim=-1, keepdim=True, dtype=torch.float64)
    lines = fewest(masses, gamma * total).sum(dim=-1)
    budget = torch.where(aware, least, (lines // TILE + 1).clamp(min=least))
    sums = _tile_sums(weights)
    sums[..., 0] = torch.inf
    order = sums.sort(dim=-1, descending=True, stable=True).indices
    kept = torch.arange(sums.shape[-1], device=sums.device) < budget[..., None]
    return torch.zeros_like(kept).scatter_(-1, order, kept)


def _spread(
    columns: Bool[Tensor, "B H keys"], slashes: Bool[Tensor, "B H keys"], layout: Layout
) -> Bool[Tensor, "B H tiles keys"]:
    """Key tiles of every query tile on the chosen columns and slashes, the causal ones."""
    distance = _tile_distance(layout)
    wide = distance.clamp(min=0).flatten(1)[:, None].expand(-1, columns.shape[1], -1)
    # distances of tiles beyond the prompt's end do not occur in real rows
    on_slash = slashes.gather(2, wide.clamp(max=slashes.shape[2] - 1))
    on_slash = on_slash.unflatten(2, distance.shape[1:])
    return (on_slash | columns[:, :, None]) & (distance >= 0)[:, None]


def _tile_distance(layout: Layout) -> Int[Tensor, "B tiles keys"]:
    tiles = tile_numbers(layout, range(layout.chunk_tiles))
    return tiles[..., None] - torch.arange(key_tiles(layout), device=layout.device)


def _tile_scores(
    q: Float[Tensor, "B H L D"],
    means: Float[Tensor, "B H keys D"],
    layout: Layout,
    scale: float,
    softcap: float,
) -> Float[Tensor, "B H tiles keys"]:
    """Causal softmax weights between means of query tiles and of key tiles; zeros for tiles
    without queries."""
    rows, real = queries_of_tiles(q, layout, range(layout.chunk_tiles))
    scores = softcapped(_means(rows, real) @ means.transpose(2, 3) * scale, softcap)
    scores = scores.masked_fill((_tile_distance(layout) < 0)[:, None], -torch.inf)
    held = real.unflatten(1, (-1, TILE)).any(dim=-1)
    return scores.softmax(dim=-1).masked_fill_(~held[:, None, :, None], 0)


def _best_pairs(
    weights: Float[Tensor, "B H tiles keys"], gamma: float
) -> Bool[Tensor, "B H tiles keys"]:
    """The fewest pairs of a head that hold the share `gamma` of all its weights."""
    flat = weights.flatten(2)
    total = flat.sum(dim=-1, keepdim=True, dtype=torch.float64)
    return fewest(flat, gamma * total).view(weights.shape)
