"""Times of this library's kernels on a device, and the weights of the cost model fitted to them.

A few seconds on a GPU: bands, columns and block lists of different sizes at two lengths, weighed by
least squares of the relative error; the index of each kind, and dense attention beside them.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minference.bench.timing import measure
from minference.head_patterns import default_patterns
from minference.index import BLOCK, TILE, Ragged, SparseIndex
from minference.methods.base import Context
from minference.methods.minference import MInference
from minference.ops.attention.api import sparse_attention
from minference.ops.attention.dense import dense_attention
from minference.ops.build import Layout, a_shape_index, assemble, band_offsets
from minference.ops.select.lists import columns_from_positions
from minference.patterns import AShape, BlockSparse, Dense, Pattern, VerticalSlash
from minference.search.cost import UNION, Timings, Work, prompt_work
from minference.testing import context_for, layout_of, random_qkv

LENGTHS = (16_384, 65_536)
INDEXED: tuple[Pattern, ...] = (AShape(128, 2048), VerticalSlash(1000, 2000), BlockSparse(40))
"""Patterns whose index is timed, one of each kind."""


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """What a layer's kernels are timed for."""

    heads: int
    kv_heads: int
    dim: int
    dtype: torch.dtype
    device: torch.device

    def tensors(self, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Random queries, keys and values of a prompt."""
        return random_qkv(
            self.heads, self.kv_heads, length, dim=self.dim, dtype=self.dtype, device=self.device
        )


def fit_timings(shape: LayerShape, lengths: Sequence[int] = LENGTHS, *, calls: int = 5) -> Timings:
    """Measures the kernels on the shape's device and fits a weight for each sort of work.

    Args:
        shape: of the layer.
        lengths: two prompts, in tokens.
        calls: times each call is timed; the median counts.
    """
    at = [_measured(shape, length, calls) for length in lengths]
    seconds = [x for own in at for x in own.seconds]
    weights, errors = fit_weights([work for own in at for work in own.works], seconds)
    kinds = [pattern.kind for pattern in INDEXED]
    return Timings(
        device=_name(shape.device),
        heads=shape.heads,
        **dict(zip(("launch", "tile", "block", "listed", "column"), weights, strict=True)),
        index={kind: _line(lengths, [own.index[kind] for own in at]) for kind in kinds},
        dense=at[-1].dense / (shape.heads * prompt_work(Dense(), lengths[-1]).blocks),
        residual=errors[len(errors) // 2],
        worst=errors[-1],
        measured=len(seconds),
    )


@dataclass(frozen=True)
class _Measured:
    """Seconds at one length: of the kernel by work, of the index by kind, of dense attention."""

    works: list[Work]
    seconds: list[float]
    index: dict[str, float]
    dense: float


def _measured(shape: LayerShape, length: int, calls: int) -> _Measured:
    q, k, v = shape.tensors(length)
    layout = layout_of(q[:, :1, :, :1], k[:, :1, :, :1])
    context = context_for(layout, shape.heads, dim=shape.dim)

    def timed(call: Callable[[], object]) -> float:
        return measure(call, shape.device, calls=calls).ms_p50 / 1e3

    def attend(index: SparseIndex) -> Callable[[], Tensor]:
        return lambda: sparse_attention(q, k, v, index)

    indices = list(_indices(layout, shape.heads))
    return _Measured(
        works=[work for work, _ in indices],
        seconds=[timed(attend(index)) for _, index in indices],
        index={p.kind: timed(_builder(p, q, k, context)) for p in INDEXED},
        dense=timed(lambda: dense_attention(q, k, v, scale=context.scale)),
    )


def fit_weights(works: Sequence[Work], seconds: Sequence[float]) -> tuple[list[float], list[float]]:
    """Weights of (a call, tiles, blocks, listed, columns), none below 0, of least squared relative
    error; and the relative errors, ascending."""
    rows = torch.tensor([(1.0, *work.counts()) for work in works], dtype=torch.float64)
    rows /= torch.tensor(seconds, dtype=torch.float64)[:, None]
    size = rows.norm(dim=0).clamp(min=1e-300)
    free = list(range(rows.shape[1]))
    wanted = torch.ones(len(rows), 1, dtype=torch.float64)
    while True:
        part = torch.linalg.lstsq(rows[:, free] / size[free], wanted, driver="gelsd").solution
        values = part[:, 0] / size[free]
        if bool((values >= 0).all()):
            break
        free.pop(int(part[:, 0].argmin()))
    weights = torch.zeros(rows.shape[1], dtype=torch.float64)
    weights[free] = values
    errors = (rows @ weights - 1).abs().sort().values
    return weights.tolist(), errors.tolist()


def _indices(layout: Layout, heads: int) -> Iterator[tuple[Work, SparseIndex]]:
    """Indices of known work: bands with and without columns, A-shapes, random block lists."""
    length, tiles = layout.kv_len, -(-layout.kv_len // TILE)
    for share, columns in ((16, 0), (8, 0), (3, 0), (2, 0), (16, 8), (16, 3), (8, 4), (3, 3)):
        blocks = max(3, 2 * tiles // share)
        own = _band(layout, heads, blocks, length // columns if columns else 0)
        yield own
    for sink, local in ((BLOCK, length // 8), (length // 8, length // 8)):
        index = a_shape_index(layout, (sink,) * heads, (local,) * heads)
        yield _times(prompt_work(AShape(sink, local), length), heads), index
    for share in (16, 6, 3):
        entries = _random_lists(layout, heads, max(2, 2 * tiles // share))
        counted = float(entries.count.sum())
        index = assemble(layout, heads, blocks=entries, group_tiles=1)
        yield Work(heads * tiles, 0, counted, 0), index


def _band(layout: Layout, heads: int, blocks: int, columns: int) -> tuple[Work, SparseIndex]:
    length = layout.kv_len
    local = (blocks - 2) * BLOCK
    places = torch.arange(columns, device=layout.device) * length // max(columns, 1)
    index = assemble(
        layout,
        heads,
        offsets=band_offsets(layout, (local,) * heads),
        columns=columns_from_positions(places.expand(1, heads, -1), length) if columns else None,
    )
    work = prompt_work(AShape(0, local), length)
    tiles = work.tiles
    lone = columns / BLOCK * tiles / 2 * max(0.0, 1 - blocks / (2 * tiles)) ** 2
    return _times(Work(tiles, work.blocks, 0, lone), heads), index


def _random_lists(layout: Layout, heads: int, topk: int) -> Ragged:
    """Random causal blocks for every tile, chosen by its halves as often as real heads share."""
    tiles = -(-layout.kv_len // TILE)
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(heads, tiles, 2 * tiles, generator=generator)
    tile = torch.arange(tiles)[:, None]
    causal = torch.arange(2 * tiles) < 2 * tile + 2
    want = torch.minimum(torch.tensor(round(topk * UNION)), 2 * tile + 2)
    rank = scores.masked_fill(~causal, -1).argsort(dim=-1, descending=True).argsort(dim=-1)
    both = torch.rand(scores.shape, generator=generator) < 2 / UNION - 1
    half = 1 + (torch.rand(scores.shape, generator=generator) < 0.5).int()
    bits = torch.where(both, 3, half) * (rank < want)
    place = torch.arange(2 * tiles)
    bits = torch.where(place == 2 * tile, 3, torch.where(place == 2 * tile + 1, 2, bits))
    listed = bits > 0
    at = torch.where(listed, listed.cumsum(dim=-1) - 1, 2 * tiles)
    rows = torch.zeros(heads, tiles, 2 * tiles + 1, dtype=torch.int64)
    rows.scatter_(-1, at, 4 * place + bits)
    device = layout.device
    return Ragged.from_rows(rows[None, ..., :-1].to(device), listed.sum(dim=-1)[None].to(device))


def _builder(
    pattern: Pattern, q: Tensor, k: Tensor, context: Context
) -> Callable[[], SparseIndex | None]:
    method = MInference(patterns=default_patterns(1, q.shape[1], pattern))
    return lambda: method.build_index(q, k, context)


def _times(work: Work, heads: int) -> Work:
    return Work(*(heads * count for count in work.counts()))


def _line(lengths: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """Time at no tokens and time for each token, neither below 0."""
    slope = max(0.0, (seconds[-1] - seconds[0]) / (lengths[-1] - lengths[0]))
    return max(0.0, seconds[0] - slope * lengths[0]), slope


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
