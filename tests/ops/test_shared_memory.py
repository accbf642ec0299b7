"""The kernels of a call fit the shared memory of GPUs that the tests do not run on."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minference.errors import UnsupportedError
from minference.ops._dispatch import resolve_impl, why_not_triton
from minference.ops._triton import MAX_HEAD_DIM, WIDE_DIM, WIDE_FP32

A100, A10, L4, B200, RTX_50 = 163 << 10, 99 << 10, 99 << 10, 227 << 10, 99 << 10
"""Shared memory that a program may have, NVIDIA's CUDA programming guide, compute capabilities."""


@pytest.mark.parametrize(
    ("capability", "dim", "dtype", "most"),
    [
        (86, 256, "bfloat16", A10),
        (89, 256, "bfloat16", L4),
        (100, 128, "bfloat16", B200),
        (120, 256, "bfloat16", RTX_50),
        (80, 256, "float32", WIDE_FP32),
    ],
)
def test_kernels_fit_other_gpus(capability: int, dim: int, dtype: str, most: int) -> None:
    program = Path(__file__).with_name("compile_call.py")
    plain = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(program), str(capability), str(dim), dtype],
        env=plain, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    shared = [(name, int(size)) for name, size in map(str.split, done.stdout.splitlines())]
    attention = "sparse_attention_exact" if dtype == "float32" else "_sparse_attention"
    kernels = {"_line_sums", "sum_rows", "rate_cells", "score_candidates", "_join_samples"}
    assert kernels | {attention} <= {name for name, _ in shared}
    assert not [(name, size) for name, size in shared if size > most]


def test_fp32_of_wide_heads_is_refused_where_it_does_not_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))

    def reason(shared: int, dtype: torch.dtype, head_dim: int) -> str | None:
        gpu = SimpleNamespace(shared_memory_per_block_optin=shared)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
        return why_not_triton(device, dtype, head_dim)

    assert reason(A100, torch.float32, 256) is None
    assert reason(L4, torch.float32, WIDE_DIM) is None
    assert reason(L4, torch.bfloat16, 256) is None
    why = reason(L4, torch.float32, WIDE_DIM + 1)
    assert why is not None
    assert "takes 144 KiB of shared memory, this GPU has 99" in why
    with pytest.raises(UnsupportedError, match="144 KiB"):
        resolve_impl("triton", device, torch.float32, WIDE_DIM + 1)
    assert resolve_impl("auto", device, torch.float32, WIDE_DIM + 1) == "torch"
    assert resolve_impl("auto", device, torch.float32, WIDE_DIM) == "triton"


def test_wider_heads_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    device, wide = torch.device("cuda"), MAX_HEAD_DIM + 64
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert why_not_triton(device, torch.bfloat16, MAX_HEAD_DIM) is None
    assert resolve_impl("auto", device, torch.bfloat16, wide) == "torch"
    with pytest.raises(UnsupportedError, match="head dims up to 256, got 320"):
        resolve_impl("triton", device, torch.bfloat16, wide)
