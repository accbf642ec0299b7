"""The published call: `MInference(attn_type, model_name)(model)`."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from minference import MInference, UnsupportedError
from minference.head_patterns import default_patterns
from minference.integrations.transformers.host_cache import is_on_host
from minference.methods import AShape
from minference.testing import tiny_model

NAME = "Qwen/Qwen2.5-7B-Instruct-1M"


def test_an_unfitting_name_gets_default_patterns_and_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    import minference.log

    minference.log.forget_messages()
    model = tiny_model("llama")
    with caplog.at_level(logging.WARNING, "minference"):
        patched = MInference("minference", NAME)(model)
    assert patched is model
    assert "minference search" in caplog.text
    assert model.minference.method.patterns.shape == (4, 4)
    model.minference.detach()


def test_options_reach_the_method() -> None:
    model = MInference("a_shape", attn_kwargs={"sink": 64}, local=256).patch_model(tiny_model())
    assert model.minference.method == AShape(sink=64, local=256)
    model.minference.detach()


def test_a_config_path_must_fit(tmp_path: Path) -> None:
    path = default_patterns(4, 8).save(tmp_path / "patterns.json")
    with pytest.raises(ValueError, match="layers and 4 heads"):
        MInference("minference", NAME, config_path=str(path))(tiny_model())
    path = default_patterns(4, 4).save(tmp_path / "patterns.json")
    model = MInference("minference", NAME, config_path=str(path))(tiny_model())
    model.minference.detach()


def test_what_others_do_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match="kvpress"):
        MInference(kv_type="snapkv")
    with pytest.raises(UnsupportedError, match="minference search"):
        MInference(is_search=True)
    with pytest.raises(ValueError, match="did you mean 'minference'"):
        MInference("minferense")


@pytest.mark.parametrize("attn_type", ["dense", "a_shape"])
def test_kv_cache_cpu_keeps_the_cache_on_the_host(attn_type: str) -> None:
    plain, ids = tiny_model(), torch.arange(3, 40)[None]
    before = set(plain.__dict__)
    expected = plain.generate(ids, max_new_tokens=5, do_sample=False)
    model = MInference(attn_type, kv_cache_cpu=True)(plain)
    out = model.generate(ids, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(out.sequences, expected)
    assert is_on_host(out.past_key_values)
    model.minference.detach()
    assert set(model.__dict__) == before
    assert model.generation_config.cache_implementation is None
    out = model.generate(ids, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    assert not is_on_host(out.past_key_values)
    assert torch.equal(out.sequences, expected)


def test_plain_types_leave_the_model_alone() -> None:
    model = tiny_model()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, MInference("hf")(model)(ids).logits)
