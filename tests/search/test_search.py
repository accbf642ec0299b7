"""A whole search on a tiny model: choice, resumption, growth, provenance, refusals."""

from pathlib import Path

import pytest
import torch

from minference.patterns import BlockSparse, VerticalSlash
from minference.search import search as module
from minference.search.search import Settings, search
from minference.search.space import BASIS
from minference.testing import tiny_model


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
    assert {p for row in found.patterns.patterns for p in row} <= set(settings.candidates())
    assert found.lengths == (640, 700)
    assert 0 < found.stability <= 1
    about = found.patterns.provenance
    assert (about.model, about.tokens, about.objective) == ("tiny", 700, "mass")
    assert about.architectures == ("llama",)
    assert about.recall is not None
    assert 0 < found.density(settings.cost, BASIS) < 0.1
    assert model.config._attn_implementation == "eager"


def test_a_stopped_search_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, state = tiny_model(), tmp_path / "state.json"
    settings = Settings(rows=16)
    whole = search(model, [prompt(0)], settings)
    scored = []
    original = module.score_layer

    def stopping(call, candidates, **options):  # noqa: ANN001, ANN003, ANN202
        scored.append(call.context.layer)
        if len(scored) == 3:
            raise KeyboardInterrupt
        return original(call, candidates, **options)

    monkeypatch.setattr(module, "score_layer", stopping)
    with pytest.raises(KeyboardInterrupt):
        search(model, [prompt(0)], settings, state=state)
    again = search(model, [prompt(0)], settings, state=state)
    assert scored == [0, 1, 2, 2, 3]
    assert again.patterns.patterns == whole.patterns.patterns
    assert again.scores == whole.scores
    assert not state.exists()


def test_recall_grows_the_table() -> None:
    found = search(tiny_model(), [prompt(0)], Settings(rows=16, recall=0.97))
    assert min(min(row) for row in found.scores) >= 0.97
    assert found.patterns.provenance.recall == pytest.approx(
        sorted(x for row in found.scores for x in row)[8]
    )


def test_bad_settings_and_prompts_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match="objective"):
        Settings(objective="speed")
    with pytest.raises(ValueError, match=r"recall must be in \(0, 1\], got 2"):
        Settings(recall=2.0)
    with pytest.raises(ValueError, match=r"512 tokens.*got 100"):
        search(tiny_model(), [prompt(0, 100)], Settings())
    with pytest.raises(ValueError, match="at least one prompt"):
        search(tiny_model(), [], Settings())


def test_without_a_target_candidates_stay() -> None:
    own = Settings(space="paper", target=None).candidates()
    assert VerticalSlash(30, 2048) in own
    assert BlockSparse(100) in own
