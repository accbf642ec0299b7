"""The keys as the grouped estimate reads them, in e4m3 where the device multiplies it.

They lie interleaved: of 64 blocks first every block's first key, then every block's second one, and
means of 4 likewise. So the largest score of a block is taken between whole tiles of products,
element by element, and what follows (scaling, exponentials, the maximum over rows) is paid once a
block.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from minference.index import BLOCK
from minference.ops._kernel import kernel
from minference.ops._triton import SIZES, capability, padded_dim
from minference.ops.build import Layout
from minference.ops.groups.plan import CELL

STEP = 64
"""Blocks whose keys lie interleaved: those of a step."""

SAMPLED_KEYS = 64
"""Keys of a head that give the unit of its keys."""

MEANS_AT_ONCE = 16

_BLOCK = tl.constexpr(BLOCK)
_STEP = tl.constexpr(STEP)
_CELL = tl.constexpr(CELL)
_CELLS = tl.constexpr(BLOCK // CELL)
_SAMPLED = tl.constexpr(SAMPLED_KEYS)
_AT_ONCE = tl.constexpr(MEANS_AT_ONCE)


class Cells(NamedTuple):
    """A call's keys by position, up to a whole number of steps.

    Attributes:
        keys: in units of `unit`, zeros past the last real one; e4m3 ones may be off by one vector
            a head, as may
        means: of each block's keys.
        fine: of 4 keys each; None unless they were asked for.
        unit: of each KV head; 1 unless the keys are e4m3.
    """

    keys: Float[Tensor, "B Hkv N D"]
    means: Float[Tensor, "B Hkv means D"]
    fine: Float[Tensor, "B Hkv cells D"] | None
    unit: Float[Tensor, "B Hkv"]


@triton.jit
def cell_slot(cell, PER: tl.constexpr):
    """Place of a cell, PER of which make a block."""
    block = cell // PER
    return (block // _STEP * PER + cell % PER) * _STEP + block % _STEP


@triton.jit
def _store(
    cells, cells_ptr, cell, item, n_cells, shift, unit, PER: tl.constexpr, BLOCK_D: tl.constexpr,
    FP8: tl.constexpr,
):  # fmt: skip
    to = cells_ptr + (item.to(tl.int64) * n_cells + cell_slot(cell, PER))[:, None] * BLOCK_D
    to += tl.arange(0, BLOCK_D)[None, :]
    if FP8:
        # within 32, so that sums of products with sampled queries stay within half precision
        cells = tl.minimum(tl.maximum((cells - shift) / unit, -32.0), 32.0)
        tl.store(to, cells.to(tl.float8e4nv))
    else:
        tl.store(to, cells.to(cells_ptr.dtype.element_ty))


@kernel(do_not_specialize=SIZES)
def _copy_keys(
    k_ptr, keys_ptr, means_ptr, fine_ptr, unit_ptr, first_ptr, stop_ptr, k_steps, n_keys, n_means,
    HKV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, FP8: tl.constexpr,
    SHIFTED: tl.constexpr, FINE: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(1)
    b = item // HKV
    first = tl.load(first_ptr + b)
    real = tl.load(stop_ptr + b) - first
    column = tl.arange(0, BLOCK_D)
    there = (column < D)[None, :]
    k_from = k_ptr + b.to(tl.int64) * k_steps[0] + (item % HKV).to(tl.int64) * k_steps[1]
    k_from += first.to(tl.int64) * k_steps[2] + column[None, :]
    unit = 1.0
    shift = tl.zeros([1, BLOCK_D], tl.float32)
    if FP8:
        some = (tl.arange(0, _SAMPLED).to(tl.int64) * real // _SAMPLED)[:, None]
        sample = tl.load(k_from + some * k_steps[2], mask=there & (some < real), other=0.0)
        sample = sample.to(tl.float32)
        if SHIFTED:
            # what all keys have in common changes no share, but takes precision
            shift = tl.sum(sample, 0)[None, :] / _SAMPLED
        # of a sample: e4m3 reaches twice as far up here and 1000 times further down
        peak = tl.max(tl.max(tl.abs(sample - shift), 1), 0)
        unit = tl.where(peak > 0, peak / 16, 1.0)
    tl.store(unit_ptr + item, unit, mask=tl.program_id(0) == 0)
    cell = tl.program_id(0) * _AT_ONCE + tl.arange(0, _AT_ONCE)
    sums = tl.zeros([_AT_ONCE, BLOCK_D], tl.float32)
    # a few at a time: all of them would take half a minute to compile
    for one in range(0, _BLOCK, _CELL):
        few = tl.zeros([_AT_ONCE, BLOCK_D], tl.float32)
        for other in tl.static_range(_CELL):
            key = cell * _BLOCK + one + other
            at = k_from + key.to(tl.int64)[:, None] * k_steps[2]
            own = tl.load(at, mask=(key < real)[:, None] & there, other=0.0).to(tl.float32)
            few += own
            _store(own, keys_ptr, key, item, n_keys, shift, unit, _BLOCK, BLOCK_D, FP8)
        sums += few
        if FINE:
            at = (cell * _BLOCK + one) // _CELL
            n_fine = n_keys // _CELL
            _store(few / _CELL, fine_ptr, at, item, n_fine, shift, unit, _CELLS, BLOCK_D, FP8)
    _store(sums / _BLOCK, means_ptr, cell, item, n_means, shift, unit, 1, BLOCK_D, FP8)


def copy_keys(
    k: Float[Tensor, "B Hkv N D"], layout: Layout, *, shifted: bool, fine: bool = False
) -> Cells:
    """The keys and their means; `shifted` lets e4m3 ones be off by one vector a head, which
    softmax does not see but a soft cap does; `fine` makes means of 4 too."""
    batch, kv_heads, kv_len, dim = k.shape
    count = -(-kv_len // (STEP * BLOCK)) * STEP * BLOCK
    fp8 = k.dtype != torch.float32 and capability(k.device) >= (8, 9)
    dtype = torch.float8_e4m3fn if fp8 else k.dtype
    keys, means, few = (
        torch.empty((batch, kv_heads, n, padded_dim(dim)), dtype=dtype, device=k.device)
        for n in (count, count // BLOCK, count // CELL if fine else 0)
    )
    unit = torch.empty((batch, kv_heads), device=k.device)
    _copy_keys[(count // BLOCK // MEANS_AT_ONCE, batch * kv_heads)](
        k, keys, means, few, unit, layout.first, layout.stop, tuple(k.stride()[:3]), count,
        means.shape[2], HKV=kv_heads, D=dim, BLOCK_D=padded_dim(dim), FP8=fp8, SHIFTED=shifted,
        FINE=fine, num_warps=8,
    )  # fmt: skip
    return Cells(keys, means, few if fine else None, unit)
