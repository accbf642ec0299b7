"""Handles, options, caches and bad input of the transformers integration."""

from __future__ import annotations

import functools
import importlib
import logging

import pytest
import torch

import minference
from minference import UnsupportedError
from minference.head_patterns import default_patterns
from minference.integrations.transformers import _compat, estimate_memory, state
from minference.methods import AShape, Grouped, MInference, TriShape
from minference.methods.thresholds import work
from minference.patterns import VerticalSlash
from minference.testing import tiny_model

IDS = torch.randint(3, 320, (1, 300), generator=torch.Generator().manual_seed(0))
FULL = MInference(patterns=default_patterns(4, 4, VerticalSlash(4096, 4096)), min_seq_len=0)
NARROW = AShape(sink=4, local=64, min_seq_len=0)


# at these lengths every index covers nearly all, and would be served densely
attach = functools.partial(minference.attach, dense_from=2)


def logits(model: torch.nn.Module, ids: torch.Tensor = IDS, **inputs: object) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **inputs).logits


@pytest.fixture
def model() -> torch.nn.Module:
    return tiny_model("llama")


def test_detach_puts_everything_back(model: torch.nn.Module) -> None:
    before = logits(model)
    keys, hooks = set(model.config.__dict__), len(model._forward_hooks)
    handle = attach(model, NARROW, chunk_tokens=64, kv="host")
    assert not torch.allclose(logits(model), before, atol=1e-3)
    handle.detach()
    handle.detach()
    assert torch.equal(logits(model), before)
    assert set(model.config.__dict__) == keys
    assert len(model._forward_hooks) == hooks
    assert not state.attached()
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_two_models_keep_their_methods_apart(model: torch.nn.Module) -> None:
    other = tiny_model("llama")
    alone = {}
    for name, method in (("narrow", NARROW), ("full", FULL)):
        with attach(model, method):
            alone[name] = logits(model)
    with attach(model, NARROW), attach(other, FULL):
        assert torch.equal(logits(other), alone["full"])
        assert torch.equal(logits(model), alone["narrow"])
    assert not torch.allclose(alone["narrow"], alone["full"], atol=1e-3)


def test_records_tell_the_density_of_each_layer(model: torch.nn.Module) -> None:
    with attach(model, NARROW, record=True, starting_layer=1) as handle:
        logits(model)
        densities = [record["density"] for record in handle.records]
    assert densities[0] == 1.0
    assert len(densities) == 4
    assert all(density < 1.0 for density in densities[1:])


def test_fp8_changes_sparse_layers_a_little(model: torch.nn.Module) -> None:
    with attach(model, FULL):
        native = logits(model)
    with attach(model, FULL, precision="fp8"):
        fp8 = logits(model)
    error = (fp8 - native).norm() / native.norm()
    assert 0.1 < error < 0.3
    with attach(model, FULL, precision="fp8", starting_layer=4):
        torch.testing.assert_close(logits(model), native, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="unknown precision 'int8'"):
        attach(model, FULL, precision="int8")
    if not torch.cuda.is_available():
        hopper = attach(model, FULL, precision="fp8", impl="hopper")
        with hopper, pytest.raises(UnsupportedError, match="needs a cuda device"):
            logits(model)


def test_short_prompts_and_the_switch_are_dense(
    model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = logits(model)
    with attach(model, NARROW, min_seq_len=301, record=True) as handle:
        torch.testing.assert_close(logits(model), before, atol=1e-4, rtol=1e-4)
        assert handle.records == []
    monkeypatch.setenv("MINFERENCE_DISABLE", "1")
    with attach(model, NARROW, record=True) as handle:
        torch.testing.assert_close(logits(model), before, atol=1e-4, rtol=1e-4)
        assert handle.records == []


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("chunk", [None, 96])
def test_generate_with_caches_and_chunks(
    model: torch.nn.Module, cache: str, chunk: int | None
) -> None:
    options = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": cache}
    options |= {"disable_compile": True}
    mask = torch.ones_like(IDS)
    expected = model.generate(IDS, attention_mask=mask, **options)
    with attach(model, FULL, record=True) as handle:
        extra = {} if chunk is None else {"prefill_chunk_size": chunk}
        got = model.generate(IDS, attention_mask=mask, **options, **extra)
        assert handle.records
    assert torch.equal(got, expected)


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"prompt_lookup_num_tokens": 3}])
def test_beams_and_assisted_decoding(model: torch.nn.Module, options: dict[str, int]) -> None:
    options = {"max_new_tokens": 5, "do_sample": False, **options}
    mask = torch.ones_like(IDS)
    expected = model.generate(IDS, attention_mask=mask, **options)
    with attach(model, FULL):
        got = model.generate(IDS, attention_mask=mask, **options)
    assert torch.equal(got, expected)


def test_a_second_turn_prefills_against_the_cache(model: torch.nn.Module) -> None:
    whole = logits(model)
    with attach(model, FULL, record=True) as handle, torch.no_grad():
        cache = model(IDS[:, :150]).past_key_values
        second = model(IDS[:, 150:], past_key_values=cache).logits
        assert {index.q_len for _, index in handle.indices} == {150}
    torch.testing.assert_close(second, whole[:, 150:], atol=1e-4, rtol=1e-4)


def test_chunks_agree_with_the_whole_where_indices_do(model: torch.nn.Module) -> None:
    with attach(model, NARROW), torch.no_grad():
        whole = logits(model)
        cache = model(IDS[:, :170]).past_key_values
        second = model(IDS[:, 170:], past_key_values=cache).logits
    torch.testing.assert_close(second, whole[:, 170:], atol=1e-4, rtol=1e-4)


