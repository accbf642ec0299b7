"""The grouped estimate in vectorised torch: one group of all KV heads at a time, some keys at a
time, nothing the size of rows x keys."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minference.index import BLOCK, TILE, Ragged, whole_entries
from minference.ops.build import Layout
from minference.ops.groups.plan import (
    ALWAYS,
    EDGE,
    GROUP,
    GROUP_TILES,
    LEAST_WIDER,
    WIDER,
    Plan,
    few_rated,
    group_count,
    list_room,
    row_places,
)
from minference.ops.scores import softcap_

STEP = 16 * BLOCK
"""Keys that are scored at once: few enough for their scores to stay in the cache."""


def read_keys(
    k: Float[Tensor, "B Hkv N D"], layout: Layout, plan: Plan, softcap: float
) -> Float[Tensor, "B Hkv N D"]:
    """The keys as the estimate takes them."""
    return k


def grouped_blocks(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B Hkv N D"],
    layout: Layout,
    plan: Plan,
    *,
    scale: float,
    softcap: float = 0.0,
) -> tuple[Ragged, Ragged]:
    """Block lists of every query tile, and wider ones of every group; one list for the query heads
    of a KV head. Reads the layout on the host."""
    room, wide_room = (list_room(layout, n) for n in (plan.most + ALWAYS, plan.wider))
    shape = (layout.batch, k.shape[1], layout.chunk_tiles)
    values = torch.zeros(*shape, room, dtype=torch.int32, device=q.device)
    count = torch.zeros(shape, dtype=torch.int32, device=q.device)
    found = values.new_zeros(*shape[:2], group_count(layout), wide_room)
    number = count.new_zeros(found.shape[:3])
    places = row_places(plan.rows // GROUP_TILES, q.shape[1] // k.shape[1]).to(q.device)
    least = math.log(1 - plan.mass) if plan.mass < 1 else -math.inf
    most = plan.candidates - LEAST_WIDER if few_rated(plan, layout) else layout.kv_len
    for b in range(layout.batch):
        first, stop = int(layout.first[b]), int(layout.stop[b])
        begin = layout.kv_len - layout.q_len - first
        low, real = max(begin, 0), stop - first
        keys = k[b, :, first:stop].float()
        blocks = keys[:, : real // BLOCK * BLOCK].unflatten(1, (-1, BLOCK))
        means, cells = blocks.mean(dim=2), blocks.unflatten(2, (-1, plan.cell)).mean(dim=3)
        for start in range(low // GROUP * GROUP, real, GROUP):
            span = range(max(start, low), min(start + GROUP, real))
            if not span:
                continue
            at = _positions(span, places)
            place = (at - begin).clamp(min=0).repeat(k.shape[1], 1)[..., None]
            rows = q[b].gather(1, place.expand(-1, -1, q.shape[3])).float()
            rows = rows.unflatten(0, (k.shape[1], -1)) * scale
            near = max(span.start // TILE * 2 - 1, 0)
            seen = keys[:, : span.stop]
            sums = _mean_sums(rows, seen, means, at, near, softcap)
            far = _far_blocks(rows, cells, sums, at, near, most, softcap)
            planes = _best_scores(rows, seen, far, at, near, softcap)
            sums = _with_best(sums, planes[..., 1 : far.shape[1]], at)
            ratings = _ratings(planes, far, sums, near)
            tile, block = start // TILE, torch.arange(ratings.shape[2], device=q.device)
            wider = _choose(
                ratings.amax(dim=1, keepdim=True),
                (block == 0) | (block >= near),
                least + math.log(WIDER),
                plan.wider - LEAST_WIDER,
            )
            group = start // GROUP - low // GROUP
            _write(found[b, :, group], number[b, :, group], wider[:, 0])
            for part in range(GROUP_TILES):
                slot, own = tile + part - low // TILE, 2 * (tile + part)
                if slot < 0 or start + part * TILE >= span.stop:
                    continue
                always = ((block == 0) | (block >= own - 1))[: own + 2]
                some = _choose(ratings[:, part, : own + 2], always, least, plan.most)
                _write(values[b, :, slot], count[b, :, slot], some)
    begin = torch.arange(count.numel(), device=q.device).view(shape) * room
    return Ragged(values.view(-1), begin, count), Ragged.from_rows(found, number)


def _positions(span: range, places: Int[Tensor, "S rows"]) -> Int[Tensor, "S R"]:
    """The sampled rows of each query head of a KV head, tile by tile; -1 in tiles without any."""
    start = span.start // GROUP * GROUP
    parts = []
    for tile in range(start, start + GROUP, TILE):
        low, stop = max(tile, span.start), min(tile + TILE, span.stop)
        own = low + places * (stop - low - 1) // (TILE - 1)
        parts.append(own if low < stop else torch.full_like(places, -1))
    return torch.cat(parts, dim=1)


def _scores(
    rows: Float[Tensor, "Hkv S R D"], keys: Float[Tensor, "Hkv n D"], softcap: float
) -> Float[Tensor, "Hkv S R n"]:
    scores = (rows.flatten(1, 2) @ keys.transpose(1, 2)).unflatten(1, rows.shape[1:3])
    return softcap_(scores, softcap)


def _seen_scores(
    rows: Tensor, keys: Tensor, at: Tensor, begin: int, softcap: float
) -> Float[Tensor, "Hkv S R n"]:
    """Scores of keys from position `begin` on; -inf for those behind the row."""
    scores = _scores(rows, keys, softcap)
    if begin + keys.shape[1] > int(at.min()):
        key = torch.arange(begin, begin + keys.shape[1], device=keys.device)
        scores.masked_fill_(key > at[..., None], -torch.inf)
    return scores


def _best_scores(
    rows: Float[Tensor, "Hkv S R D"],
    keys: Float[Tensor, "Hkv n D"],
    far: Int[Tensor, "Hkv n_far"],
    at: Int[Tensor, "S R"],
    near: int,
    softcap: float,
) -> Float[Tensor, "3 Hkv S R blocks"]:
    """The best score of each block between its ends, of its first keys and of its last ones: of
    the blocks `far`, then of those from `near` on."""
    planes = []
    for some in far.split(STEP // BLOCK, dim=1):
        place = (some[..., None] * BLOCK + torch.arange(BLOCK, device=keys.device)).flatten(1)
        listed = keys.gather(1, place[..., None].expand(-1, -1, keys.shape[2]))
        planes.append(_planes(_scores(rows, listed, softcap)))
    scores = _seen_scores(rows, keys[:, near * BLOCK :], at, near * BLOCK, softcap)
    missing = -scores.shape[3] % BLOCK
    if missing:
        scores = torch.nn.functional.pad(scores, (0, missing), value=-torch.inf)
    planes.append(_planes(scores))
    return torch.cat(planes, dim=4).masked_fill_((at < 0)[..., None], -torch.inf)


def _planes(scores: Float[Tensor, "Hkv S R n"]) -> Float[Tensor, "3 Hkv S R blocks"]:
    keys = scores.unflatten(3, (-1, BLOCK))
    parts = keys[..., EDGE:-EDGE], keys[..., :EDGE], keys[..., -EDGE:]
    return torch.stack([part.amax(dim=4) for part in parts])


def _mean_sums(
    rows: Tensor, keys: Tensor, means: Tensor, at: Tensor, near: int, softcap: float
) -> Float[Tensor, "Hkv S R"]:
    """The log-sum-exp of each row: exact over block 0 and the blocks from `near` on, over the
    others by their means."""
    edge = max(near, 1) * BLOCK
    parts = [_seen_scores(rows, keys[:, :BLOCK], at, 0, softcap)]
    if edge < keys.shape[1]:
        parts.append(_seen_scores(rows, keys[:, edge:], at, edge, softcap))
    if edge > BLOCK:
        far = _scores(rows, means[:, 1 : edge // BLOCK], softcap)
        parts.append(far + math.log(BLOCK))
    return torch.cat(parts, dim=-1).logsumexp(dim=-1)


def _far_blocks(
    rows: Tensor, cells: Tensor, sums: Tensor, at: Tensor, near: int, most: int, softcap: float
) -> Int[Tensor, "Hkv n_far"]:
    """Block 0 and the blocks before `near` that are rated, ascending: at most so many, those whose
    best cells have the largest shares."""
    device = rows.device
    if near - 1 <= most:
        return torch.arange(near, device=device).expand(rows.shape[0], -1)
    best = _best_cells(rows, cells, near, softcap).sub_(sums[..., None])
    best = best.masked_fill_((at < 0)[..., None], -torch.inf).amax(dim=(1, 2))
    order = best.sort(dim=-1, descending=True, stable=True).indices[:, :most]
    first = torch.zeros(rows.shape[0], 1, dtype=torch.int64, device=device)
    return torch.cat([first, order.sort(dim=-1).values + 1], dim=1)


def _best_cells(
    rows: Float[Tensor, "Hkv S R D"],
    cells: Float[Tensor, "Hkv blocks size D"],
    near: int,
    softcap: float,
) -> Float[Tensor, "Hkv S R far"]:
    """The best score of a cell of each block between block 0 and `near`."""
    size, best = cells.shape[2], []
    for some in cells[:, 1:near].split(STEP // size, dim=1):
        scores = _scores(rows, some.flatten(1, 2), softcap)
        best.append(scores.unflatten(-1, (-1, size)).amax(dim=-1))
    return torch.cat(best, dim=-1)


def _with_best(
    sums: Float[Tensor, "Hkv S R"], planes: Float[Tensor, "3 Hkv S R n_far"], at: Tensor
) -> Float[Tensor, "Hkv S R 1"]:
    """The sums, with the best keys of far blocks where these more than double them."""
    best = planes.movedim(0, -1).flatten(-2)
    more = torch.cat([sums[..., None], best], dim=-1).logsumexp(dim=-1)
    sums = torch.where(more - sums > math.log(2), more, sums)
    return sums.masked_fill(at < 0, 0.0)[..., None]


def _ratings(
    planes: Float[Tensor, "3 Hkv S R n"],
    far: Int[Tensor, "Hkv n_far"],
    sums: Float[Tensor, "Hkv S R 1"],
    near: int,
) -> Float[Tensor, "Hkv tiles blocks"]:
    """The largest logarithm of a share that a row of each tile gives to a key of a block, or to
    one of its neighbours' nearest; planes as of `_best_scores`."""
    some = (planes - sums).unflatten(3, (GROUP_TILES, -1)).amax(dim=(2, 4))
    count = far.shape[1]
    planes = some.new_full((*some.shape[:3], near + some.shape[3] - count), -torch.inf)
    planes[..., near:] = some[..., count:]
    at = far[None, :, None].expand(*some.shape[:3], -1)
    planes.scatter_(3, at, some[..., :count])
    first, last = planes[1:]
    ratings = planes.amax(dim=0)
    ratings[..., 1:] = torch.maximum(ratings[..., 1:], last[..., :-1])
    ratings[..., :-1] = torch.maximum(ratings[..., :-1], first[..., 1:])
    return ratings


def _choose(
    ratings: Float[Tensor, "*lists blocks"],
    always: Bool[Tensor, " blocks"],
    least: float,
    most: int,
) -> Bool[Tensor, "*lists blocks"]:
    """The best rated blocks, at most so many and none rated below `least`, and those always."""
    ratings = ratings.masked_fill(always, -torch.inf)
    some = ratings.sort(dim=-1, descending=True, stable=True)
    taken = (some.values >= least) & (some.values > -torch.inf)
    taken[..., most:] = False
    return torch.zeros_like(taken).scatter_(-1, some.indices, taken) | always


def _write(values: Tensor, count: Tensor, flags: Bool[Tensor, "Hkv blocks"]) -> None:
    """Write the flagged blocks of each KV head as entries of its list."""
    block = torch.arange(flags.shape[1], device=flags.device)
    ordered = torch.where(flags, block, flags.shape[1]).sort(dim=-1).values
    room = min(values.shape[1], flags.shape[1])
    values[:, :room] = whole_entries(ordered[:, :room])
    count[:] = flags.sum(dim=-1)
