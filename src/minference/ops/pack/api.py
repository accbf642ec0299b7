"""Rows as e4m3 with one float32 scale each, which keeps a number to one part in 16 (3 bits)."""

from jaxtyping import Float, UInt8
from torch import Tensor

from minference.ops._dispatch import why_not_triton
from minference.ops.pack.reference import E4M3


def pack_rows(
    x: Float[Tensor, "B H n D"],
) -> tuple[UInt8[Tensor, "B H n D"], Float[Tensor, "B H n 1"]]:
    """Bytes, and the scale of each row."""
    if _on_triton(x):
        from minference.ops.pack import triton

        return triton.pack_rows(x)
    from minference.ops.pack import reference

    return reference.pack_rows(x)


def unpack_rows(
    data: UInt8[Tensor, "B H n D"], scale: Float[Tensor, "B H n 1"], out: Float[Tensor, "B H n D"]
) -> None:
    """Writes the numbers into `out`, which may be a part of something longer."""
    if _on_triton(out):
        from minference.ops.pack import triton

        triton.unpack_rows(data, scale, out)
    else:
        from minference.ops.pack import reference

        reference.unpack_rows(data, scale, out)


def _on_triton(x: Tensor) -> bool:
    """On a GPU that converts to e4m3; interpreted kernels would round wrongly."""
    return x.is_cuda and x.numel() > 0 and why_not_triton(x.device, E4M3) is None
