"""Search the pattern of every head of a transformers model, a layer at a time, in one forward pass
a prompt."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import minference
from minference.errors import unknown_name
from minference.head_patterns import HeadPatterns
from minference.json_files import read_json, write_text
from minference.methods.base import Context
from minference.methods.dense import Dense
from minference.patterns import Pattern
from minference.provenance import Provenance
from minference.search.cost import CostModel
from minference.search.grow import grow_to_recall
from minference.search.score import OBJECTIVES, Call, score_layer
from minference.search.space import BASIS, TARGET, equalised, space

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEAST_TOKENS = 512


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a search compares.

    Attributes:
        space: name of the preset of candidates.
        target: pattern whose cost every candidate is brought to; None leaves them as they are.
        objective: "output" or "mass", see `LayerScorer.scores`.
        rows: rows of each prompt to compare.
        recall: attention mass that every head must keep; None to stop at the choice.
        cost: what candidates cost.
    """

    space: str = "paper"
    target: Pattern | None = TARGET
    objective: str = "output"
    rows: int = 64
    recall: float | None = None
    cost: CostModel = field(default_factory=CostModel)

    def __post_init__(self) -> None:
        """Checks names and numbers before any work."""
        if self.objective not in OBJECTIVES:
            raise unknown_name("objective", self.objective, OBJECTIVES)
        if self.recall is not None and not 0 < self.recall <= 1:
            raise ValueError(f"recall must be in (0, 1], got {self.recall}")
        if self.rows < 1:
            raise ValueError(f"rows must be at least 1, got {self.rows}")
        space(self.space)

    def candidates(self) -> tuple[Pattern, ...]:
        """The preset's patterns, at equal cost where a target is set."""
        own = space(self.space)
        if self.target is None:
            return own
        return equalised(own, self.cost.row_cost(self.target, BASIS), self.cost)


@dataclass(frozen=True)
class Found:
    """The result of a search.

    Attributes:
        patterns: the table, budgets for contexts of BASIS tokens.
        scores: mean score of each chosen pattern, [layer][head].
        stability: share of (prompt, head) pairs whose own best candidate is the one chosen.
        lengths: tokens of each prompt.
    """

    patterns: HeadPatterns
    scores: list[list[float]]
    stability: float
    lengths: tuple[int, ...]

    def density(self, cost: CostModel, length: int) -> float:
        """Predicted density of the table for a prompt of that length."""
        ratio = min(1.0, length / BASIS)
        all_heads = [
            cost.density(p.scaled(ratio), length) for row in self.patterns.patterns for p in row
        ]
        return sum(all_heads) / len(all_heads)


def search(
    model: PreTrainedModel,
    prompts: Sequence[Tensor],
    settings: Settings,
    *,
    model_name: str | None = None,
    state: Path | None = None,
    on_layer: Callable[[int, int], None] | None = None,
) -> Found:
    """Chooses for each head the candidate of best mean score over the prompts.

    Args:
        model: a causal language model that `attach` serves.
        prompts: token ids of each prompt, [1, L], at least 512 of them.
        settings: what to compare.
        model_name: id of the weights, for the provenance.
        state: file that keeps the scores of finished layers; a search that finds one of the same
            settings and prompts goes on from there, and it is removed at the end.
        on_layer: called with the numbers of prompt and layer as a layer is done.

    Raises:
        ValueError: a prompt that is too short, or none.
        UnsupportedError: a model that cannot be attached to.
    """
    if not prompts:
        raise ValueError("a search needs at least one prompt, got none")
    for ids in prompts:
        if ids.shape[1] < LEAST_TOKENS:
            raise ValueError(
                f"a prompt needs at least {LEAST_TOKENS} tokens for its patterns to show, got "
                f"{ids.shape[1]}; give a longer text"
            )
    candidates = settings.candidates()
    done = _Progress.load(state, settings, candidates, prompts)
    for number, ids in enumerate(prompts):

        def score(context: Context, q: Tensor, k: Tensor, v: Tensor, number: int = number) -> None:
            key = f"{number}/{context.layer}"
            if key not in done.scores:
                call = Call(q, k, v, context)
                found = score_layer(
                    call, candidates, rows=settings.rows, objective=settings.objective
                )
                done.add(key, found.tolist())
            if on_layer is not None:
                on_layer(number, context.layer)

        observe_layers(model, ids, score)
    found = _choose(model, candidates, done.scores, prompts, settings, model_name)
    if settings.recall is not None:
        found = _raise_recall(model, prompts, found, settings)
    done.remove()
    return found


