"""Models and calls that are rare: served as dense attention has it, or refused with a remedy."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    CompileConfig,
    DynamicCache,
)

from minference.errors import UnsupportedError
from minference.head_patterns import default_patterns
from minference.integrations.transformers import _compat, attach
from minference.methods import AShape, Method, MInference
from minference.patterns import VerticalSlash
from minference.testing import tiny_model

IDS = torch.randint(3, 320, (1, 300), generator=torch.Generator().manual_seed(0))
NARROW = AShape(sink=4, local=64, min_seq_len=0)
CLOSE = {"atol": 1e-3, "rtol": 1e-3}
UNUSUAL: dict[str, dict[str, Any]] = {
    # asks for attention twice with the same queries
    "diffllama": {},
    # an MLP's width for each layer; rotates q and k one by one
    "gemma3n_text": {
        "head_dim": 16,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 320,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 50,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    # values wider than keys
    "deepseek_v3": {
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "head_dim": 8,
        "v_head_dim": 32,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "num_key_value_heads": 4,
        "first_k_dense_replace": 4,
    },
    # another head dim in layers without a window
    "gemma4_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 50,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 320,
        "num_kv_shared_layers": 0,
        "global_head_dim": 32,
    },
}


def everything(model: Any) -> Method:
    config = model.config
    lines = VerticalSlash(4096, 4096)
    patterns = default_patterns(config.num_hidden_layers, config.num_attention_heads, lines)
    return MInference(patterns=patterns, min_seq_len=0)


@pytest.mark.parametrize("family", UNUSUAL)
@pytest.mark.parametrize("chunk_tokens", [None, 64])
@torch.no_grad()
def test_unusual_attention_is_as_dense(family: str, chunk_tokens: int | None) -> None:
    model = tiny_model(family, **UNUSUAL[family])
    if not _compat.reaches_interface(model):
        pytest.skip("an older transformers has its own attention there")
    expected = model(IDS).logits
    with attach(model, everything(model), dense_from=2, chunk_tokens=chunk_tokens):
        torch.testing.assert_close(model(IDS).logits, expected, **CLOSE)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_training_is_dense(reentrant: bool) -> None:
    model = tiny_model("llama").train()
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    enable = getattr(model, f"{kind}_checkpointing_enable")
    enable(**{f"{kind}_checkpointing_kwargs": {"use_reentrant": reentrant}})
    model.enable_input_require_grads()
    expected = model(IDS, use_cache=False).logits
    with attach(model, NARROW, dense_from=2, record=True) as handle:
        out = model(IDS, use_cache=False).logits
        assert handle.records == []
        torch.testing.assert_close(out, expected, **CLOSE)


def test_gradients_of_values_alone_are_dense() -> None:
    model = tiny_model("llama").requires_grad_(False)
    model.model.layers[0].self_attn.v_proj.requires_grad_(True)
    with attach(model, NARROW, dense_from=2):
        model(IDS).logits.sum().backward()
    assert bool(model.model.layers[0].self_attn.v_proj.weight.grad.any())


@torch.no_grad()
def test_masks_of_four_dimensions_are_exact_or_refused() -> None:
    model = tiny_model("llama")
    causal = torch.ones(300, 300, dtype=torch.bool).tril()[None, None]
    seen = causal & (torch.rand(300, 300, generator=torch.Generator().manual_seed(1)) < 0.7)
    seen |= torch.eye(300, dtype=torch.bool)
    added = torch.zeros(1, 1, 300, 300).masked_fill(~seen, torch.finfo(torch.float32).min)
    expected = model(IDS, attention_mask=added).logits
    with attach(model, NARROW):
        for given in (seen, added):
            torch.testing.assert_close(model(IDS, attention_mask=given).logits, expected, **CLOSE)
        for given in (added - 0.5 * seen, seen.long()):
            with pytest.raises(UnsupportedError, match="must be boolean, or 0 where a key is seen"):
                model(IDS, attention_mask=given)


@torch.no_grad()
def test_what_else_a_model_hands_to_attention_is_refused() -> None:
    model = tiny_model("llama")
    with attach(model, NARROW), pytest.raises(UnsupportedError, match="hands position_bias to"):
        model(IDS, position_bias=torch.zeros(1))


@pytest.mark.skipif("deepseek_v32" not in CONFIG_MAPPING, reason="an older transformers")
def test_models_that_choose_keys_themselves_are_refused() -> None:
    config = AutoConfig.for_model("deepseek_v32", num_hidden_layers=1, vocab_size=320)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UnsupportedError, match="chooses keys by an indexer"):
        attach(model, NARROW)


@pytest.mark.parametrize("wrong", [AShape, 3])
def test_a_method_that_is_none_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match="method must be a name or an instance"):
        attach(tiny_model("llama"), wrong)
    with pytest.raises(TypeError, match="attach expects a model of transformers, got Linear"):
        attach(torch.nn.Linear(2, 2), NARROW)  # type: ignore[arg-type]


def test_an_attached_model_is_not_copied() -> None:
    model = tiny_model("llama")
    with attach(model, NARROW):
        for whole in (copy.deepcopy, lambda x: torch.save(x, io.BytesIO())):
            with pytest.raises(UnsupportedError, match="detach it first and attach the copy"):
                whole(model)
    copy.deepcopy(model)


@pytest.mark.skipif(
    not hasattr(DynamicCache, "activate_past_recording"),
    reason="an older transformers cannot look up in layers with a window",
)
@pytest.mark.parametrize("family", ["mistral", "gemma2"])
@torch.no_grad()
def test_prompt_lookup_with_keys_on_the_host(family: str) -> None:
    model = tiny_model(family, sliding_window=50)
    how = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = model.generate(IDS, prompt_lookup_num_tokens=4, **how)
    with attach(model, everything(model), dense_from=2, kv="host"):
        assert torch.equal(model.generate(IDS, prompt_lookup_num_tokens=4, **how), expected)


@torch.no_grad()
def test_a_cache_given_by_position_goes_to_the_host() -> None:
    model = tiny_model("llama")
    expected = model(IDS).logits
    with attach(model, everything(model), kv="host"):
        out = model(IDS, torch.ones_like(IDS), None, DynamicCache(config=model.config))
    torch.testing.assert_close(out.logits, expected, **CLOSE)
    assert type(out.past_key_values.layers[0]).__name__ == "HostLayer"


@torch.no_grad()
def test_compiled_decoding_leaves_chunks_whole() -> None:
    model = tiny_model("llama")
    how = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 4, "do_sample": False}
    how["cache_implementation"] = "static"
    compiled = CompileConfig(backend="eager", mode=None, fullgraph=True)
    compiled._compile_all_devices = True
    with attach(model, NARROW, dense_from=2, chunk_tokens=64):
        expected = model.generate(IDS, **how, disable_compile=True)
        torch._dynamo.reset()
        assert torch.equal(model.generate(IDS, **how, compile_config=compiled), expected)


@torch.no_grad()
def test_a_packed_forward_does_not_mark_the_next() -> None:
    model = tiny_model("llama")
    packed = torch.cat([torch.arange(150), torch.arange(150)])[None]
    keep = torch.ones_like(IDS)
    keep[:, :20] = 0
    with attach(model, NARROW, dense_from=2, record=True) as handle:
        model(IDS, position_ids=packed, use_cache=False)
        assert handle.records == []
        model(IDS, attention_mask=keep)
        assert len(handle.records) == 4


@torch.no_grad()
def test_a_mask_shorter_than_the_context_is_refused() -> None:
    model = tiny_model("llama")
    short = torch.ones(1, 280, dtype=torch.long)
    with attach(model, NARROW):
        cache = model(IDS[:, :280]).past_key_values
        with pytest.raises(ValueError, match=r"must cover the 300 tokens .*, got 280"):
            model(IDS[:, 280:], attention_mask=short, past_key_values=cache)


def test_another_attention_that_the_user_set_stays() -> None:
    model = tiny_model("llama")
    with attach(model, NARROW):
        model.set_attn_implementation("sdpa")
    assert model.config._attn_implementation == "sdpa"


@torch.no_grad()
def test_packing_shows_where_the_first_layer_is_not_served() -> None:
    kinds = ["sliding_attention", "full_attention"] * 2
    model = tiny_model("gemma3_text", layer_types=kinds, sliding_window=50)
    packed = torch.cat([torch.arange(150), torch.arange(150)])[None]
    cache = DynamicCache(config=model.config)
    with attach(model, NARROW, dense_from=2, record=True) as handle:
        model(IDS, position_ids=packed, past_key_values=cache)
        assert handle.records == []
        model(IDS)
        assert len(handle.records) == 2


@torch.no_grad()
def test_a_first_token_alone_goes_to_the_host_too() -> None:
    model = tiny_model("llama")
    expected = model(IDS).logits
    with attach(model, everything(model), kv="host"):
        first = model(IDS[:, :1])
        assert type(first.past_key_values.layers[0]).__name__ == "HostLayer"
        rest = model(IDS[:, 1:], past_key_values=first.past_key_values)
    torch.testing.assert_close(rest.logits, expected[:, 1:], **CLOSE)


@torch.no_grad()
def test_attention_weights_are_not_silently_missing() -> None:
    model = tiny_model("llama")
    with attach(model, NARROW), pytest.raises(UnsupportedError, match="all attention weights"):
        model(IDS, output_attentions=True)


def test_a_mask_that_a_model_makes_itself_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="a mask or a cache of its own"):
        attach(tiny_model("doge", sliding_window=50), NARROW)


@torch.no_grad()
def test_a_layer_without_a_number_is_refused() -> None:
    options = {"n_mamba_heads": 2, "mamba_d_state": 8, "use_mamba_kernels": False}
    options |= {"layers_block_type": ["mamba", "hybrid"] * 2, "attention_head_dim": 32}
    model = tiny_model("zamba", num_key_value_heads=4, **options)
    with attach(model, NARROW), pytest.raises(UnsupportedError, match="which layer it is"):
        model(IDS)


@torch.no_grad()
def test_wrapped_models_are_refused() -> None:
    model = tiny_model()
    wrapped = torch.compile(model, backend="eager")
    with pytest.raises(TypeError, match=r"got OptimizedModule; .* \(_orig_mod of"):
        attach(wrapped, NARROW)
    with attach(wrapped._orig_mod, NARROW):
        assert model(IDS).logits.isfinite().all()
