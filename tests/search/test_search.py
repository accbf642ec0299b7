"""A whole search on a tiny model: choice, resumption, growth, provenance, refusals."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import minference
from minference.errors import UnsupportedError
from minference.patterns import BUDGET_LENGTH, BlockSparse, Dense, VerticalSlash
from minference.search import search as module
from minference.search.cost import CostModel, Timings
from minference.search.score import Call
from minference.search.search import Settings, search
from minference.search.timing import LayerShape
from minference.testing import tiny_model

TIMINGS = Timings(
    device="a device",
    heads=4,
    launch=1e-5,
    tile=1e-6,
    block=1e-7,
    listed=1.5e-7,
    column=2e-7,
    index={"vertical_slash": (1e-4, 1e-9)},
    dense=1e-7,
    residual=0.03,
    worst=0.1,
    measured=26,
)


def prompt(seed: int, length: int = 640) -> torch.Tensor:
    return torch.randint(3, 320, (1, length), generator=torch.Generator().manual_seed(seed))


def test_search_gives_every_head_its_best_candidate() -> None:
    model, seen = tiny_model(), []
    settings = Settings(space="published", objective="mass", rows=16)
    found = search(
        model,
        [prompt(0), prompt(1, 700)],
        settings,
        model_name="tiny",
        on_layer=lambda number, layer: seen.append((number, layer)),
    )
    assert seen == [(number, layer) for number in range(2) for layer in range(4)]
    assert found.patterns.shape == (4, 4)
    candidates = settings.candidates(found.cost, 700)
    assert {p for row in found.patterns.patterns for p in row} <= set(candidates)
    assert found.lengths == (640, 700)
    told = found.stability
    assert 0 < told.same <= told.same_kind <= 1
    assert told.same == pytest.approx(sum(told.by_prompt) / 2)
    assert told.loss >= 0
    assert found.patterns.scores is not None
    assert found.patterns.scores[1][2] == pytest.approx(found.scores["mass"][1][2], abs=1e-4)
    about = found.patterns.provenance
    assert (about.model, about.tokens, about.objective) == ("tiny", 700, "mass")
    assert about.architectures == ("llama",)
    assert about.recall is not None
    assert about.basis is not None
    assert about.basis.endswith("cost in counted tiles")
    assert 0 < found.density(BUDGET_LENGTH) < 0.1
    assert found.speedup(BUDGET_LENGTH) == pytest.approx(1 / found.density(BUDGET_LENGTH))
    assert model.config._attn_implementation == "eager"


class Stopped:
    """Counts calls of a function of the search, and interrupts one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, at: int) -> None:
        self.original, self.at = getattr(module, name), at
        self.layers: list[int] = []
        monkeypatch.setattr(module, name, self)

    def __call__(self, call: Call, *rest: object, **options: object) -> object:
        self.layers.append(call.context.layer)
        if len(self.layers) == self.at:
            raise KeyboardInterrupt
        return self.original(call, *rest, **options)


