"""The model under a method: same logits where everything is kept, and restored afterwards."""

import pytest
import torch

from minference.errors import UnsupportedError
from minference.eval.attention import attending
from minference.eval.runner import Subject
from minference.methods import AShape, Dense

IDS = torch.arange(300)[None] * 7 % 256


@pytest.mark.parametrize("method", [Dense(), AShape(sink=0, local=4096)])
@torch.inference_mode()
def test_full_density_gives_the_models_own_logits(method: AShape | Dense, subject: Subject) -> None:
    model = subject.model
    expected = model(IDS).logits
    with attending(model, method):
        got = model(IDS).logits
    assert torch.allclose(got, expected, atol=1e-4, rtol=1e-4)
    assert model.config._attn_implementation == "sdpa"


@torch.inference_mode()
def test_a_narrow_window_changes_the_logits_and_shows_its_density(subject: Subject) -> None:
    model = subject.model
    with attending(model, AShape(sink=0, local=1)) as recorder:
        got = model(IDS).logits
    assert not torch.allclose(got, model(IDS).logits, atol=1e-2)
    densities = recorder.densities(4)
    assert len(densities) == 4
    assert max(densities) < 0.6


@torch.inference_mode()
def test_batches_and_later_chunks_are_refused(subject: Subject) -> None:
    model = subject.model
    with attending(model, Dense()):
        cache = model(IDS, use_cache=True).past_key_values
        with pytest.raises(UnsupportedError, match="301 keys"):
            model(IDS[:, :1], past_key_values=cache)
        with pytest.raises(UnsupportedError, match="batch of 2"):
            model(IDS.expand(2, -1))
