"""Layers with windows or chunks, long prompts: exact, and without a mask of prompt x prompt."""

from __future__ import annotations

import pytest
import torch
from transformers import masking_utils

import minference
from minference.integrations.transformers import _compat
from minference.methods import Dense
from minference.testing import tiny_model

LENGTH, WINDOW = 300, 70
DENSE = Dense(min_seq_len=0)
OPTIONS = {"sliding_window": WINDOW}
FAMILIES = {
    "mistral": OPTIONS,
    "phi3": OPTIONS,
    "gemma2": OPTIONS,
    "gpt_oss": OPTIONS,
    "cohere2": OPTIONS | {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "llama4_text": {"attention_chunk_size": WINDOW},
}


def inputs(side: str | None = None) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 320, (2, LENGTH), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    if side is not None:
        mask[1, : 90 if side == "left" else None] = 0
        mask[1, 210:] = 0 if side == "right" else 1
        mask[1, :210] = 1 if side == "right" else mask[1, :210]
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture
def no_square(monkeypatch: pytest.MonkeyPatch) -> None:
    written = _compat.written_mask

    def checked(**arguments: object) -> torch.Tensor | None:
        assert arguments["q_length"] == 1, "a mask of prompt x prompt was built"
        return written(**arguments)

    monkeypatch.setattr(_compat, "written_mask", checked)


@pytest.mark.usefixtures("no_square")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_a_window_is_exact_and_never_a_square(family: str, side: str | None) -> None:
    model = tiny_model(family, **FAMILIES[family])
    given = inputs(side)
    real = given["attention_mask"].bool()
    with torch.no_grad():
        before = model(**given).logits[real]
        with minference.attach(model, DENSE):
            torch.testing.assert_close(model(**given).logits[real], before, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("no_square")
@pytest.mark.parametrize(
    ("family", "cache"),
    [
        *((family, cache) for family in ("mistral", "gemma2") for cache in ("dynamic", "static")),
        ("llama4_text", "dynamic"),  # transformers 5.17 has no static cache for its chunks
    ],
)
def test_windows_with_caches_and_chunks(family: str, cache: str) -> None:
    model = tiny_model(family, **FAMILIES[family])
    options = {"max_new_tokens": 4, "do_sample": False, "disable_compile": True}
    options |= {"cache_implementation": cache, "prefill_chunk_size": 130}
    expected = model.generate(**inputs("left"), **options)
    with minference.attach(model, DENSE):
        assert torch.equal(model.generate(**inputs("left"), **options), expected)


@pytest.mark.parametrize("family", ["mistral", "llama4_text"])
def test_gradients_through_a_window(family: str) -> None:
    model = tiny_model(family, **FAMILIES[family])
    ids = inputs()["input_ids"][:1]
    before = model(ids).logits
    with minference.attach(model, DENSE):
        after = model(ids).logits
        after.sum().backward()
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)


def test_only_plain_windows_and_chunks_are_taken_for_them() -> None:
    causal, begin = masking_utils.causal_mask_function, torch.zeros(1)
    window = masking_utils.sliding_window_causal_mask_function(7)
    chunked = masking_utils.chunked_causal_mask_function(4, begin)
    assert _compat.window_of(window) == 7
    assert _compat.chunks_of(chunked) == (4, begin)
    others = (causal, masking_utils.or_masks(window, causal))
    others += tuple(masking_utils.and_masks(x, causal) for x in (window, chunked))
    assert [_compat.window_of(other) for other in (*others, chunked)] == [None] * 5
    assert [_compat.chunks_of(other) for other in (*others, window)] == [None] * 5
