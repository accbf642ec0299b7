"""Which rating of blocks, which budget and what in place of the rest brings a tile's output nearest
to dense attention, on the shipped model's own q, k and v.

python benchmarks/grouped_choices.py --length 64k --out benchmarks/results/grouped_choices.jsonl

Shares are exact. The method's rule, blocks by the largest share of a sampled row in one key, says
how many blocks each tile keeps; other ratings keep as many of the tile, and budgets as many of all
tiles together. Errors are root mean squares over rows and heads, in units of the dense output's.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from captured import MODEL, captured
from torch import Tensor
from torch.nn.functional import max_pool1d, pad

from minference.bench.records import Recorder
from minference.index import BLOCK, TILE
from minference.index_samples import sample_keys, sample_stride
from minference.lengths import length_argument
from minference.methods import Grouped
from minference.ops.attention.samples import sample_weights
from minference.ops.build import Layout
from minference.ops.groups.plan import ALWAYS, EDGE, GROUP, GROUP_TILES, Plan, row_places
from minference.testing import layout_of

METHOD = Grouped()


class Tile:
    """A tile of queries of one KV head: exact attention, and that of the rows that are sampled.

    Attributes:
        number: its place in the prompt, in tiles.
        keys, values: those that its last row sees. [n, D]
        scores: of every row; -inf where it sees no key. [heads, TILE, n]
        full: dense attention. [heads, TILE, D]
        shares: what sampled rows of all heads give to each key. [R, n]
        outputs: dense attention of the sampled rows. [R, D]
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, number: int, plan: Plan) -> None:
        stop = (number + 1) * TILE
        self.number, self.keys, self.values = number, k[:stop].float(), v[:stop].float()
        scores = q[:, stop - TILE : stop].float() @ self.keys.T * q.shape[-1] ** -0.5
        place = torch.arange(stop, device=q.device)
        self.scores = scores.masked_fill(place > place[-TILE:, None], -torch.inf)
        weights = self.scores.softmax(dim=-1)
        self.full = weights @ self.values
        rows = row_places(plan.rows // GROUP_TILES, len(q)).to(q.device)[..., None]
        self.shares = weights.gather(1, rows.expand(-1, -1, stop)).flatten(0, 1)
        self.outputs = self.full.gather(1, rows.expand(-1, -1, v.shape[-1])).flatten(0, 1)
        block = torch.arange(stop // BLOCK, device=q.device)
        self.always = (block == 0) | (block >= len(block) - ALWAYS + 1)

    def by_block(self, of_keys: Tensor) -> Tensor:
        return of_keys.unflatten(-1, (-1, BLOCK))

    def order(self, rating: Tensor) -> Tensor:
        """Blocks by rating, the best first, without those that are always kept."""
        order = rating.masked_fill(self.always, -torch.inf).argsort(descending=True)
        return order[: int((~self.always).sum())]

    def kept(self, chosen: Tensor) -> Tensor:
        """Flags of the blocks that are chosen or always kept."""
        return self.always.clone().index_fill(0, chosen, True)

    def lacking(self, order: Tensor) -> Tensor:
        """Mean attention of the sampled rows outside of lists of the first 0, 1, ... blocks."""
        held = self.by_block(self.shares).sum(dim=-1).mean(dim=0)
        return 1 - held[self.always].sum() - pad(held[order].cumsum(0), (1, 0))

    def beyond_ends(self, of_keys: Tensor) -> Tensor:
        """The largest number of a block's keys and of the nearest ones of its neighbours."""
        return max_pool1d(of_keys[None], BLOCK + 2 * EDGE, BLOCK, padding=EDGE)[0]


def largest(tile: Tile) -> Tensor:
    return tile.beyond_ends(tile.shares.amax(dim=0))


def largest_of_blocks(tile: Tile) -> Tensor:
    return tile.by_block(tile.shares).sum(dim=-1).amax(dim=0)


def total(tile: Tile) -> Tensor:
    return tile.by_block(tile.shares.sum(dim=0)).sum(dim=-1)


def squares(tile: Tile) -> Tensor:
    return tile.by_block(tile.shares).sum(dim=-1).square().sum(dim=0)


def largest_by_value(tile: Tile) -> Tensor:
    """A share times how far its value is from the row's output."""
    distance = torch.cdist(tile.outputs, tile.values)
    return tile.beyond_ends((tile.shares * distance).amax(dim=0))


def change_of_output(tile: Tile) -> Tensor:
    """What leaving out a block alone would do to the outputs, squared."""
    shares = tile.by_block(tile.shares).transpose(0, 1)
    change = shares @ tile.values.unflatten(0, (-1, BLOCK))
    return (change - shares.sum(dim=-1, keepdim=True) * tile.outputs).square().sum(dim=(1, 2))


Rating = Callable[[Tile], Tensor]
RATINGS: dict[str, Rating] = {
    "largest share of a key": largest,
    "largest share of a block": largest_of_blocks,
    "sum of shares": total,
    "sum of squared shares of blocks": squares,
    "largest share of a key times its value's distance": largest_by_value,
    "change of the output": change_of_output,
}
BUILT = "largest share of a key"


def listed(tile: Tile, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp over the blocks that are kept."""
    scores = tile.scores.masked_fill(~kept.repeat_interleave(BLOCK), -torch.inf)
    return scores.softmax(dim=-1) @ tile.values, scores.logsumexp(dim=-1)


def joined(out: Tensor, weights: Tensor, values: Tensor) -> Tensor:
    """The output once values with weights in units of a row's list take part."""
    return (out + weights @ values) / (1 + weights.sum(dim=-1, keepdim=True))


def with_samples(tile: Tile, kept: Tensor, samples: int, share: float) -> Tensor:
    out, lse = listed(tile, kept)
    keys = sample_keys(tile.number, samples, out.device)
    stride = sample_stride(tile.number, samples)
    left_out = ~kept[keys // BLOCK]
    weights = sample_weights(tile.scores[..., keys], lse, left_out, stride, share)
    return joined(out, weights, tile.values[keys])


def with_means(tile: Tile, q: Tensor, kept: Tensor) -> Tensor:
    """The mean key and value of each block left out count as often as it has keys."""
    out, lse = listed(tile, kept)
    keys, values = (
        x.unflatten(0, (-1, BLOCK))[~kept].mean(dim=1) for x in (tile.keys, tile.values)
    )
    rows = q[:, tile.number * TILE : (tile.number + 1) * TILE].float()
    scores = rows @ keys.T * q.shape[-1] ** -0.5 + math.log(BLOCK)
    return joined(out, (scores - lse[..., None]).exp(), values)


def tiles_of(length: int, groups: int) -> list[int]:
    """Tiles of so many groups, evenly spaced over the second half, the prompt's last among them."""
    last = length // GROUP - 1
    chosen = sorted({last - last * i // (2 * groups) for i in range(groups)})
    return [group * GROUP_TILES + t for group in chosen for t in range(GROUP_TILES)]


def plan_of(layout: Layout, layer: int, tile: int) -> Plan:
    is_last = (tile + 1) * TILE > layout.q_len - METHOD.last_rows(layout)
    return METHOD.last_plan(layout, layer) if is_last else METHOD.plan(layout, layer)


def budgets(lacking: list[Tensor], total: int) -> list[int]:
    """Blocks of each tile so that all lack about the same, `total` together."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        if sum(int((x > middle).sum()) for x in lacking) > total:
            low = middle
        else:
            high = middle
    return [min(int((x > high).sum()), len(x) - 1) for x in lacking]


def errors(q: Tensor, k: Tensor, v: Tensor, layer: int, groups: int) -> Iterator[dict[str, object]]:
    """A record of each variant of a layer. q [H, N, D], k and v [Hkv, N, D]."""
    layout = layout_of(q[None], k[None])
    numbers, heads = tiles_of(q.shape[1], groups), q.unflatten(0, (k.shape[0], -1))
    where = [(head, tile) for head in range(len(k)) for tile in numbers]
    samples = METHOD.samples * ((2 if layer < METHOD.early else 1) if layer else METHOD.first_layer)
    share = METHOD.sample_share if layer else METHOD.first_share

    def tile_at(head: int, number: int) -> Tile:
        return Tile(heads[head], k[head], v[head], number, plan_of(layout, layer, number))

    counts, lacking = [], []
    for head, number in where:
        tile, plan = tile_at(head, number), plan_of(layout, layer, number)
        rating = largest(tile)
        order = tile.order(rating)
        counts.append(min(plan.most, int((rating[order] >= 1 - plan.mass).sum())))
        lacking.append(tile.lacking(order))
    shared = budgets(lacking, sum(counts))
    off: dict[tuple[str, str], Tensor] = defaultdict(lambda: torch.zeros((), device=q.device))
    norm = torch.zeros((), device=q.device)
    for (head, number), count, budget in zip(where, counts, shared, strict=True):
        tile = tile_at(head, number)
        norm += tile.full.square().sum()
        kept = {name: tile.kept(tile.order(rate(tile))[:count]) for name, rate in RATINGS.items()}
        kept[f"{BUILT}, tiles lack the same"] = tile.kept(tile.order(largest(tile))[:budget])
        for name, flags in kept.items():
            outs = {
                "nothing": listed(tile, flags)[0],
                "samples": with_samples(tile, flags, samples, share),
            }
            if name == BUILT:
                outs["means of blocks"] = with_means(tile, heads[head], flags)
            for rest, out in outs.items():
                off[name, rest] += (out - tile.full).square().sum()
    area = sum(number + 1 for _, number in where) * TILE // BLOCK
    listed_share = (sum(counts) + ALWAYS * len(where)) / area
    for (name, rest), error in off.items():
        yield {
            "rating": name,
            "rest": rest,
            "error": round(float((error / norm).sqrt()), 4),
            "density": round(listed_share, 4),
            "blocks": round(sum(counts) / len(counts), 1),
        }


def main() -> None:
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("--model", default=str(MODEL))
    given.add_argument("--tasks", nargs="+", default=["multivalue", "key_value"])
    given.add_argument("--length", type=length_argument, default=1 << 15)
    given.add_argument("--groups", type=int, default=6)
    given.add_argument("--out", type=Path, default=None)
    options = given.parse_args()
    recorder = Recorder(options.out)
    for task in options.tasks:
        for layer, (q, k, v) in enumerate(captured(options.length, task=task, model=options.model)):
            base = {"op": "grouped_choices", "task": task, "L": options.length, "layer": layer}
            for record in errors(q[0], k[0], v[0], layer, options.groups):
                recorder.write(base | {"groups": options.groups} | record)
                print(task, layer, *record.values(), flush=True)


if __name__ == "__main__":
    main()
