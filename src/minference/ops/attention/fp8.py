"""e4m3 queries, keys and values: one scale a head, and weights scaled by 2^8.

This is what fp8 attention means, whoever computes it: the reference and the CPU round their inputs
and weights through it, and the kernels are held to them.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minference.errors import unknown_name
from minference.index import SparseIndex
from minference.ops._e4m3 import E4M3, LARGEST

WEIGHT_SCALE = 256.0
"""Factor of the softmax weights: their row's largest becomes 256, and 2^-17 of it is still kept."""
PRECISIONS = ("native", "fp8")


def check_precision(precision: str) -> None:
    """Raise ValueError unless the name is one of `PRECISIONS`."""
    if precision not in PRECISIONS:
        raise unknown_name("precision", precision, PRECISIONS)


def product_dtype(precision: str, dtype: torch.dtype) -> torch.dtype:
    """What products of inputs of that dtype are computed in."""
    return E4M3 if precision == "fp8" else dtype


def rounded(
    x: Float[Tensor, "B H L D"], first: Int[Tensor, " B"], stop: Int[Tensor, " B"], begin: int
) -> Float[Tensor, "B H L D"]:
    """What x becomes in e4m3 under one scale a head, in float32; rows that are padding are 0.

    Row r lies at place `begin + r` of the buffers, of which [first, stop) are real.
    """
    place = torch.arange(begin, begin + x.shape[2], device=x.device)
    real = (place >= first[:, None]) & (place < stop[:, None])
    kept = x.float().masked_fill(~real[:, None, :, None], 0.0)
    largest = kept.abs().amax(dim=(2, 3), keepdim=True)
    scale = torch.where(largest > 0, largest, LARGEST) * (1 / LARGEST)
    return (kept * (1 / scale)).clamp(-LARGEST, LARGEST).to(E4M3).float() * scale


def rounded_qkv(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B Hkv N D"],
    v: Float[Tensor, "B Hkv N D"],
    index: SparseIndex,
) -> tuple[Tensor, Tensor, Tensor]:
    """The tensors of an attention call, each `rounded`."""
    bounds = (index.first, index.stop)
    asked = rounded(q, *bounds, index.kv_len - index.q_len)
    return asked, rounded(k, *bounds, 0), rounded(v, *bounds, 0)


def round_weights(weights: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows n"]:
    """Softmax weights as e4m3 keeps them, each row relative to its largest; in place."""
    unit = weights.amax(dim=-1, keepdim=True).div_(WEIGHT_SCALE)
    unit.masked_fill_(unit == 0, 1)
    return weights.copy_(weights.div_(unit).to(E4M3)).mul_(unit)
