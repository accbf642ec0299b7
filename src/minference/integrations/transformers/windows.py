"""Sliding-window layers of long prompts: the exact window through the sparse kernel, no n x n mask.

The mask function hands such a layer [B, 1, 1, seen] integers: 0 for padding, else its window. The
host passes on what has four dimensions, and builds masks of fewer anew.
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


def is_window(mask: Tensor | None) -> bool:
    """Whether a mask is one of `window_mask`."""
    return mask is not None and mask.dim() == 4 and mask.dtype == torch.int32 and mask.shape[2] == 1


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
