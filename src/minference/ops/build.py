"""Assemble a `SparseIndex` from lists: a band with sinks, lines of a prompt, blocks of a tile."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Int
from torch import Tensor

from minference.index import (
    BLOCK,
    TILE,
    WHOLE,
    Ragged,
    SparseIndex,
    device_ints,
    most_tiles,
    whole_entries,
)
from minference.index_samples import check_samples
from minference.ops.select.lists import local_offsets, offset_slots, offsets_from_flags


@dataclass(frozen=True, eq=False)
class Layout:
    """Which real tokens the buffers of a call hold: all that an index needs to know of q and k.

    Batch row b's real keys are `first[b]` to `stop[b] - 1` of its `kv_len` places; its queries
    are the last `q_len` places.
    """

    first: Int[Tensor, " B"]
    stop: Int[Tensor, " B"]
    q_len: int
    kv_len: int

    @property
    def batch(self) -> int:
        return self.first.shape[0]

    @property
    def device(self) -> torch.device:
        return self.first.device

    @property
    def begin(self) -> Int[Tensor, " B"]:
        """Position of each batch row's first real query."""
        return (self.kv_len - self.q_len - self.first).clamp(min=0)

    @property
    def first_tile(self) -> Int[Tensor, " B"]:
        """Number of the tile that holds it."""
        return self.begin // TILE

    @property
    def chunk_tiles(self) -> int:
        """Most query tiles that the chunk can touch."""
        return min(most_tiles(self.q_len), -(-self.kv_len // TILE))

    @property
    def blocks(self) -> int:
        """Key blocks of the buffer: two for each tile of it, the last one's too."""
        return 2 * -(-self.kv_len // TILE)


def assemble(
    layout: Layout,
    heads: int,
    *,
    offsets: tuple[Ragged, Int[Tensor, "B H G W"]] | None = None,
    blocks: Ragged | None = None,
    columns: Ragged | None = None,
    group_tiles: int = WHOLE,
    windows: tuple[int, ...] | None = None,
    sinks: tuple[int, ...] | None = None,
    samples: int = 0,
    sample_share: float = 1.0,
) -> SparseIndex:
    """An index for heads that group alike; lists that are not given are empty."""
    check_samples(layout.kv_len, samples)
    empty = _empty(layout.batch, heads, layout.device)
    if offsets is None:
        bits = torch.zeros(layout.batch, heads, 1, 1, dtype=torch.int32, device=layout.device)
        offsets = empty, bits
    return SparseIndex(
        offsets=offsets[0],
        blocks=empty if blocks is None else blocks,
        columns=empty if columns is None else columns,
        offset_bits=offsets[1],
        group_tiles=device_ints((group_tiles,) * heads, layout.device),
        window=device_ints((WHOLE,) * heads if windows is None else windows, layout.device),
        sink=device_ints((0,) * heads if sinks is None else sinks, layout.device),
        first=layout.first,
        stop=layout.stop,
        q_len=layout.q_len,
        kv_len=layout.kv_len,
        samples=samples,
        sample_share=sample_share,
    )


@lru_cache(maxsize=64)
def _empty(batch: int, heads: int, device: torch.device) -> Ragged:
    """Lists without entries, kept so that a layer's index costs no launch for them."""
    return Ragged.empty(batch, heads, device)


def band_offsets(layout: Layout, bands: tuple[int, ...]) -> tuple[Ragged, Int[Tensor, "B H 1 W"]]:
    """Offsets that the distances 0..bands[h]-1 pass through."""
    slots = offset_slots(layout.kv_len)
    width = device_ints(tuple(local_offsets(min(w, layout.kv_len)) for w in bands), layout.device)
    flags = torch.arange(slots, device=layout.device) < width[:, None]
    return offsets_from_flags(flags[None, :, None].expand(layout.batch, -1, -1, -1))


def a_shape_index(layout: Layout, sinks: tuple[int, ...], windows: tuple[int, ...]) -> SparseIndex:
    """Exactly the keys at distance < windows[h] and the first sinks[h] ones (StreamingLLM,
    arXiv 2309.17453)."""
    cap = max(1, -(-min(max(sinks), layout.kv_len) // BLOCK))
    entries = whole_entries(torch.arange(cap, device=layout.device))
    count = device_ints(tuple(-(-min(s, layout.kv_len) // BLOCK) for s in sinks), layout.device)
    shape = (layout.batch, len(sinks), 1)
    blocks = Ragged.from_rows(entries.expand(*shape, cap), count[None, :, None].expand(shape))
    return assemble(
        layout,
        len(sinks),
        offsets=band_offsets(layout, windows),
        blocks=blocks,
        windows=tuple(min(w, WHOLE) for w in windows),
        sinks=sinks,
    )


def dense_index(layout: Layout, heads: int) -> SparseIndex:
    """Every causal key, through the sparse kernels."""
    return assemble(layout, heads, offsets=band_offsets(layout, (layout.kv_len,) * heads))


def tri_shape_index(
    layout: Layout, sinks: tuple[int, ...], windows: tuple[int, ...], last: tuple[int, ...]
) -> SparseIndex:
    """Whole blocks of a band and of the sinks; every key for tiles that hold one of the `last`
    rows (arXiv 2412.10319). A superset, by up to a tile, of the lines it names."""
    heads, device = len(sinks), layout.device
    blocks = layout.blocks
    every = whole_entries(torch.arange(blocks, device=device))
    tile = layout.first_tile[:, None] + torch.arange(layout.chunk_tiles, device=device)
    tile = tile[:, None]  # [B, 1, tiles]
    widths = tuple(local_offsets(min(w, layout.kv_len)) for w in windows)
    sink_blocks = tuple(-(-s // BLOCK) for s in sinks)
    width, sink, rows = (device_ints(x, device)[:, None] for x in (widths, sink_blocks, last))
    dense = (tile + 1) * TILE > (layout.stop - layout.first)[:, None, None] - rows
    below_band = (2 * tile + 2 - width).clamp(min=0)
    count = torch.where(dense, below_band, torch.minimum(sink, below_band))
    shape = (layout.batch, heads, layout.chunk_tiles)
    zero = torch.zeros(shape, dtype=torch.int64, device=device)
    band = torch.arange(-1, max(widths) - 1, dtype=torch.int32, device=device)
    band_lists = Ragged(band, zero, width.expand(shape).contiguous())
    return assemble(
        layout,
        heads,
        offsets=(
            band_lists,
            torch.zeros(layout.batch, heads, 1, 1, dtype=torch.int32, device=device),
        ),
        blocks=Ragged(every, zero, count.to(torch.int32)),
        group_tiles=1,
    )
