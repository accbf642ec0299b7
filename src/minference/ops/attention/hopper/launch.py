"""Launches the Hopper kernel: tensor maps, packed columns, one persistent grid. No host sync."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import struct

import torch
from jaxtyping import Float
from torch import Tensor

from minference.errors import UnsupportedError
from minference.index import TILE, Ragged, SparseIndex
from minference.ops.attention.fp8 import E4M3
from minference.ops.attention.hopper.compile import (
    Build,
    attention_kernel,
    checked,
    pack_kernel,
    why_not_compile,
)
from minference.ops.attention.hopper.tensor_map import describable, tensor_map

HEAD_DIMS = (64, 128)
ELEMENTS = {torch.bfloat16: "bf16", torch.float16: "f16", E4M3: "e4m3"}
FP8_STAGES = 4
"""Stages of keys and of values: half the bytes, so twice as many."""
THREADS = 384
PACK_THREADS = 256


def why_not(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the Hopper kernel cannot serve such a call; None if it can."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return "it needs a GPU of compute capability 9.0 (H100, H200)"
    if dtype not in ELEMENTS:
        return f"it computes in bfloat16, float16 and e4m3, got {dtype}"
    if dtype == E4M3 and importlib.util.find_spec("triton") is None:
        return "fp8 inputs are quantised by Triton, which is not installed"
    if head_dim not in HEAD_DIMS:
        return f"it is made for head dimensions {HEAD_DIMS}, got {head_dim}"
    return _why_not_compile()


@functools.cache
def _why_not_compile() -> str | None:
    return why_not_compile()


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def sparse_attention(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B Hkv N D"],
    v: Float[Tensor, "B Hkv N D"],
    index: SparseIndex,
    *,
    scale: float,
    softcap: float = 0.0,
    return_lse: bool = False,
    fp8: bool = False,
    build: Build | None = None,
) -> tuple[Float[Tensor, "B H L D"], Float[Tensor, "B H L"] | None]:
    """Attention over the index's keys and, if asked for, its log-sum-exp (natural logarithm).

    Padding rows give 0 and -inf. The column lists of an index must not overlap in memory. With
    fp8 the kernel multiplies e4m3, a scale a head. `build` replaces the tuned variant, for
    benchmarks.

    Raises:
        UnsupportedError: a GPU, dtype, head dimension or scale that the kernel is not made for.
    """
    batch, heads, q_len, dim = q.shape
    reason = why_not(q.device, E4M3 if fp8 else q.dtype, dim)
    if reason is None and scale <= 0:
        reason = f"it needs a positive scale, got {scale}"
    if reason:
        raise UnsupportedError(f"the Hopper kernel cannot run: {reason}; use impl='triton'")
    if not fp8:
        q, k, v = (x if describable(x) else x.contiguous() for x in (q, k, v))
    dtype = q.dtype if q.dtype in ELEMENTS else torch.bfloat16
    out = torch.empty((batch, heads, q_len, dim), dtype=dtype, device=q.device)
    lse = torch.empty((batch, heads, q_len), device=q.device) if return_lse else None
    if not out.numel():
        return out, lse
    build = build or tuned_build(dim, dtype, softcap=softcap != 0, fp8=fp8)
    device = out.device.index
    counter = torch.zeros(1, dtype=torch.int32, device=q.device)
    with torch.cuda.device(device):
        kernel = attention_kernel(build, device)
        if fp8:
            maps, scaled = _quantised(q, k, v, index)
        else:
            columns = _pack_columns(k, v, index)
            maps = [tensor_map(q, TILE), *(tensor_map(x, 64) for x in (k, v, *columns))]
            scaled = ()
        params = _params(q, k, index, counter, out, lse, scale, softcap, scaled)
        grid = min(_multiprocessors(device), batch * heads * _tiles(q_len))
        _launch(kernel, (grid, 1), THREADS, build.shared_bytes, [*maps, params])
    return out.to(q.dtype), lse


def tuned_build(
    head_dim: int, dtype: torch.dtype, *, softcap: bool = False, fp8: bool = False
) -> Build:
    """The variant for inputs, and outputs, of a dtype; with fp8 they are quantised."""
    if not fp8:
        return Build(head_dim, ELEMENTS[dtype], softcap=softcap)
    return Build(
        head_dim,
        "e4m3",
        softcap=softcap,
        output=ELEMENTS[dtype],
        k_stages=FP8_STAGES,
        v_stages=FP8_STAGES,
    )


def _quantised(
    q: Tensor, k: Tensor, v: Tensor, index: SparseIndex
) -> tuple[list[bytes], tuple[Tensor, ...]]:
    """Tensor maps of e4m3 inputs, and the tensors that the kernel reads beside: their scales,
    where the columns of each list begin, and what the maps point to."""
    from minference.ops.attention.triton_fp8 import quantised_inputs

    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    made = quantised_inputs(q, k, v, index, blocked=True)
    dim, values = q.shape[-1], made.v.flatten(0, 1)
    maps = [
        tensor_map(made.q, TILE, dim),
        tensor_map(made.k, 64, dim),
        tensor_map(values, dim),
        tensor_map(made.packed_k, 64, dim),
        tensor_map(made.packed_v, dim),
    ]
    return maps, (*made.scales, made.place, made.q, made.k, values, made.packed_k, made.packed_v)


def _tiles(q_len: int) -> int:
    """Most tiles that a chunk touches: one more when it starts inside a tile."""
    return -(-q_len // TILE) + 1


def _params(
    q: Tensor,
    k: Tensor,
    index: SparseIndex,
    counter: Tensor,
    out: Tensor,
    lse: Tensor | None,
    scale: float,
    softcap: float,
    scaled: tuple[Tensor, ...] = (),
) -> bytes:
    """The struct Params of params.cuh, field by field."""
    lists = [_list_words(x) for x in (index.offsets, index.blocks, index.columns)]
    tensors = [index.offset_bits, index.group_tiles, index.window, index.sink]
    tensors += [index.first, index.stop]
    return struct.pack(
        "25Q9q2f",
        *(word for words in lists for word in words),
        *(_contiguous(x).data_ptr() for x in tensors),
        counter.data_ptr(),
        *((x.data_ptr() for x in scaled[:4]) if scaled else (0,) * 4),
        out.data_ptr(),
        0 if lse is None else lse.data_ptr(),
        *index.offset_bits.shape[2:],
        q.shape[0],
        q.shape[1],
        k.shape[1],
        index.heads,
        q.shape[2],
        k.shape[2],
        _tiles(q.shape[2]),
        scale,
        softcap,
    )


def _contiguous(x: Tensor) -> Tensor:
    if not x.is_contiguous():
        raise UnsupportedError(
            f"the Hopper kernel reads contiguous index tensors, got strides {x.stride()} for shape "
            f"{list(x.shape)}; call .contiguous() on the parts of the index"
        )
    return x


def _list_words(lists: Ragged) -> tuple[int, int, int, int]:
    values, start, count = (
        _contiguous(x).data_ptr() for x in (lists.values, lists.start, lists.count)
    )
    return values, start, count, lists.count.shape[2]


def _pack_columns(k: Tensor, v: Tensor, index: SparseIndex) -> tuple[Tensor, Tensor]:
    """K and V rows of the columns, [entries of the lists, D] each; rows of no list are zero."""
    # TMA has no tensors without rows
    rows, dim = max(1, index.columns.values.numel()), k.shape[-1]
    packed = torch.zeros((2, rows, dim), dtype=k.dtype, device=k.device)
    unit = 16 // k.element_size()
    words = dim // unit
    params = struct.pack(
        "7Q10q",
        *_list_words(index.columns),
        _contiguous(index.first).data_ptr(),
        *(x.data_ptr() for x in packed),
        *(stride // unit for x in (k, v) for stride in x.stride()[:3]),
        k.shape[2],
        k.shape[1],
        index.heads,
        words,
    )
    lists = index.batch * index.heads
    pointers = [struct.pack("Q", x.data_ptr()) for x in (k, v)]
    grid = (lists, max(1, min(32, -(-rows * words // (lists * PACK_THREADS * 4)))))
    _launch(pack_kernel(k.device.index), grid, PACK_THREADS, 0, [*pointers, params])
    return packed[0], packed[1]


def _launch(
    kernel: int, grid: tuple[int, int], threads: int, shared: int, arguments: list[bytes]
) -> None:
    from cuda.bindings import driver

    buffers = [ctypes.create_string_buffer(x, len(x)) for x in arguments]
    pointers = (ctypes.c_void_p * len(buffers))(*(ctypes.addressof(x) for x in buffers))
    stream = torch.cuda.current_stream().cuda_stream
    checked(
        driver.cuLaunchKernel(
            kernel, *grid, 1, threads, 1, 1, shared, stream, ctypes.addressof(pointers), 0
        ),
        "cuLaunchKernel",
    )
