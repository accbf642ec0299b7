"""Benchmarks at sizes that a CPU does in a moment, on the CPU wherever the tests run."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
