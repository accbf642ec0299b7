"""The sparse index: which key blocks and columns each tile of queries attends to.

Every method builds one, every attention implementation reads it and nothing else. Positions are
absolute: position 0 is a sequence's first real token, so a chunk, a cached prefix or a padded
batch row changes nothing but `first`, `stop` and the lengths.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from minference.lengths import causal_pairs

TILE = 128
"""Rows of a query tile: tile t holds the queries at positions [128 t, 128 t + 127]."""

BLOCK = 64
"""Keys of a block: block j holds the keys at positions [64 j, 64 j + 63]."""

WHOLE = 1 << 30
"""`group_tiles` of a head whose single group spans every tile; `window` of an unmasked head."""

ENTRY = 4
"""Factor of a block's number in an entry of `blocks`; what remains are its row halves."""

BOTH_HALVES = 3


def whole_entries(blocks: Int[Tensor, "*lists"]) -> Int[Tensor, "*lists"]:
    """Entries of `SparseIndex.blocks` for these blocks, in both row halves."""
    return (blocks * ENTRY + BOTH_HALVES).to(torch.int32)


def most_tiles(rows: int) -> int:
    """Most query tiles that so many neighbouring rows touch."""
    return -(-rows // TILE) + 1


@dataclass(frozen=True, eq=False)
class Ragged:
    """Lists of different lengths in one flat tensor: list [b, h, g] is
    `values[start[b, h, g] : start[b, h, g] + count[b, h, g]]`, sorted ascending."""

    values: Int[Tensor, " total"]
    start: Int[Tensor, "B H G"]
    count: Int[Tensor, "B H G"]

    @classmethod
    def empty(cls, batch: int, heads: int, device: torch.device | str) -> "Ragged":
        """One group without entries for every head."""
        return cls(
            torch.zeros(1, dtype=torch.int32, device=device),
            torch.zeros(batch, heads, 1, dtype=torch.int64, device=device),
            torch.zeros(batch, heads, 1, dtype=torch.int32, device=device),
        )

    @classmethod
    def from_rows(cls, rows: Int[Tensor, "B H G cap"], count: Int[Tensor, "B H G"]) -> "Ragged":
        """Lists that fill the first `count` places of equal rows."""
        shape = rows.shape[:3]
        start = torch.arange(shape.numel(), device=rows.device).view(shape) * rows.shape[3]
        values, count = (x.to(torch.int32).contiguous() for x in (rows.reshape(-1), count))
        return cls(values, start, count)

    def row(self, b: int, h: int, g: int = 0) -> Int[Tensor, " n"]:
        """One list. Reads its bounds on the host."""
        begin = int(self.start[b, h, g])
        return self.values[begin : begin + int(self.count[b, h, g])]


@dataclass(frozen=True, eq=False)
class SparseIndex:
    """Key blocks and columns for every batch row, head and query group.

    A group is a run of `group_tiles[h]` query tiles, counted from position 0; group 0 of the
    index is the one that holds the chunk's first query. In tile t a head attends to

    * block `2 t - o` for every relative offset `o` of its group's `offsets`,
    * block `e // 4` for every entry `e` of its group's `blocks`, in the row halves named by the
      bits `e % 4` (1: rows 0..63 of the tile, 2: rows 64..127),
    * the single key at every position in `columns`,

    always causally, each key once. `window` and `sink` then mask single keys: a query at
    distance d from key p attends iff `d < window[h] or p < sink[h]`.

    H is the number of query heads, or of KV heads when all query heads of a KV head share one
    list. Columns need a single group and must lie outside the listed `blocks`; with columns,
    `offset_bits` says which offsets there are: bit x of its words stands for offset x - 1.

    With `samples`, a tile also reads about so many keys that stand for those left out
    (`minference.index_samples`), each at most as `sample_share` of what the row has in the index's
    own keys; such an index has blocks only, in both row halves.
    """

    offsets: Ragged
    blocks: Ragged
    columns: Ragged
    offset_bits: Int[Tensor, "B H Gbits W"]
    group_tiles: Int[Tensor, " H"]
    window: Int[Tensor, " H"]
    sink: Int[Tensor, " H"]
    first: Int[Tensor, " B"]
    stop: Int[Tensor, " B"]
    q_len: int
    kv_len: int
    samples: int = 0
    sample_share: float = 1.0

    @property
    def batch(self) -> int:
        return self.first.shape[0]

    @property
    def heads(self) -> int:
        return self.group_tiles.shape[0]

    @property
    def device(self) -> torch.device:
        return self.first.device

    def tensors(self) -> list[Tensor]:
        """The index as a flat list of tensors, for operators that take nothing else."""
        lists = [(x.values, x.start, x.count) for x in (self.offsets, self.blocks, self.columns)]
        return [
            *(tensor for triple in lists for tensor in triple),
            self.offset_bits,
            self.group_tiles,
            self.window,
            self.sink,
            self.first,
            self.stop,
        ]

    @classmethod
    def from_tensors(
        cls,
        tensors: Sequence[Tensor],
        q_len: int,
        kv_len: int,
        samples: int = 0,
        sample_share: float = 1.0,
    ) -> "SparseIndex":
        """What `tensors` took apart."""
        offsets, blocks, columns = (Ragged(*tensors[i : i + 3]) for i in (0, 3, 6))
        return cls(
            offsets, blocks, columns, *tensors[9:15], q_len=q_len, kv_len=kv_len, samples=samples,
            sample_share=sample_share,
        )  # fmt: skip

    def query_start(self, b: int) -> int:
        """Position of the first query row of the buffer; negative while it is left padding."""
        return self.kv_len - self.q_len - int(self.first[b])

    def rows(self, b: int) -> range:
        """Positions of the real queries of batch row b."""
        begin = max(self.query_start(b), 0)
        return range(
            begin, max(begin, min(self.stop_position(b), self.query_start(b) + self.q_len))
        )

    def stop_position(self, b: int) -> int:
        """Number of real keys of batch row b."""
        return int(self.stop[b]) - int(self.first[b])

    def tiles(self, b: int) -> range:
        """Numbers of the query tiles that hold real queries of batch row b."""
        rows = self.rows(b)
        return range(rows.start // TILE, -(-rows.stop // TILE)) if len(rows) else range(0)

    def group_of(self, b: int, h: int, tile: int) -> int:
        """Group of the lists that tile `tile` reads."""
        size = int(self.group_tiles[h])
        return tile // size - (max(self.query_start(b), 0) // TILE) // size

    def tile_blocks(self, b: int, h: int, tile: int) -> Int[Tensor, " n_blocks"]:
        """Row halves (0..3) in which tile `tile` attends to each key block, before masks."""
        g = self.group_of(b, h, tile)
        halves = torch.zeros(2 * tile + 2, dtype=torch.int32, device=self.device)
        if g < self.blocks.count.shape[2]:
            entries = self.blocks.row(b, h, g)
            entries = entries[entries // ENTRY <= 2 * tile + 1]
            halves[(entries // ENTRY).long()] = entries % ENTRY
        if g < self.offsets.count.shape[2]:
            blocks = 2 * tile - self.offsets.row(b, h, g).long()
            halves[blocks[blocks >= 0]] = BOTH_HALVES
        return halves

    def tile_columns(
        self, b: int, h: int, tile: int, halves: Int[Tensor, " n_blocks"]
    ) -> Int[Tensor, " n"]:
        """Positions of the columns that tile `tile` attends to outside its blocks `halves`."""
        columns = self.columns.row(b, h).long()
        columns = columns[columns < (tile + 1) * TILE]
        return columns[halves[columns // BLOCK] == 0]

    def tile_mask(self, b: int, h: int, tile: int) -> Bool[Tensor, "tile keys"]:
        """Keys [0, 128 (tile + 1)) that each of the tile's 128 rows attends to, after masks;
        without samples."""
        halves = self.tile_blocks(b, h, tile)
        columns = self.tile_columns(b, h, tile, halves)
        keys = torch.arange(halves.shape[0] * BLOCK, device=self.device)
        queries = torch.arange(tile * TILE, (tile + 1) * TILE, device=self.device)[:, None]
        half_bit = 1 + (queries - tile * TILE) // BLOCK
        mask = (halves.repeat_interleave(BLOCK) & half_bit) != 0
        mask[:, columns] = True
        distance = queries - keys
        near = (distance < self.window[h]) | (keys < self.sink[h])
        return mask & (distance >= 0) & near

    def to_dense_mask(self) -> Bool[Tensor, "B H L N"]:
        """The mask over the buffers without samples, padding rows and keys False. For tests and
        small plots."""
        mask = torch.zeros(
            (self.batch, self.heads, self.q_len, self.kv_len), dtype=torch.bool, device=self.device
        )
        for b in range(self.batch):
            rows, shift, first = self.rows(b), self.query_start(b), int(self.first[b])
            for tile in self.tiles(b):
                a, z = max(rows.start, tile * TILE), min(rows.stop, (tile + 1) * TILE)
                for h in range(self.heads):
                    part = self.tile_mask(b, h, tile)[a - tile * TILE : z - tile * TILE, :z]
                    mask[b, h, a - shift : z - shift, first : first + z] = part
        return mask

    def head_density(self) -> Tensor:
        """Share of the causal area that is computed, [B, H] float64 on the CPU.

        Counts whole blocks up to the diagonal, also where `window` and `sink` mask keys of a
        computed block, and samples: it measures work. Reads the index on the host.
        """
        from minference.index_tiles import computed_pairs

        result = torch.ones((self.batch, self.heads), dtype=torch.float64)
        for b in range(self.batch):
            rows = self.rows(b)
            if rows:
                area = causal_pairs(len(rows), rows.stop)
                result[b] = computed_pairs(self, b).cpu().double() / area
        return result

    def density(self) -> float:
        """Mean of `head_density`."""
        return float(self.head_density().mean())

    def nbytes(self) -> int:
        """Bytes that the index holds on its device, packed columns not included."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def describe(self) -> str:
        """One line a head: entries, groups, masks and density of the first batch row."""
        density = self.head_density()
        lines = [
            f"SparseIndex: batch {self.batch}, heads {self.heads}, {self.q_len} queries on "
            f"{self.kv_len} keys, {self.samples} samples, density {float(density.mean()):.4f}, "
            f"{self.nbytes()} bytes"
        ]
        for h in range(self.heads):
            size = int(self.group_tiles[h])
            span = "one group" if size >= WHOLE else f"groups of {size * TILE} rows"
            counts = [int(x.count[0, h].sum()) for x in (self.offsets, self.blocks, self.columns)]
            masked = int(self.window[h]) < WHOLE
            mask = f", window {int(self.window[h])}, sink {int(self.sink[h])}" if masked else ""
            lines.append(
                f"  head {h}: {span}, {counts[0]} offsets, {counts[1]} blocks, "
                f"{counts[2]} columns{mask}, density {float(density[0, h]):.4f}"
            )
        return "\n".join(lines)

    def check(self) -> None:
        """Raise ValueError unless the lists are well formed. Reads the index on the host."""
        from minference.index_check import check_lists

        check_lists(self)


@lru_cache(maxsize=256)
def device_ints(values: tuple[int, ...], device: torch.device) -> Int[Tensor, " n"]:
    """Constant int32 tensor, kept so that a layer's budgets reach the device only once."""
    return torch.tensor(values, dtype=torch.int32, device=device)


def real_bounds(
    batch: int, kv_len: int, device: torch.device | str, padding: Bool[Tensor, "B N"] | None = None
) -> tuple[Int[Tensor, " B"], Int[Tensor, " B"]]:
    """`first` and `stop` of each batch row from a keep mask (True = real), which must be one run.

    Without a mask every key is real. No host synchronisation.
    """
    if padding is None:
        first = torch.zeros(batch, dtype=torch.int32, device=device)
        return first, torch.full_like(first, kv_len)
    keep = padding.to(device=device, dtype=torch.int32)
    first = keep.argmax(dim=1).to(torch.int32)
    return first, first + keep.sum(dim=1, dtype=torch.int32)


def pack_bits(flags: Bool[Tensor, "*lists n"]) -> Int[Tensor, "*lists words"]:
    """Bitmap of 32-bit words: flag x is bit x % 32 of word x // 32."""
    words = -(-flags.shape[-1] // 32)
    padded = torch.nn.functional.pad(flags, (0, words * 32 - flags.shape[-1]))
    shifts = torch.arange(32, device=flags.device, dtype=torch.int64)
    packed = (padded.view(*flags.shape[:-1], words, 32).long() << shifts).sum(dim=-1)
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)


def merge_heads(parts: Sequence[tuple[Sequence[int], SparseIndex]], heads: int) -> SparseIndex:
    """One index from indices over disjoint sets of heads: part (numbers, index) gives the lists of
    the heads `numbers`. Every head must be given once; all parts share batch and lengths."""
    given = sorted(h for numbers, _ in parts for h in numbers)
    if given != list(range(heads)):
        raise ValueError(
            f"parts must give each of the heads 0..{heads - 1} once, got {given}; check the split"
        )
    order = [h for numbers, _ in parts for h in numbers]
    if len(parts) == 1 and order == given:
        return parts[0][1]
    indices = [index for _, index in parts]
    if any(index.samples for index in indices):
        counts = [index.samples for index in indices]
        raise ValueError(f"indices with samples cannot be merged, got {counts}; set samples=0")
    source = [order.index(h) for h in range(heads)]
    select = device_ints(tuple(source), indices[0].device)

    def heads_of(name: str) -> Tensor:
        return torch.cat([getattr(index, name) for index in indices])[select]

    return SparseIndex(
        offsets=_merge_ragged([index.offsets for index in indices], select),
        blocks=_merge_ragged([index.blocks for index in indices], select),
        columns=_merge_ragged([index.columns for index in indices], select),
        offset_bits=_stack_heads([index.offset_bits for index in indices], select),
        group_tiles=heads_of("group_tiles"),
        window=heads_of("window"),
        sink=heads_of("sink"),
        first=indices[0].first,
        stop=indices[0].stop,
        q_len=indices[0].q_len,
        kv_len=indices[0].kv_len,
    )


def _merge_ragged(parts: list[Ragged], select: Tensor) -> Ragged:
    sizes = [0]
    for part in parts:
        sizes.append(sizes[-1] + part.values.numel())
    start = [part.start + size for part, size in zip(parts, sizes, strict=False)]
    return Ragged(
        torch.cat([part.values for part in parts]),
        _stack_heads(start, select),
        _stack_heads([part.count for part in parts], select),
    )


def _stack_heads(parts: list[Tensor], select: Tensor) -> Tensor:
    """Concatenate [B, h, ...] along heads, trailing dimensions padded with zeros to the largest."""
    dims = [max(part.shape[d] for part in parts) for d in range(2, parts[0].dim())]
    padded = []
    for part in parts:
        pads = [x for d in reversed(range(len(dims))) for x in (0, dims[d] - part.shape[d + 2])]
        padded.append(torch.nn.functional.pad(part, pads))
    return torch.cat(padded, dim=1)[:, select]
