"""What a prompt is said to take, against what caches hold and what models compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from transformers import AutoModel, AutoModelForCausalLM

from minference.integrations.transformers import attach, estimate_memory, handle, memory
from minference.methods import AShape
from minference.testing import tiny_model

IDS = torch.randint(3, 320, (1, 300), generator=torch.Generator().manual_seed(0))
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 64}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 64},
    "gemma3_text": WINDOWS,
    "gemma3n_text": WINDOWS
    | {
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 320,
        "num_kv_shared_layers": 2,
        "laurel_rank": 8,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
}


@pytest.mark.parametrize("family", KINDS)
@torch.no_grad()
def test_the_cache_takes_what_was_said(family: str) -> None:
    model = tiny_model(family, **KINDS[family])
    layers = model(IDS).past_key_values.layers
    held = [x for layer in layers for x in (getattr(layer, n, None) for n in ("keys", "values"))]
    own = sum(x.nbytes for x in held if isinstance(x, torch.Tensor))
    # a window of 64 keeps 63
    assert own <= estimate_memory(model, 300).cache <= 64 / 63 * own
    assert estimate_memory(model, 300, cached=False).cache == 0
    on_host = estimate_memory(model, 300, kv="host")
    assert on_host.cache + on_host.host >= own


@pytest.mark.parametrize("kind", [AutoModelForCausalLM, AutoModel])
@torch.no_grad()
def test_only_what_is_computed_and_kept_is_counted(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = kind.from_config(tiny_model().config).eval()
    needs = []

    def keep(*args: Any, **options: Any) -> None:
        needs.append(memory.estimate_memory(*args, **options))

    monkeypatch.setattr(handle, "check_memory", keep)
    with attach(model, AShape(min_seq_len=0)):
        model(IDS)
        model(IDS, use_cache=False)
    rows = 300 if kind is AutoModelForCausalLM else 0
    assert [need.logits for need in needs] == [rows * 320 * 4] * 2
    assert [need.cache > 0 for need in needs] == [True, False]
