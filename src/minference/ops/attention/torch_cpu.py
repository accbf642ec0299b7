"""Sparse attention in vectorised torch, made for the CPU: gather the keys of a few tiles, then
attend densely, the tiles as a batch.

No n x n mask: the largest tensor is the scores of one batch of tiles, in memory that is reused.
"""

import itertools
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import threshold

from minference.index import BLOCK, BOTH_HALVES, TILE, WHOLE, SparseIndex
from minference.index_tiles import tile_halves
from minference.ops.attention.fp8 import round_weights, rounded_qkv
from minference.ops.scores import softcap_

SCORES = 1 << 20
"""Scores of a batch of tiles, at most: what a core's cache still holds."""
DECODED = 64
"""Tiles whose lists are decoded at once."""
TINY = 1e-30
"""Weights from here down are dropped: subnormal ones would halve the speed of the product."""
HIDDEN = 1 << 40
"""Position of a place that holds no key: after every query."""


class _Scratch:
    """Float32 buffers that grow and are handed out again: fresh pages cost more than arithmetic."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        size = torch.Size(shape).numel()
        if name not in self._buffers or self._buffers[name].numel() < size:
            self._buffers[name] = torch.empty(size + size // 4)
        return self._buffers[name][:size].view(shape)

    def gather(self, name: str, source: Float[Tensor, "N D"], keys: Int[Tensor, "T n"]) -> Tensor:
        rows = self.take(name, keys.numel(), source.shape[1])
        torch.index_select(source, 0, keys.flatten(), out=rows)
        return rows.view(*keys.shape, source.shape[1])


def _packed(flags: Bool[Tensor, "T n"], *, right: bool) -> tuple[Tensor, Bool[Tensor, "T most"]]:
    """Places of the flags that are set, aligned to one side, and which of these entries exist."""
    count = flags.sum(dim=1, keepdim=True)
    rank = torch.arange(int(count.max()))
    there = rank >= rank.numel() - count if right else rank < count
    places = torch.zeros(there.shape, dtype=torch.int64)
    places.masked_scatter_(there, flags.nonzero()[:, 1])
    return places, there


@dataclass(frozen=True)
class _Reads:
    """What consecutive tiles read in the same rows: lone columns from the left on, then first keys
    of blocks up to the right end, both ascending, HIDDEN where a tile has fewer."""

    columns: Int[Tensor, "T n"]
    blocks: Int[Tensor, "T m"]
    lone: list[int]
    past: list[int]
    full: list[int]

    @classmethod
    def of(
        cls,
        halves: Int[Tensor, "T n_blocks"],
        bits: int,
        begin: Int[Tensor, "T 1"],
        columns: Tensor,
    ) -> "_Reads":
        """Reads of the row halves `bits` of tiles that begin at the positions `begin`."""
        columns = columns[columns < halves.shape[1] * BLOCK]
        alone = (halves[:, columns // BLOCK] == 0) & (columns < begin + TILE)
        places, there = _packed(alone, right=False)
        lone = columns[places].masked_fill_(~there, HIDDEN) if columns.numel() else places
        blocks, exist = _packed((halves & bits) != 0, right=True)
        past = (alone & (columns <= begin)).sum(dim=1)
        counts = (x.sum(dim=1).tolist() for x in (there, exist))
        first = (blocks * BLOCK).masked_fill_(~exist, HIDDEN)
        return cls(lone, first, next(counts), past.tolist(), next(counts))

    def keys(self, own: slice) -> tuple[Int[Tensor, "t n"], slice]:
        """Positions that some of the tiles read, and where rows can be before a lone column."""
        width, depth = max(self.lone[own]), max(self.full[own])
        blocks = self.blocks[own, self.blocks.shape[1] - depth :, None] + torch.arange(BLOCK)
        keys = torch.cat([self.columns[own, :width], blocks.flatten(1)], dim=1)
        gap = BLOCK * (depth - min(self.full[own]))
        return keys, slice(min(self.past[own]), width + gap)


def _span(hit: Bool[Tensor, " n"]) -> slice:
    """From the first place that is set to the last."""
    places = hit.nonzero()[:, 0]
    return slice(int(places[0]), int(places[-1]) + 1) if len(places) else slice(0)


def _hide(
    scores: Float[Tensor, "T G rows n"],
    keys: Int[Tensor, "T n"],
    queries: Int[Tensor, "T rows"],
    doubtful: slice,
    window: int,
    sink: int,
) -> None:
    """Set the scores that causality, window and sink forbid to -inf, in place.

    Outside the `doubtful` columns only the last TILE can lie after a query.
    """
    tail = slice(max(0, keys.shape[1] - TILE), None)
    for part in (doubtful, tail):
        if keys[:, part].shape[1]:
            late = keys[:, None, None, part] > queries[:, None, :, None]
            scores[..., part].masked_fill_(late, -torch.inf)
    if window < WHOLE:
        part = _span(((keys >= sink) & (keys <= queries[:, -1:] - window)).any(dim=0))
        near = keys[:, None, None, part]
        far = (near >= sink) & (queries[:, None, :, None] - near >= window)
        scores[..., part].masked_fill_(far, -torch.inf)


def _see_nothing(
    keys: Int[Tensor, "T n"],
    queries: Int[Tensor, "T rows"],
    doubtful: slice,
    window: int,
    sink: int,
) -> Bool[Tensor, "T 1 rows 1"]:
    """Rows from which causality, window and sink hide every key."""
    scores = torch.zeros(len(keys), 1, queries.shape[1], keys.shape[1])
    _hide(scores, keys, queries, doubtful, window, sink)
    return (scores == -torch.inf).all(dim=-1, keepdim=True)


def _chunks(rows: range) -> Iterator[tuple[range, range]]:
    """Runs of at most DECODED tiles and the rows that each of their tiles has; a tile of which
    `rows` holds a part comes alone."""
    tile = rows.start // TILE
    while tile * TILE < rows.stop:
        begin = max(rows.start - tile * TILE, 0)
        stop = min(rows.stop - tile * TILE, TILE)
        whole = (begin, stop) == (0, TILE)
        last = min(tile + DECODED, rows.stop // TILE) if whole else tile + 1
        yield range(tile, last), range(begin, stop)
        tile = last


def _batches(
    index: SparseIndex, b: int, h: int, share: int
) -> Iterator[tuple[Int[Tensor, "T rows"], Int[Tensor, "T n"], slice]]:
    """Query positions of a batch of tiles, the positions that they read, and the doubtful ones.

    A tile is one piece, unless some of its blocks serve one half of the rows only.
    """
    columns = index.columns.row(b, h).long()
    for span, part in _chunks(index.rows(b)):
        tiles = torch.arange(span.start, span.stop)
        (halves,) = tile_halves(index, b, range(h, h + 1), span)
        split = bool(((halves != 0) & (halves != BOTH_HALVES)).any())
        step = BLOCK if split else TILE
        for begin in range(0, TILE, step):
            own = range(max(part.start, begin), min(part.stop, begin + step))
            if not len(own):
                continue
            first = tiles[:, None] * TILE
            reads = _Reads.of(halves, 1 + begin // BLOCK if split else BOTH_HALVES, first, columns)
            width = max(reads.lone) + BLOCK * max(reads.full)
            size = max(1, SCORES // (share * len(own) * max(width, 1)))
            for at in range(0, len(tiles), size):
                some = slice(at, at + size)
                yield first[some] + torch.arange(own.start, own.stop), *reads.keys(some)


def sparse_attention(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B Hkv N D"],
    v: Float[Tensor, "B Hkv N D"],
    index: SparseIndex,
    *,
    scale: float,
    softcap: float = 0.0,
    return_lse: bool = True,
    fp8: bool = False,
) -> tuple[Float[Tensor, "B H L D"], Float[Tensor, "B H L"] | None]:
    """Attention over the index's keys in float32; on request its log-sum-exp (natural logarithm).

    Rows that are padding, or have no key, give 0 and -inf. With fp8, q, k, v and the weights are
    rounded to e4m3.
    """
    batch, heads, q_len, _ = q.shape
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    if fp8:
        q, k, v = rounded_qkv(q, k, v, index)
    # what is created below follows the tensors, should they be on a GPU
    with nullcontext() if q.device.type == "cpu" else q.device:
        lse = torch.full((batch, heads, q_len), -torch.inf) if return_lse else None
        kv_heads, share, scratch = k.shape[1], heads // index.heads, _Scratch()
        for b, kv_head in itertools.product(range(batch), range(kv_heads)):
            real = slice(int(index.first[b]), int(index.stop[b]))
            keys, values = (x[b, kv_head, real].float().contiguous() for x in (k, v))
            first = kv_head * index.heads // kv_heads
            for h in range(first, first + index.heads // kv_heads):
                own = slice(h * share, (h + 1) * share)
                to = out[b, own], None if lse is None else lse[b, own]
                asked = (q[b, own].float() * scale).contiguous()
                _attend(asked, keys, values, to, index, (b, h), softcap, scratch, fp8=fp8)
    return out, lse


def _attend(
    q: Float[Tensor, "G L D"],
    k: Float[Tensor, "N D"],
    v: Float[Tensor, "N D"],
    to: tuple[Float[Tensor, "G L D"], Float[Tensor, "G L"] | None],
    index: SparseIndex,
    place: tuple[int, int],
    softcap: float,
    scratch: _Scratch,
    *,
    fp8: bool,
) -> None:
    """Attention of scaled queries, the heads that share the lists of batch row and head `place`."""
    out, lse = to
    b, h = place
    shift, window, sink = index.query_start(b), int(index.window[h]), int(index.sink[h])
    for queries, keys, doubtful in _batches(index, b, h, len(q)):
        if not keys.shape[1]:
            continue
        at, there = (queries - shift).flatten(), keys.clamp(max=len(k) - 1)
        asked = q.index_select(1, at).view(len(q), *queries.shape, -1).transpose(0, 1)
        scores = scratch.take("scores", *asked.shape[:3], keys.shape[1])
        flat = scores.flatten(1, 2)
        gathered = scratch.gather("keys", k, there)
        torch.bmm(asked.flatten(1, 2), gathered.transpose(1, 2), out=flat)
        softcap_(scores, softcap)
        _hide(scores, keys, queries, doubtful, window, sink)
        if lse is not None:
            total = scores.logsumexp(dim=-1).transpose(0, 1)
            lse.index_copy_(1, at, total.flatten(1))
        torch.softmax(flat, dim=-1, out=flat)
        if bool(flat[..., 0].isnan().any()):
            scores.masked_fill_(_see_nothing(keys, queries, doubtful, window, sink), 0.0)
        if fp8:
            round_weights(flat)
        threshold(flat, TINY, 0.0, inplace=True)
        answer = scratch.take("answer", *asked.shape)
        gathered = scratch.gather("values", v, there)
        torch.bmm(flat, gathered, out=answer.flatten(1, 2))
        out.index_copy_(1, at, answer.transpose(0, 1).flatten(1, 2).to(out.dtype))
