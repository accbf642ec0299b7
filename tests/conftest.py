"""Shared fixtures and the rules of the test run: interpreted kernels and skips with a reason."""

from __future__ import annotations

import os

import torch

# triton reads the variable when a module with kernels is imported, so it comes before all of them
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable
from importlib.util import find_spec

import pytest
from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds what `.ci/run` asks for where a test's cases differ in numbers alone."""
    parser.addoption("--one-case", action="store_true", help="run the first case of each test")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps one case of each test where that is asked for; skips what this machine cannot run, and
    says why."""
    if config.getoption("one_case"):
        first = {item.nodeid.partition("[")[0]: item for item in reversed(items)}
        config.hook.pytest_deselected(items=sorted(set(items) - set(first.values()), key=str))
        items[:] = reversed(first.values())
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    reasons = {
        "gpu": None if devices >= 1 else "needs a CUDA device",
        "multi_gpu": None if devices >= 2 else f"needs two CUDA devices, found {devices}",
        "vllm": None if find_spec("vllm") else "needs vllm, which is not installed",
    }
    for item in items:
        for marker, reason in reasons.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def device() -> torch.device:
    """The device that tests run on: CUDA where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def nan_poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes fresh memory loud: NaN in floats, an extreme value in integers."""

    def poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def fresh(*args: object, **kwargs: object) -> torch.Tensor:
            out = make(*args, **kwargs)
            if out.is_floating_point():
                return out.fill_(float("nan"))
            if out.dtype == torch.bool or out.is_complex():
                return out
            return out.fill_(torch.iinfo(out.dtype).max)

        return fresh

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, poisoned(getattr(torch.Tensor, name)))
