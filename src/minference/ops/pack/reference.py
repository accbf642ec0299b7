"""What packing means, in torch; also what computes it where the kernels cannot."""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from minference.ops._e4m3 import E4M3, LARGEST

LEAST = 1e-20
"""Below it a row's largest number scales the row no more: a row of zeros stays zeros."""


def pack_rows(
    x: Float[Tensor, "B H n D"],
) -> tuple[UInt8[Tensor, "B H n D"], Float[Tensor, "B H n 1"]]:
    """As `api.pack_rows`."""
    scale = x.abs().amax(dim=-1, keepdim=True).float().clamp(min=LEAST) / LARGEST
    return (x.float() / scale).to(E4M3).view(torch.uint8), scale


def unpack_rows(
    data: UInt8[Tensor, "B H n D"], scale: Float[Tensor, "B H n 1"], out: Float[Tensor, "B H n D"]
) -> None:
    """As `api.unpack_rows`."""
    out.copy_(data.view(E4M3).float() * scale)
