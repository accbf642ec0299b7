"""What operations ask of q, k, v and of counts."""

import math

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MOST_ITEMS = (1 << 16) - 1
"""Programs that CUDA launches along the second and third side of a grid."""


def check_count(name: str, value: object, least: int = 0) -> None:
    """Raise TypeError unless the value is an int, ValueError unless it is at least that."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def score_factor(q: Tensor, scale: float | None, softcap: float) -> float:
    """`scale`, or head_dim ** -0.5 where there is none.

    Raises:
        ValueError: a factor or a soft cap that no score can be multiplied or bounded by.
    """
    if not (math.isfinite(softcap) and softcap >= 0):
        raise ValueError(f"softcap must be 0 (off) or a finite number above 0, got {softcap}")
    if scale is None:
        return q.shape[-1] ** -0.5
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be a finite number above 0, got {scale}")
    return scale


def check_sinks(q: Tensor, sinks: object) -> None:
    """Raise ValueError unless there is one logit a query head, on the queries' device."""
    if sinks is None:
        return
    got = type(sinks).__name__
    if isinstance(sinks, Tensor):
        if sinks.shape == q.shape[1:2] and sinks.device == q.device:
            return
        got = f"shape {list(sinks.shape)} on {sinks.device}"
    raise ValueError(
        f"sinks must be a tensor of shape [{q.shape[1]}], a logit a query head, on {q.device}, got "
        f"{got}"
    )


def check_qkv(q: Tensor, k: Tensor, v: Tensor | None = None) -> None:
    """Raise ValueError unless the tensors can be attended with, TypeError for what is no tensor."""
    named = {"q": q, "k": k} | ({} if v is None else {"v": v})
    for name, x in named.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch tensor, got {type(x).__name__}")
        if x.dim() != 4:
            raise ValueError(
                f"{name} must have 4 dimensions [batch, heads, length, head_dim], got shape "
                f"{list(x.shape)}; add or merge dimensions"
            )
        if x.dtype not in DTYPES:
            allowed = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
            raise ValueError(f"{name} must be of dtype {allowed}, got {x.dtype}; cast it")
        if x.dtype != q.dtype:
            raise ValueError(f"{name} must have q's dtype {q.dtype}, got {x.dtype}; cast it")
        if x.device != q.device:
            raise ValueError(f"{name} must be on {q.device} like q, got {x.device}; move it")
    if q.is_cuda and q.shape[0] * q.shape[1] > MOST_ITEMS:
        raise ValueError(
            f"q must have at most {MOST_ITEMS} batch rows times heads on a GPU, got {q.shape[0]} "
            f"times {q.shape[1]}; split the batch"
        )
    if v is not None and v.shape != k.shape:
        raise ValueError(f"v must have k's shape {list(k.shape)}, got {list(v.shape)}")
    check_sizes(q, k)
    check_rows(q, k)


def check_sizes(q: Tensor, k: Tensor) -> None:
    """Raise ValueError unless four-dimensional queries and keys belong together."""
    batch, heads, _, dim = q.shape
    if batch == 0 or heads == 0 or dim == 0:
        raise ValueError(
            f"q must have a batch row, a head and a head_dim of at least 1, got {list(q.shape)}"
        )
    if k.shape[0] != batch or k.shape[3] != dim:
        raise ValueError(
            f"k must have shape [{batch}, kv_heads, keys, {dim}] like q, got {list(k.shape)}"
        )
    if k.shape[1] == 0 or heads % k.shape[1]:
        raise ValueError(
            f"q's {heads} heads must be a multiple of k's KV heads, got {k.shape[1]}; pass K and V "
            f"with one head a query head or one a group"
        )


def check_rows(q: Tensor, k: Tensor) -> None:
    """Raise ValueError unless the queries can be those of the last keys."""
    q_len = q.shape[2]
    if q_len > k.shape[2] or q_len == 0:
        raise ValueError(
            f"q must hold 1 to {k.shape[2]} rows (the keys of k, of which they are the last), got "
            f"{q_len}; pass the whole context in k and v"
        )
