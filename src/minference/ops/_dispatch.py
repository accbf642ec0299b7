"""On which device something is computed, and by which implementation: an explicit choice is kept or
refused, never bent."""

import functools
import importlib.util
import os

import torch

from minference import env
from minference.errors import UnsupportedError, unknown_name
from minference.log import info_once
from minference.ops._triton import MAX_HEAD_DIM, WIDE_DIM, WIDE_FP32

Reason = str | None


def default_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def why_not_triton(device: torch.device, dtype: torch.dtype, head_dim: int = 0) -> Reason:
    """Why the Triton kernels cannot serve tensors of this device, dtype and head dim; None if they
    can."""
    if not _has_triton():
        return "triton is not installed (pip install 'minference[triton]')"
    if device.type == "cpu":
        if not interpreted():
            return "Triton needs a GPU (or TRITON_INTERPRET=1 set before the first import)"
        if dtype == torch.bfloat16:
            return "Triton's interpreter computes bfloat16 wrongly; use float16 or float32 there"
        if dtype == torch.float8_e4m3fn:
            return "Triton's interpreter rounds to e4m3 wrongly; use precision='native' there"
    elif device.type != "cuda":
        return f"Triton kernels run on cuda devices, got {device.type}"
    elif head_dim > MAX_HEAD_DIM:
        return f"the Triton kernels take head dims up to {MAX_HEAD_DIM}, got {head_dim}"
    elif dtype == torch.float8_e4m3fn and torch.cuda.get_device_capability(device) < (8, 9):
        return "fp8 needs a GPU of compute capability 8.9 or newer; use precision='native'"
    elif dtype == torch.float32 and head_dim > WIDE_DIM:
        shared = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
        if shared < WIDE_FP32:
            return (
                f"fp32 with head dims above {WIDE_DIM} takes {WIDE_FP32 >> 10} KiB of shared "
                f"memory, this GPU has {shared >> 10}; bf16 and fp16 take less"
            )
    return None


def why_not_hopper(device: torch.device, dtype: torch.dtype, head_dim: int) -> Reason:
    """Why the Hopper kernel cannot serve such a call; None if it can."""
    if device.type != "cuda":
        return f"the Hopper kernel needs a cuda device of compute capability 9.0, got {device.type}"
    if importlib.util.find_spec("minference.ops.attention.hopper") is None:
        return "the Hopper kernel is not part of this build"
    from minference.ops.attention import hopper

    return hopper.why_not(device, dtype, head_dim)


def check_impl(impl: str) -> None:
    """Raises ValueError unless there is an implementation of that name."""
    if impl not in env.IMPLS:
        raise unknown_name("impl", impl, env.IMPLS)


def resolve_impl(impl: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """The name of the implementation to run: "reference", "torch", "triton" or "hopper".

    "auto" takes the fastest that can serve the call and says once at INFO why a faster one was
    passed over; MINFERENCE_IMPL replaces "auto" only.

    Raises:
        ValueError: an unknown name.
        UnsupportedError: an explicit choice that cannot serve the call.
    """
    check_impl(impl)
    by_variable = impl == "auto" and env.impl() != "auto"
    impl = env.impl() if by_variable else impl
    if impl == "auto":
        return _fastest(device, dtype, head_dim)
    reasons = {
        "triton": lambda: why_not_triton(device, dtype, head_dim),
        "hopper": lambda: why_not_hopper(device, dtype, head_dim),
    }
    reason = reasons[impl]() if impl in reasons else None
    if reason and by_variable:
        raise UnsupportedError(f"MINFERENCE_IMPL={impl} cannot run here: {reason}; unset it")
    if reason:
        raise UnsupportedError(f"impl={impl!r} cannot run here: {reason}; {_others(device, dtype)}")
    if by_variable:
        info_once(f"MINFERENCE_IMPL={impl} stands for impl='auto'")
    return impl


def _others(device: torch.device, dtype: torch.dtype) -> str:
    """What to ask for instead of an implementation that cannot serve the call."""
    if dtype != torch.float8_e4m3fn or device.type == "cpu":
        return "impl='auto' can"
    reason = why_not_triton(device, dtype)
    return "for fp8 use impl='triton'" if reason is None else reason


def _fastest(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    if device.type != "cuda":
        return "torch"
    reason = why_not_hopper(device, dtype, head_dim)
    if reason is None:
        return "hopper"
    info_once(f"sparse attention without the Hopper kernel: {reason}")
    reason = why_not_triton(device, dtype, head_dim)
    if reason is None:
        return "triton"
    if dtype == torch.float8_e4m3fn:
        raise UnsupportedError(f"precision='fp8' cannot run here: {reason}")
    info_once(f"sparse attention without Triton: {reason}")
    return "torch"