def observe_layers(
    model: PreTrainedModel, ids: Tensor, observe: Callable[[Context, Tensor, Tensor, Tensor], None]
) -> None:
    """One dense forward pass over a prompt; `observe` gets context, q, k and v of each layer."""
    with (
        torch.no_grad(),
        minference.attach(model, Dense(), min_seq_len=0, observe=observe),
    ):
        model(ids.to(model.device), use_cache=False, logits_to_keep=1)


def _choose(
    model: PreTrainedModel,
    candidates: Sequence[Pattern],
    scores: dict[str, list[list[float]]],
    prompts: Sequence[Tensor],
    settings: Settings,
    model_name: str | None,
) -> Found:
    layers = sorted({int(key.split("/")[1]) for key in scores})
    table = torch.tensor(
        [[scores[f"{p}/{layer}"] for layer in layers] for p in range(len(prompts))]
    )  # [prompts, layers, candidates, heads]
    mean = table.mean(dim=0)
    best = mean.argmax(dim=1)
    rows = tuple(tuple(candidates[c] for c in row) for row in best.tolist())
    chosen = mean.gather(1, best[:, None])[:, 0]
    lengths = tuple(ids.shape[1] for ids in prompts)
    config = model.config.get_text_config(decoder=True)
    about = Provenance(
        model=model_name,
        architectures=(config.model_type,),
        tokens=max(lengths),
        objective=settings.objective,
        basis=f"minference search: space {settings.space}, {len(prompts)} prompts",
        recall=float(chosen.median()) if settings.objective == "mass" else None,
        date=datetime.now(UTC).date().isoformat(),
        version=f"minference {minference.__version__}",
    )
    stability = float((table.argmax(dim=2) == best).float().mean())
    patterns = HeadPatterns(rows, about)
    return Found(patterns, chosen.tolist(), stability, lengths)


def _raise_recall(
    model: PreTrainedModel, prompts: Sequence[Tensor], found: Found, settings: Settings
) -> Found:
    assert settings.recall is not None
    rows = [list(row) for row in found.patterns.patterns]
    masses = [[1.0] * len(row) for row in rows]
    target = settings.recall

    def grow(context: Context, q: Tensor, k: Tensor, v: Tensor) -> None:
        call, layer = Call(q, k, v, context), context.layer
        own, kept = grow_to_recall(call, rows[layer], target, settings.cost, rows=settings.rows)
        rows[layer], masses[layer] = own, [min(x) for x in zip(masses[layer], kept, strict=True)]

    for ids in prompts:
        observe_layers(model, ids, grow)
    flat = sorted(kept for row in masses for kept in row)
    about = found.patterns.provenance
    about = Provenance(**{**about.to_dict(), "recall": flat[len(flat) // 2]})
    patterns = HeadPatterns(tuple(map(tuple, rows)), about)
    return Found(patterns, masses, found.stability, found.lengths)


@dataclass
class _Progress:
    """Scores by "prompt/layer", kept in a file as they come."""

    path: Path | None
    about: str
    scores: dict[str, list[list[float]]] = field(default_factory=dict)

    @classmethod
    def load(
        cls,
        path: Path | None,
        settings: Settings,
        candidates: Sequence[Pattern],
        prompts: Sequence[Tensor],
    ) -> _Progress:
        described: list[Any] = [settings.objective, settings.rows, [repr(c) for c in candidates]]
        described += [[ids.shape[1], int(ids.sum())] for ids in prompts]
        own = cls(path, json.dumps(described))
        if path is not None and path.is_file():
            kept = read_json(path)
            if kept.get("about") == own.about:
                own.scores = kept["scores"]
        return own

    def add(self, key: str, scores: list[list[float]]) -> None:
        self.scores[key] = scores
        if self.path is not None:
            write_text(self.path, json.dumps({"about": self.about, "scores": self.scores}))

    def remove(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)
