"""Dense causal attention by every kernel that this machine has, to compare with in the same run."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from minference.ops.attention.dense import FLASH3, flash3, sdpa

Dense = Callable[[Tensor, Tensor, Tensor], Tensor]


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
        return {"sdpa-cpu": partial(sdpa, backends=())}
    found: dict[str, Dense] = {
        "sdpa-cudnn": partial(sdpa, backends=[SDPBackend.CUDNN_ATTENTION]),
        "sdpa-fa2": partial(sdpa, backends=[SDPBackend.FLASH_ATTENTION]),
    }
    if FLASH3 is not None:
        found["fa3"] = flash3
    if _importable("flash_attn.cute"):
        found["fa4"] = _fa4
    return found
