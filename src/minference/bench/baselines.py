"""Dense causal attention by every kernel that this machine has, to compare with in the same run."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Dense = Callable[[Tensor, Tensor, Tensor], Tensor]


def _sdpa(backend: SDPBackend) -> Dense:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return attend


def _fa3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from fa3_fwd_interface import flash_attn_func

    out = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=True)
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


def _fa4(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn.cute import flash_attn_func

    out = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=True)
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


def _importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def dense_kernels(device: torch.device) -> dict[str, Dense]:
    """Name and function of each dense kernel that can be tried here; queries and keys are equally
    long. A kernel may still refuse a shape or a dtype."""
    if device.type != "cuda":
        return {"sdpa-cpu": _sdpa(SDPBackend.FLASH_ATTENTION)}
    found: dict[str, Dense] = {
        "sdpa-cudnn": _sdpa(SDPBackend.CUDNN_ATTENTION),
        "sdpa-fa2": _sdpa(SDPBackend.FLASH_ATTENTION),
    }
    if _importable("fa3_fwd_interface"):
        found["fa3"] = _fa3
    if _importable("flash_attn.cute"):
        found["fa4"] = _fa4
    return found
