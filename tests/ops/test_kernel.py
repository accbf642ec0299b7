"""Every kernel that Python launches is compiled as `minference.ops._kernel` says, and no other."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

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
