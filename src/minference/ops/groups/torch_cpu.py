"""The grouped estimate in vectorised torch: one group of all KV heads at a time, candidates' keys
gathered, nothing the size of rows x keys."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minference.index import BLOCK, TILE, Ragged
from minference.ops.build import Layout
from minference.ops.groups.plan import GROUP_TILES, Plan, group_count, list_room

_SIZE = GROUP_TILES * TILE


def grouped_blocks(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B Hkv N D"],
    layout: Layout,
    plan: Plan,
    *,
    scale: float,
    softcap: float = 0.0,
) -> tuple[Ragged, Ragged]:
    """Block lists of every query tile, and candidates of every group; one list for the query heads
    of a KV head. Reads the layout on the host."""
    room = list_room(layout, plan.cap)
    shape = (layout.batch, k.shape[1], layout.chunk_tiles)
    values = torch.zeros(*shape, room, dtype=torch.int32, device=q.device)
    count = torch.zeros(shape, dtype=torch.int32, device=q.device)
    found = values.new_zeros(*shape[:2], group_count(layout), room)
    number = count.new_zeros(found.shape[:3])
    for b in range(layout.batch):
        first, stop = int(layout.first[b]), int(layout.stop[b])
        begin = layout.kv_len - layout.q_len - first
        low, real = max(begin, 0), stop - first
        keys = k[b, :, first:stop].float()
        cells, wide = (_mean_cells(keys, cell) for cell in (plan.cell, plan.sum_cell))
        for start in range(low // _SIZE * _SIZE, real, _SIZE):
            span = range(max(start, low), min(start + _SIZE, real))
            at = torch.tensor(_spread(span, plan.rows), device=q.device)
            rows = q[b, :, at - begin].float().unflatten(0, (k.shape[1], -1)) * scale
            ratings = _ratings(rows, cells, wide, at, span, plan, softcap)
            places = _candidates(ratings, span, plan)
            group = start // _SIZE - low // _SIZE
            found[b, :, group, : places.shape[1]] = places.to(torch.int32) * 4 + 3
            number[b, :, group] = places.shape[1]
            masses = _masses(rows, keys, at, places, softcap)
            flags = _keep(masses, places, start // TILE, plan.mass)
            for part in range(GROUP_TILES):
                slot = start // TILE + part - low // TILE
                if slot >= 0 and start + part * TILE < span.stop:
                    _write(values[b, :, slot], count[b, :, slot], flags[:, part], places)
    begin = torch.arange(count.numel(), device=q.device).view(shape) * room
    return Ragged(values.view(-1), begin, count), Ragged.from_rows(found, number)


def _spread(span: range, rows: int) -> list[int]:
    return [span.start + (2 * i + 1) * len(span) // (2 * rows) for i in range(rows)]


def _mean_cells(keys: Float[Tensor, "Hkv n D"], cell: int) -> Float[Tensor, "Hkv cells D"]:
    whole = keys.shape[1] // cell * cell
    means = keys[:, :whole].unflatten(1, (-1, cell)).mean(dim=2)
    if whole == keys.shape[1]:
        return means
    return torch.cat([means, keys[:, whole:].mean(dim=1, keepdim=True)], dim=1)


def _scores(
    rows: Float[Tensor, "Hkv S R D"], keys: Float[Tensor, "Hkv n D"], softcap: float
) -> Float[Tensor, "Hkv S R n"]:
    scores = (rows.flatten(1, 2) @ keys.transpose(1, 2)).unflatten(1, rows.shape[1:3])
    return scores.div_(softcap).tanh_().mul_(softcap) if softcap else scores


def _seen_scores(
    rows: Tensor, cells: Tensor, at: Tensor, span: range, cell: int, softcap: float
) -> Float[Tensor, "Hkv S R cells"]:
    """Scores of the cells that start before the group's end; -inf before they start."""
    seen = cells[:, : -(-span.stop // cell)]
    scores = _scores(rows, seen, softcap)
    near = span.start // cell  # every row sees the cells before
    begin = torch.arange(near, seen.shape[1], device=at.device) * cell
    scores[..., near:].masked_fill_(begin > at[:, None], -torch.inf)
    return scores


def _ratings(
    rows: Float[Tensor, "Hkv S R D"],
    cells: Float[Tensor, "Hkv cells D"],
    wide: Float[Tensor, "Hkv wide D"],
    at: Int[Tensor, " R"],
    span: range,
    plan: Plan,
    softcap: float,
) -> Float[Tensor, "Hkv blocks"]:
    """The logarithm of the largest share of a row that a cell of each block has."""
    scores = _seen_scores(rows, wide, at, span, plan.sum_cell, softcap)
    total = _by_block(scores, plan.sum_cell).logsumexp(dim=-1, keepdim=True)
    if plan.sum_cell != plan.cell:
        scores = _seen_scores(rows, cells, at, span, plan.cell, softcap)
    best = scores.sub_(total + math.log(BLOCK // plan.cell)).amax(dim=(1, 2))
    return _by_block(best, plan.cell)


def _by_block(scores: Float[Tensor, "*rows cells"], cell: int) -> Float[Tensor, "*rows blocks"]:
    """The largest score of each block's cells."""
    per = BLOCK // cell
    whole = torch.nn.functional.pad(scores, (0, -scores.shape[-1] % per), value=-torch.inf)
    return whole.unflatten(-1, (-1, per)).amax(dim=-1)


def _candidates(
    ratings: Float[Tensor, "Hkv blocks"], span: range, plan: Plan
) -> Int[Tensor, "Hkv c"]:
    """The best rated blocks of each KV head, ascending; block 0 and the local ones always."""
    ratings[:, 0] = torch.inf
    ratings[:, max(span.start // TILE * 2 - 1, 0) :] = torch.inf
    blocks = ratings.shape[1]
    limit = min(plan.floor + int(blocks * plan.share), plan.cap, blocks)
    order = ratings.sort(dim=-1, descending=True, stable=True).indices[:, :limit]
    return order.sort(dim=-1).values


def _masses(
    rows: Float[Tensor, "Hkv S R D"],
    keys: Float[Tensor, "Hkv n D"],
    at: Int[Tensor, " R"],
    places: Int[Tensor, "Hkv c"],
    softcap: float,
) -> Float[Tensor, "Hkv tiles c"]:
    """The rows' attention over the keys of their KV head's candidates, by tile and candidate."""
    key = (places[..., None] * BLOCK + torch.arange(BLOCK, device=at.device)).flatten(1)
    there = key.clamp(max=keys.shape[1] - 1)[..., None].expand(-1, -1, keys.shape[2])
    scores = _scores(rows, keys.gather(1, there), softcap)
    doubtful = int((places[:, :, None] * BLOCK + BLOCK > at.min()).any(dim=0).int().argmax())
    doubtful *= BLOCK
    late = key[:, None, None, doubtful:] > at[:, None]
    scores[..., doubtful:].masked_fill_(late, -torch.inf)
    weights = torch.softmax(scores, dim=-1, out=scores).unflatten(-1, (-1, BLOCK)).sum(dim=-1)
    weights = weights.sum(dim=1)
    part = at // TILE % GROUP_TILES
    masses = weights.new_zeros(len(keys), GROUP_TILES, places.shape[1])
    return masses.index_add_(1, part, weights)


def _keep(
    masses: Float[Tensor, "Hkv tiles c"], places: Int[Tensor, "Hkv c"], tile: int, share: float
) -> Bool[Tensor, "Hkv tiles c"]:
    """The entries with the largest mass at their block or offset that hold the share, the local
    ones and block 0."""
    part = torch.arange(GROUP_TILES, device=masses.device)[:, None]
    slot = (places[:, None] - 2 * part + 2 * GROUP_TILES).flatten(1)
    by_offset = masses.new_zeros(len(masses), 2 * tile + 4 * GROUP_TILES)
    by_offset = by_offset.scatter_add_(1, slot, masses.flatten(1)).gather(1, slot)
    score = torch.maximum(by_offset.view_as(masses), masses.sum(dim=1, keepdim=True)).flatten(1)
    ordered, order = score.sort(dim=-1, descending=True, stable=True)
    before = masses.flatten(1).gather(1, order).cumsum(dim=-1)
    enough = before >= share * masses.sum(dim=(1, 2))[:, None]
    edge = torch.where(enough, ordered, 0.0).amax(dim=-1, keepdim=True)
    kept = ((score >= edge) & (score > 0)).view_as(masses)
    own, block = 2 * (tile + part), places[:, None]
    return (kept | (block == 0) | (block >= own - 1)) & (block <= own + 1)


def _write(values: Tensor, count: Tensor, flags: Tensor, places: Tensor) -> None:
    """Write the flagged places of each KV head as entries of its list."""
    past = int(places.max()) + 1
    ordered = torch.where(flags, places, past).sort(dim=-1).values
    values[:, : ordered.shape[1]] = (ordered * 4 + 3).to(torch.int32)
    count[:] = flags.sum(dim=-1)
