"""Whether the lists of an index are well formed, as every kernel takes for granted."""

import itertools

import torch
from torch import Tensor

from minference.index import BLOCK, BOTH_HALVES, ENTRY, WHOLE, Ragged, SparseIndex, pack_bits


def check_lists(index: SparseIndex) -> None:
    """Raise ValueError unless the lists are well formed. Reads the index on the host."""
    for tensor in index.tensors():
        if not tensor.is_contiguous():
            raise ValueError(
                f"tensors of an index must be contiguous, got strides {tensor.stride()} for shape "
                f"{list(tensor.shape)}; call contiguous() on them"
            )
    if int(index.group_tiles.min()) < 1:
        raise ValueError(f"group_tiles must be at least 1, got {index.group_tiles.tolist()}")
    for name, least in {"offsets": -1, "blocks": 0, "columns": 0}.items():
        lists: Ragged = getattr(index, name)
        if lists.count.shape[:2] != (index.batch, index.heads):
            raise ValueError(
                f"{name} must hold lists for batch {index.batch} and {index.heads} heads, got "
                f"{list(lists.count.shape[:2])}; build every list from the same q and k"
            )
        for b, h, g in itertools.product(*map(range, lists.count.shape)):
            _check_row(f"{name}[{b}, {h}, {g}]", lists.row(b, h, g), least)
    if index.columns.count.shape[2] != 1:
        raise ValueError(
            f"columns need one group, got {index.columns.count.shape[2]}; use blocks instead"
        )
    if index.samples:
        _check_samples(index)
    for b, h in itertools.product(range(index.batch), range(index.heads)):
        _check_columns(index, b, h)


def _check_row(name: str, row: Tensor, least: int) -> None:
    of_blocks = name.startswith("blocks")
    places = row // ENTRY if of_blocks else row
    if row.numel() and (int(places[0]) < least or bool((places[1:] <= places[:-1]).any())):
        raise ValueError(
            f"{name} must ascend strictly from {least}, got {row[:8].tolist()}...; sort the list "
            f"and drop duplicates"
        )
    if of_blocks and bool((row % ENTRY == 0).any()):
        raise ValueError(
            f"{name} must name a row half of each block, got {row[:8].tolist()}...; list block j "
            f"as 4 j + 1, 2 or 3"
        )


def _check_columns(index: SparseIndex, b: int, h: int) -> None:
    columns = index.columns.row(b, h).long()
    if not len(columns):
        return
    if int(columns[-1]) >= index.kv_len:
        raise ValueError(
            f"columns[{b}, {h}] must be positions of {index.kv_len} keys, got {int(columns[-1])}; "
            f"drop what lies behind them"
        )
    twice = columns[torch.isin(columns // BLOCK, index.blocks.row(b, h) // ENTRY)]
    if len(twice):
        raise ValueError(
            f"columns[{b}, {h}] must lie outside the listed blocks, got {twice[:8].tolist()} "
            f"inside; drop them"
        )
    flags = torch.zeros(32 * index.offset_bits.shape[3], dtype=torch.bool, device=columns.device)
    flags[index.offsets.row(b, h).long() + 1] = True
    if not torch.equal(pack_bits(flags), index.offset_bits[b, h, 0]):
        raise ValueError(
            f"offset_bits[{b}, {h}] must be the bitmap of the offsets, got another; make both by "
            f"offsets_from_flags"
        )


def _check_samples(index: SparseIndex) -> None:
    if not 0 < index.sample_share <= 1:
        raise ValueError(f"sample_share must be a share in (0, 1], got {index.sample_share}")
    lines = int(index.columns.count.sum()) + int(index.offsets.count.sum())
    if lines or int(index.window.min()) < WHOLE:
        raise ValueError(
            f"an index with samples must have blocks only, got {lines} columns and offsets and "
            f"windows from {int(index.window.min())}; list the blocks instead"
        )
    for b, h, g in itertools.product(*map(range, index.blocks.count.shape)):
        row = index.blocks.row(b, h, g)
        if bool((row % ENTRY != BOTH_HALVES).any()):
            raise ValueError(
                f"an index with samples must list blocks in both row halves, got "
                f"blocks[{b}, {h}, {g}] = {row[:8].tolist()}...; list them as 4 j + 3"
            )
