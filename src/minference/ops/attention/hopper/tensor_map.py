"""TMA descriptors: how the copy engine finds boxes of rows in a strided tensor."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch

from minference.ops.attention.hopper.compile import checked

MAP_BYTES = 128


def describable(x: torch.Tensor) -> bool:
    """Whether TMA can read `x` in place: unit last stride, the rest and the base on 16 bytes."""
    wide = all(
        stride * x.element_size() % 16 == 0
        for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True)
        if size > 1
    )
    return x.stride(-1) == 1 and wide and x.data_ptr() % 16 == 0


def tensor_map(x: torch.Tensor, rows: int, columns: int = 64) -> bytes:
    """Descriptor of `x` [..., rows, D] for boxes of `rows` rows and of so many columns, swizzled
    over their 64 or 128 bytes.

    Rows outside the tensor read as zeros.
    """
    shape = tuple(reversed(x.shape))
    # a dimension of size 1 may carry any stride, TMA wants a valid one all the same
    strides = [
        stride * x.element_size() if size > 1 else 16
        for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True)
    ]
    return _encode(x.data_ptr(), x.dtype, shape, tuple(reversed(strides)), (columns, rows))


@functools.lru_cache(maxsize=1024)
def _encode(
    pointer: int,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    corner: tuple[int, int],
) -> bytes:
    from cuda.bindings import driver

    kinds = driver.CUtensorMapDataType
    kind = {
        torch.bfloat16: kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        torch.float16: kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        torch.float8_e4m3fn: kinds.CU_TENSOR_MAP_DATA_TYPE_UINT8,
    }[dtype]
    swizzles = driver.CUtensorMapSwizzle
    swizzle = {
        64: swizzles.CU_TENSOR_MAP_SWIZZLE_64B,
        128: swizzles.CU_TENSOR_MAP_SWIZZLE_128B,
    }[corner[0] * dtype.itemsize]
    rank = len(shape)
    box = [*corner] + [1] * (rank - 2)
    result: Any = checked(
        driver.cuTensorMapEncodeTiled(
            kind,
            rank,
            pointer,
            [driver.cuuint64_t(x) for x in shape],
            [driver.cuuint64_t(x) for x in strides],
            [driver.cuuint32_t(x) for x in box],
            [driver.cuuint32_t(1)] * rank,
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzle,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        ),
        f"cuTensorMapEncodeTiled(shape={shape}, strides={strides})",
    )
    return ctypes.string_at(int(result.getPtr()), MAP_BYTES)
