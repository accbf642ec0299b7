"""Packing in one pass over the memory, so that it hardly slows the compute that it runs beside."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minference.ops._e4m3 import LARGEST
from minference.ops._kernel import kernel
from minference.ops._triton import padded_dim

ROWS = 32
_LARGEST = tl.constexpr(LARGEST)


def pack_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """As `api.pack_rows`."""
    batch, heads, length, dim = x.shape
    data = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    scale = torch.empty((*x.shape[:3], 1), dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(length, ROWS), batch * heads)
    _pack[grid](x, data, scale, heads, length, dim, *x.stride(), ROWS=ROWS, DIM=padded_dim(dim))
    return data, scale


def unpack_rows(data: Tensor, scale: Tensor, out: Tensor) -> None:
    """As `api.unpack_rows`."""
    batch, heads, length, dim = out.shape
    data, scale = data.contiguous(), scale.contiguous()
    grid = (triton.cdiv(length, ROWS), batch * heads)
    _unpack[grid](
        out, data, scale, heads, length, dim, *out.stride(), ROWS=ROWS, DIM=padded_dim(dim)
    )


@triton.jit
def _places(heads, length, dim, batch_step, head_step, step, dim_step, ROWS, DIM):
    """Places in the strided tensor and in the contiguous one, rows, and what exists."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, DIM)
    own = tl.program_id(1).to(tl.int64)
    real = (row < length)[:, None] & (column < dim)[None, :]
    begin = (own // heads) * batch_step + (own % heads) * head_step
    strided = begin + row[:, None] * step + column[None, :] * dim_step  # [ROWS, DIM]
    packed = (own * length + row[:, None]) * dim + column[None, :]  # [ROWS, DIM]
    return strided, packed, own * length + row, row < length, real


@kernel
def _pack(
    x, data, scale, heads, length, dim, batch_step, head_step, step, dim_step,
    ROWS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    strided, packed, row, rows, real = _places(
        heads, length, dim, batch_step, head_step, step, dim_step, ROWS, DIM
    )
    given = tl.load(x + strided, mask=real, other=0.0).to(tl.float32)
    own = tl.maximum(tl.max(tl.abs(given), axis=1), 1e-20) / _LARGEST  # [ROWS]
    # a quotient may end just above the largest number of the format, which then wraps to NaN
    unit = tl.minimum(tl.maximum(given / own[:, None], -_LARGEST), _LARGEST)
    tl.store(data + packed, unit.to(tl.float8e4nv).to(tl.uint8, bitcast=True), mask=real)
    tl.store(scale + row, own, mask=rows)


@kernel
def _unpack(
    out, data, scale, heads, length, dim, batch_step, head_step, step, dim_step,
    ROWS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    strided, packed, row, rows, real = _places(
        heads, length, dim, batch_step, head_step, step, dim_step, ROWS, DIM
    )
    unit = tl.load(data + packed, mask=real, other=0).to(tl.float8e4nv, bitcast=True)
    own = tl.load(scale + row, mask=rows, other=0.0)
    tl.store(
        out + strided, (unit.to(tl.float32) * own[:, None]).to(out.dtype.element_ty), mask=real
    )
