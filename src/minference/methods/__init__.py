"""The methods, one file each, and how to get one by name."""

from importlib.metadata import entry_points

import torch

from minference import env
from minference.errors import unknown_name
from minference.methods.a_shape import AShape
from minference.methods.base import Context, Method
from minference.methods.dense import Dense
from minference.methods.dilated import Dilated1, Dilated2
from minference.methods.flexprefill import FlexPrefill
from minference.methods.grouped import Grouped
from minference.methods.minference import MInference
from minference.methods.static import Static
from minference.methods.tri_shape import TriShape
from minference.methods.xattention import XAttention
from minference.ops._dispatch import why_not_triton

__all__ = [
    "AShape",
    "Context",
    "Dense",
    "Dilated1",
    "Dilated2",
    "FlexPrefill",
    "Grouped",
    "MInference",
    "Method",
    "Static",
    "TriShape",
    "XAttention",
    "default_method_name",
    "get_method",
    "method_names",
]

_GROUP = "minference.methods"
_CLASSES = (
    MInference, Grouped, FlexPrefill, XAttention, AShape, TriShape, Dense, Static,
    Dilated1, Dilated2,
)  # fmt: skip
_OWN: dict[str, type[Method]] = {cls.name: cls for cls in _CLASSES}


def method_names() -> list[str]:
    """Names of the built-in methods and of those that installed packages register."""
    return sorted({*_OWN, *(point.name for point in entry_points(group=_GROUP))})


def get_method(name: str) -> type[Method]:
    """The method class of that name.

    Raises:
        ValueError: no such method; the message lists the valid names.
    """
    if name in _OWN:
        return _OWN[name]
    for point in entry_points(group=_GROUP, name=name):
        return point.load()
    raise unknown_name("method", name, method_names())


def default_method_name(device: torch.device, dtype: torch.dtype, impl: str = "auto") -> str:
    """The method where none is named: `grouped` on a GPU that runs Triton's kernels, where it
    answers more and takes less time than `minference` (docs/evaluation.md), which is the one
    elsewhere: on a CPU `grouped` is dense below 48K tokens.

    Args:
        device: of the model.
        dtype: of the model.
        impl: implementation that was asked for, as in `sparse_attention`.
    """
    asked = env.impl() if impl == "auto" else impl
    fused = device.type == "cuda" and asked in ("auto", "triton", "hopper")
    return Grouped.name if fused and why_not_triton(device, dtype) is None else MInference.name
