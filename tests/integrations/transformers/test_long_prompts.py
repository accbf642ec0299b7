"""Long-prompt mode: the same numbers from chunks, memory known before, a model that survives."""

from __future__ import annotations

import gc
import weakref
from functools import cache, partial

import pytest
import torch

import minference
from minference import UnsupportedError
from minference.integrations.transformers import (
    _compat,
    check_memory,
    chunks,
    estimate_memory,
    host_layer,
    memory,
    state,
)
from minference.integrations.transformers.attention import _token_major
from minference.methods import AShape, Dense
from minference.testing import tiny_model

IDS = torch.randint(3, 320, (2, 150), generator=torch.Generator().manual_seed(0))
NARROW = AShape(sink=4, local=64, min_seq_len=0)
FAMILIES = ["llama", "qwen3", "phi3", "glm4", "gemma2", "gpt_oss", "qwen3_moe", "olmo2", "cohere2"]
FAMILIES += ["llama4_text"]


def mask() -> torch.Tensor:
    keep = torch.ones_like(IDS)
    keep[1, :20] = 0
    return keep


def pristine(model: torch.nn.Module) -> bool:
    return all(
        "forward" not in module.__dict__
        and not module._forward_hooks
        and not module._forward_pre_hooks
        for module in model.modules()
    )


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_give_the_same_numbers(family: str, rows: int) -> None:
    model = tiny_model(family)
    given = {"input_ids": IDS[-rows:], "attention_mask": mask()[-rows:]}
    real = given["attention_mask"].bool()
    with torch.no_grad():
        before = model(**given).logits
        hooks = [dict(module._forward_hooks) for module in model.modules()]
        with minference.attach(model, NARROW, dense_from=2):
            plain = model(**given).logits[real]
        with minference.attach(model, NARROW, dense_from=2, chunk_tokens=37, kv="host") as handle:
            got = model(**given).logits[real]
            assert len(handle._undo) > 4
        torch.testing.assert_close(got, plain, atol=1e-4, rtol=1e-4)
        assert torch.equal(model(**given).logits, before)
    assert hooks == [dict(module._forward_hooks) for module in model.modules()]
    assert not state.attached()


def test_compiled_chunks_give_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen3", num_hidden_layers=5)
    torch._dynamo.reset()
    # without the minute that a C++ compiler takes
    monkeypatch.setattr(chunks, "_compiled", cache(partial(torch.compile, backend="eager")))
    with torch.no_grad():
        plain = model(IDS[:1]).logits
        with minference.attach(model, Dense(), chunk_tokens=37, fuse=True):
            got = model(IDS[:1]).logits
        again = model(IDS[:1]).logits
    torch.testing.assert_close(got, plain, atol=1e-4, rtol=1e-4)
    assert torch.equal(again, plain)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 4 <= graphs <= 6  # norms of three shapes, MLP, rotary: whatever the number of layers
    with torch.no_grad(), minference.attach(model, Dense(), chunk_tokens=37, fuse=True):
        model(IDS[:1, :120])
    # whatever the length too
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_what_torch_keeps_pinned_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    before = memory.free_memory(torch.device("cpu"))
    stats = {"allocated_bytes.current": 9 << 40, "active_bytes.current": 1 << 40}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "host_memory_stats", lambda: stats)
    assert memory.free_memory(torch.device("cpu")) > before + (7 << 40)
    # torch 2.11 says so of memory that it has given back
    stats["allocated_bytes.current"] = 0
    assert memory.free_memory(torch.device("cpu")) > before - (1 << 39)


def test_a_cache_in_a_cycle_is_collected_before_a_prompt_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Held:
        """A cache whose layers know each other."""

    held = Held()
    held.self = held
    alive = weakref.ref(held)
    del held
    monkeypatch.setattr(memory, "free_memory", lambda device: 0 if alive() else 1 << 40)
    gc.disable()
    try:
        assert memory.check_memory(tiny_model(), 1000).new > 0
    finally:
        gc.enable()
    assert alive() is None


def test_bad_fuse_without_chunks() -> None:
    with pytest.raises(ValueError, match="chunk_tokens=8192"):
        minference.attach(tiny_model(), NARROW, fuse=True)


def test_nothing_is_left_of_the_mode() -> None:
    model = tiny_model()
    assert pristine(model)
    handle = minference.attach(model, NARROW, chunk_tokens=37, kv="host_fp8")
    assert not pristine(model)
    handle.detach()
    assert pristine(model)
    scope = type(model.model.layers[0].self_attn).forward.__globals__
    assert scope["apply_rotary_pos_emb"].__module__.startswith("transformers")


