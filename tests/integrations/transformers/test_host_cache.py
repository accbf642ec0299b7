"""Keys and values on the host: the numbers and the answers of the plain cache."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

import minference
from minference import UnsupportedError
from minference.integrations.transformers import HostCache, host_layer
from minference.integrations.transformers.host_cache import to_host
from minference.integrations.transformers.host_layer import HostLayer, Piece, WindowLayer
from minference.methods import AShape
from minference.testing import tiny_model

IDS = torch.randint(3, 320, (2, 300), generator=torch.Generator().manual_seed(0))
NARROW = AShape(sink=4, local=64, min_seq_len=0)


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_layer, "SEGMENT", 70)
    monkeypatch.setattr(host_layer, "TAIL", 5)


def states(tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, 3, tokens, 16, generator=generator) for _ in range(2))


def filled(*, fp8: bool = False) -> tuple[list[HostLayer], DynamicCache]:
    """Two layers that prefilled 200 tokens in two chunks and decoded 7, and the plain cache."""
    config = tiny_model(num_hidden_layers=2).config
    cache, plain = HostCache(config, fp8=fp8), DynamicCache(config=config)
    for step, tokens in enumerate((150, 50, *[1] * 7)):
        for layer in range(2):
            got = cache.update(*states(tokens, 2 * step + layer), layer)
            expected = plain.update(*states(tokens, 2 * step + layer), layer)
            if not fp8:
                assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    return cache.layers, plain


def same(layers: list[HostLayer], plain: DynamicCache) -> bool:
    return all(
        torch.equal(own.keys, other.keys)
        and torch.equal(own.values, other.values)
        and own.get_seq_length() == other.get_seq_length() == other.keys.shape[2]
        and own.get_mask_sizes(3) == other.get_mask_sizes(3)
        for own, other in zip(layers, plain.layers, strict=True)
    )


def test_layers_hold_what_the_plain_cache_holds() -> None:
    layers, plain = filled()
    assert same(layers, plain)
    assert len(layers[0]._pieces()) >= 4
    for change in (
        lambda layer: layer.reorder_cache(torch.tensor([1, 1])),
        lambda layer: layer.batch_repeat_interleave(2),
        lambda layer: layer.batch_select_indices(torch.tensor([0, 3])),
        lambda layer: layer.crop(-3),
        lambda layer: layer.crop(-60),
        lambda layer: layer.crop(-80),
    ):
        for layer in (*layers, *plain.layers):
            change(layer)
        assert same(layers, plain)
    layers[0].reset()
    assert layers[0].get_seq_length() == 0
    assert layers[0].keys is None


def test_fp8_keeps_one_part_in_sixteen() -> None:
    layers, plain = filled(fp8=True)
    for own, other in zip(layers, plain.layers, strict=True):
        error = (own.keys - other.keys).abs() / other.keys.abs().clamp(min=1e-3)
        assert 0 < error.max() <= 1 / 16 + 1e-3
        assert error.mean() < 0.03
    assert layers[0]._pieces()[0][0].data.element_size() == 1
    assert Piece.store(torch.zeros(1, 1, 2, 4), fp8=True, pinned=False).scale is not None


@pytest.mark.parametrize(
    ("family", "chunk"),
    [("llama", None), ("llama", 130), ("gemma2", None), ("gemma2", 130), ("qwen3_next", None)],
)
def test_generation_is_that_of_the_plain_cache(family: str, chunk: int | None) -> None:
    model = tiny_model(family, **({"sliding_window": 70} if family == "gemma2" else {}))
    # its recurrent layers are slow here
    ids = IDS[:1, :40] if family == "qwen3_next" else IDS
    options = {"max_new_tokens": 9, "do_sample": False, "prefill_chunk_size": chunk}
    options |= {"attention_mask": torch.ones_like(ids), "return_dict_in_generate": True}
    with minference.attach(model, NARROW, dense_from=2):
        expected = model.generate(ids, **options)
    with minference.attach(model, NARROW, dense_from=2, kv="host"):
        got = model.generate(ids, **options)
    assert torch.equal(got.sequences, expected.sequences)
    kinds = {type(layer) for layer in got.past_key_values.layers}
    assert HostLayer in kinds
    assert (WindowLayer in kinds) == (family == "gemma2")


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}])
def test_beams_and_assisted_decoding_on_the_host(options: dict[str, int]) -> None:
    model, ids = tiny_model(), IDS[:1]
    options = {"max_new_tokens": 8, "do_sample": False, **options}
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    with minference.attach(model, minference.methods.Dense(), kv="host"):
        got = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(got, expected)


def test_a_direct_call_and_fp8_answers() -> None:
    model = tiny_model()
    with torch.no_grad():
        plain = model(IDS[:, :-1])
        expected = model(IDS[:, -1:], past_key_values=plain.past_key_values).logits
        with minference.attach(model, NARROW, min_seq_len=9999, kv="host_fp8"):
            out = model(IDS[:, :-1])
            torch.testing.assert_close(out.logits, plain.logits, atol=1e-4, rtol=1e-4)
            assert isinstance(out.past_key_values, HostCache)
            got = model(IDS[:, -1:], past_key_values=out.past_key_values).logits
            assert model(IDS, use_cache=False).past_key_values is None
    # measured 0.05; the exact cache gives 1e-5
    assert 1e-4 < (got - expected).norm() / expected.norm() < 0.1


def test_a_copy_of_the_cache_goes_its_own_way() -> None:
    layers, plain = filled()
    own = copy.deepcopy(layers)
    own[0].update(*states(9, 30))
    assert same(layers, plain)
    assert own[0].get_seq_length() == layers[0].get_seq_length() + 9
    assert own[0].following is own[1]


def test_running_out_of_host_memory_leaves_the_model_usable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model()
    kept: list[torch.Tensor] = []
    to_host = host_layer._to_host

    def fills_up(x: torch.Tensor, pinned: bool) -> torch.Tensor:
        if len(kept) == 20:
            raise torch.OutOfMemoryError("full")
        kept.append(to_host(x, pinned))
        return kept[-1]

    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    with minference.attach(model, NARROW, dense_from=2, kv="host"):
        expected = model.generate(IDS, **options)
        with monkeypatch.context() as patch:
            patch.setattr(host_layer, "_to_host", fills_up)
            with pytest.raises(torch.OutOfMemoryError, match="full"):
                model.generate(IDS, **options)
        assert torch.equal(model.generate(IDS, **options), expected)


def test_a_window_lets_go_of_the_prompt() -> None:
    layer = WindowLayer(sliding_window=10)
    layer.update(*states(200, 0))
    assert layer.keys.untyped_storage().nbytes() == 2 * 3 * 9 * 16 * 4


def test_other_caches_are_refused() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="did you mean 'host'"):
        minference.attach(model, NARROW, kv="hosts")
    offloaded = DynamicCache(config=model.config)
    offloaded.offloading = True  # the argument makes a stream, which takes a driver
    with pytest.raises(UnsupportedError, match="offloaded"):
        to_host(offloaded, model.config)
    with (
        minference.attach(model, NARROW, kv="host"),
        pytest.raises(UnsupportedError, match="got a"),
    ):
        model.generate(IDS, cache_implementation="static", max_new_tokens=2)
    begun = model(IDS[:, :20]).past_key_values
    with (
        minference.attach(model, NARROW, kv="host"),
        pytest.raises(UnsupportedError, match="got one with 20 on the device"),
    ):
        model(IDS[:, 20:], past_key_values=begun)