def test_holes_and_packed_prompts_are_dense_with_a_line(
    model: torch.nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    minference.log.forget_messages()
    hole = torch.ones_like(IDS)
    hole[:, 50:60] = 0
    packed = torch.cat([torch.arange(140), torch.arange(160)])[None]
    before = logits(model, attention_mask=hole), logits(model, position_ids=packed, use_cache=False)
    with caplog.at_level(logging.INFO, "minference"), attach(model, NARROW):
        got = (
            logits(model, attention_mask=hole),
            logits(model, position_ids=packed, use_cache=False),
        )
    real = hole.bool()
    torch.testing.assert_close(got[0][real], before[0][real], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got[1], before[1], atol=1e-4, rtol=1e-4)
    assert "padding inside a prompt" in caplog.text
    assert "packed" in caplog.text


def test_training_is_dense(model: torch.nn.Module) -> None:
    before = logits(model)
    with attach(model, NARROW):
        out = model(IDS).logits
        out.sum().backward()
    torch.testing.assert_close(out.detach(), before, atol=1e-4, rtol=1e-4)
    assert model.model.layers[0].self_attn.q_proj.weight.grad is not None


def test_chunked_mlp_changes_nothing(model: torch.nn.Module) -> None:
    with attach(model, NARROW):
        plain = logits(model)
    with attach(model, NARROW, chunk_tokens=37):
        torch.testing.assert_close(logits(model), plain, atol=1e-5, rtol=1e-5)


def test_the_name_alone_works() -> None:
    model = tiny_model("llama")
    before = logits(model)
    model.set_attn_implementation("minference")
    torch.testing.assert_close(logits(model), before, atol=1e-4, rtol=1e-4)
    assert isinstance(state.find(model.config).method, MInference)
    del model


def test_without_a_method_the_default_of_the_device_serves(
    model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    with attach(model):
        method = state.find(model.config).method
    assert isinstance(method, MInference)
    assert method.patterns.shape == (4, 4)
    # the package's name of this module is its function
    module = importlib.import_module("minference.integrations.transformers.attach")
    monkeypatch.setattr(module, "default_method_name", lambda *given: "grouped")
    with attach(model):
        assert state.find(model.config).method == Grouped()


def test_bad_input_is_one_clear_error(model: torch.nn.Module) -> None:
    wrong = MInference(patterns=default_patterns(4, 8))
    with pytest.raises(ValueError, match="4 layers and 4 heads, got 4 and 8"):
        attach(model, wrong)
    with pytest.raises(ValueError, match="did you mean 'a_shape'"):
        attach(model, "a-shape")
    with pytest.raises(ValueError, match="unknown impl 'tritn': did you mean 'triton'"):
        attach(model, TriShape(), impl="tritn")
    with attach(model, TriShape()), pytest.raises(ValueError, match="attached already"):
        attach(model, TriShape())


def test_encoders_and_foreign_models_are_refused(
    model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    with attach(model, NARROW), pytest.raises(UnsupportedError, match="causal"):
        logits(model)
    monkeypatch.setattr(_compat, "reaches_interface", lambda model: False)
    with pytest.raises(UnsupportedError, match="-hf"):
        attach(model, NARROW)


def test_a_model_that_never_calls_us_says_so(
    model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_compat, "set_implementation", lambda config, name: None)
    attach(model, NARROW)
    with pytest.raises(UnsupportedError, match="never called the attention interface"):
        logits(model)
    assert not state.attached()


def test_estimate_counts_weights_and_cache(model: torch.nn.Module) -> None:
    need = estimate_memory(model, 1000)
    assert need.weights == sum(4 * p.numel() for p in model.parameters())
    assert need.cache == 1000 * 4 * 2 * 2 * 16 * 4
    assert estimate_memory(model, 1000, chunk_tokens=10).activations < need.activations


@pytest.mark.parametrize(
    ("queries", "context", "shape", "served"),
    [
        (1 << 14, 1 << 14, (32, 128), True),
        (1 << 14, 1 << 14, (8, 128), False),  # few heads
        (1 << 15, 1 << 15, (8, 128), True),
        (1 << 14, 1 << 14, (16, 256), False),  # wide ones, of which an index takes longer
        (1 << 9, 1 << 17, (32, 128), False),  # a question behind a long context
        (1 << 13, 1 << 17, (32, 128), True),
        (1 << 14, 1 << 14, (), True),  # when only lengths are known they decide
    ],
)
def test_calls_of_little_work_stay_dense_on_a_gpu(
    queries: int,
    context: int,
    shape: tuple[int, ...],
    served: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[str] = []
    monkeypatch.setattr(state, "info_once", told.append)
    assert state.State(Grouped()).sparse(queries, context, "cuda", *shape) == served
    assert len(told) == (not served)
    asked = state.State(Grouped(), min_seq_len=4096), state.State(Grouped(min_seq_len=4096))
    assert all(x.sparse(queries, context, "cuda", *shape) for x in asked)


def test_the_work_of_a_call_is_that_of_all_its_heads(
    model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = IDS.expand(2, -1)
    config = model.config
    done = int(work(300, 300, 2 * config.num_attention_heads, config.head_dim))
    for least, layers in ((done, 4), (done + 1, 0)):
        monkeypatch.setattr(state, "min_work", lambda *_, least=least: least)
        with attach(model, NARROW, record=True) as handle:
            logits(model, ids)
        assert len(handle.records) == layers
