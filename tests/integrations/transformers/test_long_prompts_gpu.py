"""Copy streams, pinned memory and the memory estimate: what only a GPU can show."""

from __future__ import annotations

import copy
import gc
import threading

import pytest
import torch

import minference
from minference.integrations.transformers import (
    _compat,
    estimate_memory,
    host_layer,
    memory,
    state,
)
from minference.methods import AShape, Grouped
from minference.testing import tiny_model

pytestmark = pytest.mark.gpu
METHOD = AShape(sink=64, local=1024, min_seq_len=4096)
SHAPE = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
SHAPE |= {"num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 1 << 17}
SHAPE |= {"initializer_range": 0.02}


def model_and_ids(tokens: int) -> tuple[torch.nn.Module, torch.Tensor]:
    model = tiny_model("llama", **SHAPE).to("cuda", torch.bfloat16)
    return model, torch.randint(3, 320, (1, tokens), device="cuda")


@pytest.mark.parametrize("chunk", [None, 9000])
def test_the_host_cache_gives_the_same_tokens(
    chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_layer, "SEGMENT", 4096)
    monkeypatch.setattr(host_layer, "TAIL", 8)
    model, ids = model_and_ids(20_000)
    options = {"max_new_tokens": 20, "do_sample": False, "prefill_chunk_size": chunk}
    options |= {"attention_mask": torch.ones_like(ids), "return_dict_in_generate": True}
    with minference.attach(model, METHOD):
        expected = model.generate(ids, **options)
    with minference.attach(model, METHOD, kv="host"):
        got = model.generate(ids, **options)
    assert torch.equal(got.sequences, expected.sequences)
    for own, other in zip(got.past_key_values.layers, expected.past_key_values.layers, strict=True):
        assert own._pieces()[0][0].data.is_pinned()
        assert torch.equal(own.keys, other.keys.cpu())
        assert torch.equal(own.values, other.values.cpu())


def test_host_memory_that_cannot_be_pinned_leaves_the_model_usable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, ids = model_and_ids(20_000)
    to_host, threads, full = host_layer._to_host, set(), False

    def fills_up(x: torch.Tensor, pinned: bool) -> torch.Tensor:
        threads.add(threading.current_thread())
        if full:
            raise torch.OutOfMemoryError("full")
        return to_host(x, pinned)

    monkeypatch.setattr(host_layer, "_to_host", fills_up)
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    with minference.attach(model, METHOD, kv="host_fp8"):
        expected = model.generate(ids, **options)
        full = True
        with pytest.raises(torch.OutOfMemoryError, match="full"):
            model.generate(ids, **options)
        full = False
        assert torch.equal(model.generate(ids, **options), expected)
    assert threading.main_thread() not in threads


def test_a_second_prompt_takes_the_pinned_memory_of_the_first() -> None:
    model, ids = model_and_ids(1 << 17)
    pinned = []
    for _ in range(3):
        with torch.no_grad(), minference.attach(model, METHOD, chunk_tokens=4096, kv="host"):
            out = model(ids, logits_to_keep=1)
        for layer in out.past_key_values.layers:
            layer._settle()
        del out
        gc.collect()
        pinned.append(torch.cuda.host_memory_stats()["allocated_bytes.current"])
    assert pinned[1] == pinned[2]


def test_a_copy_of_the_cache_is_whole() -> None:
    model, ids = model_and_ids(20_000)
    with torch.no_grad(), minference.attach(model, METHOD, kv="host"):
        cache = model(ids, logits_to_keep=1).past_key_values
        own = copy.deepcopy(cache)
        answers = [model(ids[:, :1], past_key_values=x).logits for x in (cache, own)]
    assert torch.equal(*answers)


def test_the_long_mode_takes_what_was_estimated() -> None:
    model, ids = model_and_ids(1 << 17)
    peaks = {}
    modes = {"plain": {}, "long": {"chunk_tokens": 4096, "kv": "host"}}
    for name, mode in modes.items():
        need = estimate_memory(model, ids.shape[1], **mode)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        with torch.no_grad(), minference.attach(model, METHOD, record=True, **mode) as handle:
            before = torch.cuda.memory_allocated()
            out = model(ids, logits_to_keep=1)
            assert all(row["attention_seconds"] > 0 for row in handle.records)
        peaks[name] = torch.cuda.max_memory_allocated() - before
        assert peaks[name] < 1.25 * need.new + (64 << 20)
        del out
    assert peaks["long"] < 0.6 * peaks["plain"]


def test_pinned_memory_that_torch_keeps_is_given_back_when_it_is_missed() -> None:
    host, device = torch.device("cpu"), torch.device("cuda")
    pinned = torch.empty(4 << 30, dtype=torch.uint8, pin_memory=True)
    pinned[:1024].copy_(torch.ones(1024, dtype=torch.uint8, device=device), non_blocking=True)
    torch.cuda.synchronize()
    held = memory.free_memory(host)
    del pinned
    assert memory.free_memory(memory._collected(device, "host")) - held > 3 << 30


def test_without_a_method_a_gpu_is_served_by_grouped() -> None:
    model, ids = model_and_ids(33_280)
    with minference.attach(model, record=True) as handle, torch.no_grad():
        model(ids, use_cache=False, logits_to_keep=1)
        assert state.find(model.config).method == Grouped()
    assert len(handle.records) == 4


@pytest.mark.parametrize("side", ["left", "right"])
def test_short_padded_prompts_write_no_mask(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = model_and_ids(600)
    ids = ids.repeat(2, 1)
    real = torch.ones_like(ids)
    real[0, slice(0, 130) if side == "left" else slice(470, 600)] = 0
    positions = (real.cumsum(dim=1) - 1).clamp(min=0)
    given = {"attention_mask": real, "position_ids": positions, "use_cache": False}
    with torch.no_grad():
        expected = model(ids, **given).logits
        monkeypatch.setattr(_compat, "written_mask", lambda **_: pytest.fail("a written mask"))
        with minference.attach(model):
            got = model(ids, **given).logits
    seen = real.bool()
    torch.testing.assert_close(got[seen], expected[seen], atol=0.05, rtol=0.05)
