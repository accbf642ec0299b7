"""Caches, compilation and placements that the host brings, each equal to its own dense run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, CompileConfig

import minference
from minference.head_patterns import default_patterns
from minference.methods import AShape, Dense, MInference
from minference.patterns import VerticalSlash
from minference.testing import tiny_model

IDS = torch.randint(3, 320, (1, 300), generator=torch.Generator().manual_seed(0))
OPTIONS = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 5, "do_sample": False}
FULL = MInference(patterns=default_patterns(4, 4, VerticalSlash(4096, 4096)), min_seq_len=0)
NARROW = AShape(sink=4, local=64, min_seq_len=0)


def agree(model: Any, **options: Any) -> None:
    """Sparse at full density gives the same tokens as the model alone, and a sparse run ends."""
    ids = IDS.to(model.device)
    options |= OPTIONS | {"attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, **options)
    with minference.attach(model, FULL, dense_from=2, record=True) as handle:
        assert torch.equal(model.generate(ids, **options), expected)
        assert len(handle.indices) == 4
    assert torch.equal(model.generate(ids, **options), expected)


def test_a_quantised_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optimum.quanto", reason="needs optimum-quanto, the cache's backend")
    from optimum.quanto.library.extensions import get_extension

    def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
        assert bits == 4
        return torch.cat([packed & 15, packed >> 4])

    # in place of the extension that quanto would compile for half a minute
    monkeypatch.setattr(get_extension("quanto_cpp"), "_lib", SimpleNamespace(unpack=unpack))
    settings = {"backend": "quanto", "nbits": 4, "residual_length": 128}
    agree(tiny_model(), cache_implementation="quantized", cache_config=settings)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="transformers offloads to CUDA streams")
def test_the_offloaded_cache() -> None:
    model = tiny_model().cuda()
    ids = IDS.cuda()
    options = {**OPTIONS, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, **options, cache_implementation="offloaded")
    with minference.attach(model, FULL, dense_from=2):
        got = model.generate(ids, **options, cache_implementation="offloaded")
    assert torch.equal(got, expected)


def test_compiled_decoding_is_one_graph() -> None:
    model = tiny_model()
    compiling = CompileConfig(backend="eager", mode=None, fullgraph=True)
    compiling._compile_all_devices = True
    options = {**OPTIONS, "cache_implementation": "static"}
    with minference.attach(model, NARROW, dense_from=2):
        expected = model.generate(IDS, **options, disable_compile=True)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        got = model.generate(IDS, **options, compile_config=compiling)
    assert torch.equal(got, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
def test_models_placed_by_accelerate(tmp_path: Path, device_map: Any) -> None:
    tiny_model().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    agree(model)


def test_layers_offloaded_by_accelerate() -> None:
    from accelerate import cpu_offload

    model = tiny_model()
    with minference.attach(model, NARROW, dense_from=2), torch.no_grad():
        expected = model(IDS).logits
    model = cpu_offload(tiny_model(), execution_device=torch.device("cpu"))
    held = [module for module in model.modules() if "forward" in module.__dict__]
    assert held
    before = [module.forward for module in held]
    with torch.no_grad():
        with minference.attach(model, NARROW, dense_from=2, chunk_tokens=37, kv="host"):
            torch.testing.assert_close(model(IDS).logits, expected, atol=1e-5, rtol=1e-5)
        assert [module.forward for module in held] == before


def test_a_conversation_in_turns_on_one_cache() -> None:
    model = tiny_model()
    turns = IDS.split([120, 1, 100, 79], dim=1)
    with torch.no_grad():
        whole = model(IDS).logits
        for kv in ("device", "host"):
            with minference.attach(model, Dense(min_seq_len=0), kv=kv):
                cache, logits = None, []
                for turn in turns:
                    out = model(turn, past_key_values=cache, use_cache=True)
                    cache = out.past_key_values
                    logits.append(out.logits)
            torch.testing.assert_close(torch.cat(logits, 1), whole, atol=1e-4, rtol=1e-4)