def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of the prompts that are read."""
    lengths: list[int] = []
    original = module.observe_layers

    def counted(model: PreTrainedModel, ids: torch.Tensor, observe: object) -> None:
        lengths.append(ids.shape[1])
        original(model, ids, observe)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "observe_layers", counted)
    return lengths


def test_a_stopped_search_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, state = tiny_model(), tmp_path / "state.json"
    settings, prompts = Settings(rows=16), [prompt(0), prompt(1, 600)]
    whole = search(model, prompts, settings)
    scored = Stopped(monkeypatch, "score_layer", at=7)
    with pytest.raises(KeyboardInterrupt):
        search(model, prompts, settings, state=state)
    read = forwards(monkeypatch)
    again = search(model, prompts, settings, state=state)
    assert scored.layers == [0, 1, 2, 3, 0, 1, 2, 2, 3]
    assert read == [600], "a prompt that had ended was read again"
    assert again.patterns.patterns == whole.patterns.patterns
    assert again.scores == whole.scores
    assert not state.exists()


def test_stopped_growth_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, state = tiny_model(), tmp_path / "state.json"
    settings, prompts = Settings(rows=16, recall=0.9), [prompt(0), prompt(1, 600)]
    whole = search(model, prompts, settings)
    grown = Stopped(monkeypatch, "grow_to_recall", at=7)
    with pytest.raises(KeyboardInterrupt):
        search(model, prompts, settings, state=state)
    read = forwards(monkeypatch)
    again = search(model, prompts, settings, state=state)
    assert grown.layers == [0, 1, 2, 3, 0, 1, 2, 2, 3]
    assert read == [600]
    assert again.patterns.patterns == whole.patterns.patterns
    assert again.scores == whole.scores


@pytest.mark.parametrize("changed", ["weights", "config", "prompt", "settings"])
def test_the_state_of_another_search_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, changed: str
) -> None:
    state, settings = tmp_path / "state.json", Settings(rows=16)
    scored = Stopped(monkeypatch, "score_layer", at=3)
    with pytest.raises(KeyboardInterrupt):
        search(tiny_model(), [prompt(0)], settings, state=state)
    model = tiny_model(seed=1) if changed == "weights" else tiny_model()
    if changed == "config":
        model = tiny_model(rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    ids = prompt(0)
    if changed == "prompt":
        ids[0, 5], ids[0, 6] = ids[0, 6].item(), ids[0, 5].item()  # the same sum
    if changed == "settings":
        settings = Settings(rows=17)
    search(model, [ids], settings, state=state)
    assert scored.layers == [0, 1, 2, 0, 1, 2, 3]
    named = {"weights": "model", "config": "model", "prompt": "prompts"}.get(changed, changed)
    assert f"another {named}" in caplog.text


def test_a_broken_state_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = tmp_path / "state.json"
    for text in ("{", "[]", '{"about": {}}'):
        state.write_text(text)
        search(tiny_model(), [prompt(0)], Settings(rows=4), state=state)
        assert not state.exists()
    assert "starting anew" in caplog.text


def test_recall_grows_the_table() -> None:
    found = search(tiny_model(), [prompt(0)], Settings(rows=16, recall=0.97))
    masses = [x for row in found.scores["mass"] for x in row]
    assert min(masses) >= 0.97
    assert found.patterns.provenance.recall == pytest.approx(sorted(masses)[8])
    assert "grown to a kept mass of 0.97" in (found.patterns.provenance.basis or "")


def test_layers_with_a_window_get_no_patterns() -> None:
    model = tiny_model(
        "gemma3_text",
        sliding_window=128,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    found = search(model, [prompt(0)], Settings(rows=8))
    assert found.layers == (1, 3)
    assert found.patterns.shape == (4, 4)
    assert set(found.patterns[0]) == {Dense()}
    assert found.patterns.scores is not None
    assert found.patterns.scores[0] == (None,) * 4
    with minference.attach(model, minference.methods.MInference(patterns=found.patterns)):
        pass
    windowed = tiny_model("gemma3_text", sliding_window=128, layer_types=["sliding_attention"] * 4)
    with pytest.raises(UnsupportedError, match="no layer of full causal attention"):
        search(windowed, [prompt(0)], Settings(rows=8))


def test_costs_are_fitted_where_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fits, state = [], tmp_path / "state.json"

    def fit(shape: LayerShape) -> Timings:
        fits.append(shape)
        return TIMINGS

    monkeypatch.setattr(module, "fit_timings", fit)
    scored = Stopped(monkeypatch, "score_layer", at=2)
    settings = Settings(rows=8, cost="fitted")
    with pytest.raises(KeyboardInterrupt):
        search(tiny_model(), [prompt(0)], settings, state=state)
    found = search(tiny_model(), [prompt(0)], settings, state=state)
    assert scored.layers == [0, 1, 1, 2, 3]
    assert len(fits) == 1, "the cost of a resumed search is the one that it began with"
    assert (fits[0].heads, fits[0].kv_heads, fits[0].dim) == (4, 2, 16)
    assert found.cost.timings == TIMINGS
    assert "cost fitted to 26 times on a device" in (found.patterns.provenance.basis or "")


def test_bad_settings_and_prompts_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match="objective"):
        Settings(objective="speed")
    with pytest.raises(ValueError, match=r"recall must be in \(0, 1\], got 2"):
        Settings(recall=2.0)
    with pytest.raises(ValueError, match=r"512 tokens.*got 100"):
        search(tiny_model(), [prompt(0, 100)], Settings())
    with pytest.raises(ValueError, match=r"4096 tokens.*got 5000"):
        search(tiny_model(), [prompt(0, 5000)], Settings())
    with pytest.raises(ValueError, match="cost"):
        Settings(cost="guessed")
    with pytest.raises(ValueError, match="at least one prompt"):
        search(tiny_model(), [], Settings())


def test_without_a_target_candidates_stay() -> None:
    own = Settings(space="paper", target=None).candidates(CostModel())
    assert VerticalSlash(30, 2048) in own
    assert BlockSparse(100) in own
