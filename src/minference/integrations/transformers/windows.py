"""Layers of long prompts with a window or chunks of their own, exact and without an n x n mask: the
window through the sparse kernel, chunks (Llama 4) one by one through the dense one.

The mask function hands such a layer [B, 1, 1, seen] integers: 0 for padding, else its window
(int32), or the number of the key's chunk, from 1 on (int64). The host passes on what has four
dimensions, and builds masks of fewer anew.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minference.index import SparseIndex, real_bounds
from minference.ops.attention.dense import ROWS, dense_attention
from minference.ops.build import Layout, a_shape_index


def window_mask(
    keep: Tensor | None, window: int, batch: int, seen: int, device: torch.device | str | None
) -> Tensor:
    """What stands for the mask of a windowed layer, [B, 1, 1, seen] int32."""
    if keep is None:
        return torch.full((batch, 1, 1, seen), window, dtype=torch.int32, device=device)
    return keep[:, None, None].to(torch.int32) * window


def chunk_mask(keep: Tensor | None, size: int, begin: Tensor, places: Tensor) -> Tensor:
    """What stands for the mask of a layer with chunks, [B, 1, 1, seen] int64.

    Args:
        keep: which keys are real; all unless given.
        size: keys of a chunk.
        begin: place at which each batch row's first chunk begins, [B].
        places: of the keys, [seen].
    """
    numbers = (places - begin.to(places)[:, None]) // size + 1
    return (numbers if keep is None else numbers * keep)[:, None, None]


def is_window(mask: Tensor | None) -> bool:
    """Whether a mask is one of `window_mask`."""
    return _stands_for_mask(mask, torch.int32)


def is_chunks(mask: Tensor | None) -> bool:
    """Whether a mask is one of `chunk_mask`."""
    return _stands_for_mask(mask, torch.int64)


def _stands_for_mask(mask: Tensor | None, dtype: torch.dtype) -> bool:
    return mask is not None and mask.dim() == 4 and mask.dtype == dtype and mask.shape[2] == 1


def window_index(query: Tensor, keep: Tensor, window: int) -> SparseIndex:
    """Exactly the keys at a distance below the window, for every head."""
    heads = query.shape[1]
    first, stop = real_bounds(query.shape[0], keep.shape[1], query.device, keep)
    layout = Layout(first, stop, query.shape[2], keep.shape[1])
    return a_shape_index(layout, (0,) * heads, (window,) * heads)


def dense_window(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor,
    window: int,
    **options: Any,  # noqa: ANN401
) -> Tensor:
    """The same in blocks of rows by the dense kernels, for gradients and dropout."""
    out = []
    past = key.shape[2] - query.shape[2]
    places = torch.arange(key.shape[2], device=query.device)
    for begin in range(0, query.shape[2], ROWS):
        stop = min(begin + ROWS, query.shape[2])
        own = slice(max(0, past + begin - window + 1), past + stop)
        distance = places[past + begin : past + stop, None] - places[own]
        mask = ((distance >= 0) & (distance < window)) & keep[:, None, None, own]
        rows = query[:, :, begin:stop]
        out.append(dense_attention(rows, key[:, :, own], value[:, :, own], mask=mask, **options))
    return torch.cat(out, dim=2)


def dense_chunks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    numbers: Tensor,
    **options: Any,  # noqa: ANN401
) -> Tensor:
    """Causal attention within chunks: each query to the keys of its own chunk, whose numbers are
    [B, seen]. Reads them on the host."""
    out = query.new_zeros(*query.shape[:3], value.shape[-1])
    past = key.shape[2] - query.shape[2]
    alike = bool((numbers == numbers[:1]).all())
    for own in [slice(None)] if alike else [slice(b, b + 1) for b in range(len(numbers))]:
        found, counts = numbers[own][0].unique_consecutive(return_counts=True)
        stop = 0
        for number, count in zip(found.tolist(), counts.tolist(), strict=True):
            begin, stop = stop, stop + count
            if number and stop > past:
                rows, keys = slice(max(begin - past, 0), stop - past), slice(begin, stop)
                out[own, :, rows] = dense_attention(
                    query[own, :, rows], key[own, :, keys], value[own, :, keys], **options
                )
    return out
