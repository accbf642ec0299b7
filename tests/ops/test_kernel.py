"""Every kernel that Python launches is compiled as `minference.ops._kernel` says, and no other, and
runs where its tensors are."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

OPS = Path(__file__).parents[2] / "src" / "minference" / "ops"
NODES = [node for path in OPS.rglob("triton*.py") for node in ast.walk(ast.parse(path.read_text()))]


def launched() -> Iterator[str]:
    """Names of `name[grid](...)`."""
    for node in NODES:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
            assert isinstance(node.func.value, ast.Name)
            yield node.func.value.id


def decorated(by: str) -> Iterator[str]:
    """Functions that such a decorator stands over, with or without options."""
    for node in NODES:
        if isinstance(node, ast.FunctionDef):
            plain = [x.func if isinstance(x, ast.Call) else x for x in node.decorator_list]
            if by in map(ast.unparse, plain):
                yield node.name


def test_what_is_launched_is_a_kernel_and_the_rest_is_not() -> None:
    kernels, parts = set(decorated("kernel")), set(decorated("triton.jit"))
    assert kernels == set(launched())
    assert len(parts) > len(kernels) > 20


def said_to_be_on(gpu: int) -> torch.Tensor:
    """A tensor of the CPU that names a GPU as its own, which need not exist."""
    claim = type("Claim", (torch.Tensor,), {"device": torch.device("cuda", gpu)})
    return torch.empty(1).as_subclass(claim)


def test_a_kernel_runs_on_the_gpu_of_its_first_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from minference.ops._kernel import _gpu_of

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    here, there = said_to_be_on(0), said_to_be_on(1)
    guard = _gpu_of((3, there, here))
    assert isinstance(guard, torch.cuda.device)
    assert guard.idx == 1
    assert not isinstance(_gpu_of((here, there)), torch.cuda.device)
    assert not isinstance(_gpu_of((torch.empty(1), there)), torch.cuda.device)
