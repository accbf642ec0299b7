"""What the attention tests share."""

from __future__ import annotations

import pytest
import torch

from minference.ops._dispatch import interpreted


@pytest.fixture
def e4m3_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds to e4m3 as GPUs do: Triton's interpreter (3.6) drops the carry into the exponent."""
    if not interpreted():
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    wrong = interpreter._convert_float

    def convert(given: np.ndarray, source: object, target: object, mode: object) -> np.ndarray:
        if (source, target) != (tl.float32, tl.float8e4nv):
            return wrong(given, source, target, mode)
        values = torch.from_numpy(given.view(np.float32).copy()).clamp(-448, 448)
        return values.to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", convert)
