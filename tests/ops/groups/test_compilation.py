"""A prompt of another length waits for no compiler."""

import pytest
import torch

from minference.methods import Grouped
from minference.testing import context_for, layout_of, random_qkv


@pytest.mark.gpu
@pytest.mark.parametrize(("candidates", "early"), [(0, 0), (64, 0), (64, 3)])
def test_other_lengths_compile_nothing_new(
    candidates: int, early: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton

    compiled: list[str] = []
    hook = lambda **found: compiled.append(found["fn"].name)  # noqa: E731
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", hook)
    method = Grouped(candidates=candidates, early=early, last=0)
    for length in (9000, 9001, 9008, 9216, 12000):
        new = len(compiled)
        q, k, _ = random_qkv(8, 2, length, dim=128, dtype=torch.bfloat16, device="cuda")
        for chunk in (length, length - 8000, 400):
            part = q[:, :, -chunk:]
            method.build_index(part, k, context_for(layout_of(part, k), 8, dim=128))
        assert length == 9000 or compiled[new:] == []
    assert compiled
