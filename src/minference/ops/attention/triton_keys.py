"""Keys and values as the attention kernel reads them: by address, in pages, or through TMA."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from minference.ops._triton import padded_dim
from minference.ops.attention.fp8 import E4M3
from minference.ops.attention.triton_parts import in_pages, rows_at, tile_dim


@triton.jit
def _rows(
    ptr, desc, step, page_step, b, head, end, paged, row, D: tl.constexpr, ROWS: tl.constexpr,
    TMA: tl.constexpr, GUARD: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Rows [row, row + ROWS) of one head; with GUARD zeros beyond the buffer. [ROWS, BLOCK_D]"""
    BLOCK_D: tl.constexpr = tile_dim(D)
    if TMA:
        return desc.load([b, head, row.to(tl.int32), 0]).reshape(ROWS, BLOCK_D)
    place = row + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    at = rows_at(place.to(tl.int64)[:, None], paged, step, page_step, PAGE)
    at = ptr + at + column[None, :]
    if GUARD:
        known = ((place >= 0) & (place < end))[:, None] & (column < D)[None, :]
        return tl.load(at, mask=known, other=0.0)
    if BLOCK_D == D:
        return tl.load(at)
    return tl.load(at, mask=(column < D)[None, :], other=0.0)


@triton.jit
def _turned(
    ptr, desc, step, b, head, end, row, D: tl.constexpr, ROWS: tl.constexpr, TMA: tl.constexpr,
    GUARD: tl.constexpr,
):  # fmt: skip
    """Columns [row, row + ROWS) of turned values, as rows. [ROWS, BLOCK_D]"""
    BLOCK_D: tl.constexpr = tile_dim(D)
    if TMA:
        return desc.load([b, head, 0, row.to(tl.int32)]).reshape(BLOCK_D, ROWS).T
    place = row + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    at = ptr + column.to(tl.int64)[:, None] * step + place[None, :]
    known = (column < D)[:, None]
    if GUARD:
        known &= (place < end)[None, :]
    return tl.load(at, mask=known, other=0.0).T


@triton.jit
def keys_values(
    source, row, D: tl.constexpr, ROWS: tl.constexpr, TMA: tl.constexpr, GUARD: tl.constexpr,
    PRECISION: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Keys and values of the rows [row, row + ROWS) of a source. Each [ROWS, BLOCK_D]"""
    k_ptr, v_ptr, k_desc, v_desc, steps, b, head, end, pages = source
    k_step, v_step, k_page, v_page = steps
    paged = in_pages(pages, row + tl.arange(0, ROWS), end, PAGE)
    k = _rows(k_ptr, k_desc, k_step, k_page, b, head, end, paged, row, D, ROWS, TMA, GUARD, PAGE)
    if PRECISION == "fp8":
        # of turned values, the step is that from dim to dim
        v = _turned(v_ptr, v_desc, v_step, b, head, v_step, row, D, ROWS, TMA, GUARD)
    else:
        v = _rows(
            v_ptr, v_desc, v_step, v_page, b, head, end, paged, row, D, ROWS, TMA, GUARD, PAGE
        )
    return k, v


def tma_descriptors(k: Tensor, v: Tensor, rows: int, *, tma: bool) -> tuple[Any, Any]:
    """Host TMA descriptors that load `rows` rows of one head, or nothing."""
    if not tma:
        return None, None
    from triton.tools.tensor_descriptor import TensorDescriptor

    dim = k.shape[-1]
    blocks = [[1, 1, rows, padded_dim(dim)]] * 2
    if k.dtype == E4M3:
        blocks[1] = [1, 1, padded_dim(dim), rows]
    made = [
        TensorDescriptor(x, list(x.shape), list(x.stride()), block)
        for x, block in zip((k, v), blocks, strict=True)
    ]
    return made[0], made[1]