@pytest.mark.parametrize("rows", [1, 2])
def test_scratch_is_bounded_by_the_chunk(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen3")
    longest = {"act": 0, "norm": 0, "rotary": 0}
    layer = model.model.layers[0]
    rotary = _compat.with_rotary

    def note(name: str, length: int) -> None:
        longest[name] = max(longest[name], length)

    layer.mlp.act_fn.register_forward_pre_hook(lambda _, x: note("act", x[0].shape[:-1].numel()))
    norm = type(layer.input_layernorm).forward
    monkeypatch.setattr(
        type(layer.input_layernorm),
        "forward",
        lambda self, x: note("norm", max(x.shape[:-1])) or norm(self, x),
    )

    def watched(module: torch.nn.Module, change: object) -> object:
        return rotary(
            module,
            lambda plain: change(lambda q, *rest: note("rotary", q.shape[2]) or plain(q, *rest)),
        )

    monkeypatch.setattr(_compat, "with_rotary", watched)
    with torch.no_grad(), minference.attach(model, NARROW, chunk_tokens=37):
        model(IDS[:rows])
    assert longest == {"act": 37, "norm": 37, "rotary": 37}


def test_the_answer_takes_the_memory_of_the_queries() -> None:
    query = torch.randn(1, 9, 4, 8).transpose(1, 2)
    out, expected = torch.randn(1, 4, 9, 8), query.clone()
    alone = _token_major(out, query, state.State(NARROW))
    assert torch.equal(query, expected)
    with torch.no_grad():
        got = _token_major(out, query, state.State(NARROW, reuse=True))
    assert torch.equal(got, alone)
    assert got.is_contiguous()
    assert got.data_ptr() == query.data_ptr() != alone.data_ptr()


def test_gradients_pass_through_whole() -> None:
    model = tiny_model()
    before = model(IDS).logits
    with minference.attach(model, NARROW, chunk_tokens=37):
        out = model(IDS).logits
        out.sum().backward()
    torch.testing.assert_close(out, before, atol=1e-4, rtol=1e-4)


def test_running_out_half_way_leaves_the_model_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    options = {"dense_from": 2, "chunk_tokens": 37, "kv": "host", "record": True}
    with torch.no_grad(), minference.attach(model, NARROW, **options) as handle:
        expected = model(IDS).logits
        second = model.model.layers[2].mlp.down_proj

        def fails(x: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError("full")

        with monkeypatch.context() as patch:
            patch.setitem(second.__dict__, "forward", fails)
            with pytest.raises(torch.OutOfMemoryError):
                model(IDS)
        assert torch.equal(model(IDS).logits, expected)
        assert [row["layer"] for row in handle.records] == [0, 1, 2, 3]
    assert pristine(model)


def test_a_prompt_that_cannot_fit_says_so_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    monkeypatch.setattr(memory, "free_memory", lambda device: 100_000)
    calls: list[int] = []
    with torch.no_grad(), minference.attach(model, NARROW, on_layer=calls.append):
        with pytest.raises(UnsupportedError, match=r"150 tokens.*on the host.*chunk_tokens=8192"):
            model(IDS)
        assert calls == []
        monkeypatch.setattr(memory, "free_memory", lambda device: 1 << 40)
        model(IDS)
    assert len(calls) == 4


def test_a_prompt_beyond_the_models_limit_is_refused() -> None:
    model = tiny_model(max_position_embeddings=100)
    refused = pytest.raises(ValueError, match="150 tokens and the model takes 100; cut it")
    with minference.attach(model, NARROW), refused:
        model(IDS)


def test_the_remedy_is_what_helps() -> None:
    model = tiny_model()
    need = estimate_memory(model, 1000, logits=1000)
    assert memory._remedy(need).startswith("logits_to_keep=1, chunk_tokens=8192, kv='host', or")
    need = estimate_memory(model, 1000)
    assert memory._remedy(need, chunk_tokens=9, kv="host") == "kv='host_fp8', or a shorter prompt"
    assert memory._remedy(need, chunk_tokens=9, kv="host_fp8") == "a shorter prompt"
    assert check_memory(model, 1000) == need


def test_the_estimate_is_that_of_the_arithmetic() -> None:
    """Llama-3-8B at a million tokens, without its weights: 128 GiB of keys and values in bf16."""
    big = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    big |= {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    with torch.device("meta"):
        model = tiny_model("llama", vocab_size=1024, **big).to(torch.bfloat16)
    gib, million = 1 << 30, 1 << 20
    plain = estimate_memory(model, million, logits=million)
    assert plain.cache == 128 * gib
    assert plain.activations > 84 * gib
    assert plain.logits == 2 * gib
    slim = estimate_memory(model, million, chunk_tokens=8192, kv="host")
    assert slim.cache == 8 * gib
    assert slim.host == 128 * gib
    assert slim.weights + slim.new == slim.total
    assert 32 * gib <= slim.activations < 34 * gib
    fp8 = estimate_memory(model, million, chunk_tokens=8192, kv="host_fp8")
    assert fp8.host == 66 * gib


def test_pieces_fill_the_memory_that_they_take() -> None:
    """Pinned memory comes in powers of two, so heads of 96 would waste a third of it."""
    with torch.device("meta"):
        model = tiny_model("llama", num_key_value_heads=4, head_dim=96).to(torch.bfloat16)
    tokens = 1_000_000
    own = 4 * 2 * 4 * 96 * 2 * tokens  # layers, keys and values, heads, dims, bytes
    assert own <= estimate_memory(model, tokens, kv="host").host < 1.02 * own
    step = host_layer.piece_tokens(4 * 96 * 2)
    assert step <= host_layer.SEGMENT < 2 * step


def test_models_on_several_devices_are_not_judged_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    monkeypatch.setattr(memory, "free_memory", lambda device: 0)
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}
    with torch.no_grad(), minference.attach(model, Dense(min_seq_len=0)):
        model(IDS)


def test_chunks_of_no_token_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        chunks.chunk_token_wise(tiny_model(), 0)
    model = tiny_model("qwen3_moe")
    refused = pytest.raises(UnsupportedError, match="router logits")
    with minference.attach(model, NARROW, chunk_tokens=9), refused:
        model(IDS, output_router_logits=True)
    model.config.output_router_logits = True
    refused = pytest.raises(UnsupportedError, match="router logits")
    with minference.attach(model, NARROW, chunk_tokens=9), refused:
        model(IDS)
