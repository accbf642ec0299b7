"""The result of a search: the table, how well it serves, and how sure the choice is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor

import minference
from minference.head_patterns import HeadPatterns
from minference.patterns import Dense, Pattern
from minference.provenance import Provenance
from minference.search.cost import CostModel
from minference.search.progress import Scores

Rows = list[list[float]]


@dataclass(frozen=True)
class Stability:
    """How far prompts agree on the choice.

    Attributes:
        same: share of (prompt, head) pairs whose own best candidate is the one chosen.
        same_kind: the same for the kind of pattern alone.
        by_prompt: `same` of each prompt.
        loss: what a head's choice scores less on a prompt than that prompt's own best, on average.
    """

    same: float
    same_kind: float
    by_prompt: tuple[float, ...]
    loss: float


@dataclass(frozen=True)
class Found:
    """The result of a search.

    Attributes:
        patterns: the table, budgets for contexts of BUDGET_LENGTH tokens; layers with a window of
            their own hold Dense, which is not used.
        layers: numbers of the layers that were searched.
        scores: by objective, the mean score of each pattern chosen, [searched layer][head]; after
            growth only the least mass that any prompt kept.
        stability: of the choice, before growth.
        lengths: tokens of each prompt.
        cost: what candidates cost.
    """

    patterns: HeadPatterns
    layers: tuple[int, ...]
    scores: dict[str, Rows]
    stability: Stability
    lengths: tuple[int, ...]
    cost: CostModel

    @property
    def rows(self) -> list[tuple[Pattern, ...]]:
        """Patterns of the layers that were searched."""
        return [self.patterns.patterns[layer] for layer in self.layers]

    def served_rows(self, length: int) -> list[list[Pattern]]:
        """The same as a prompt of that length gets them."""
        return [[pattern.served(length) for pattern in row] for row in self.rows]

    def density(self, length: int) -> float:
        """Predicted density of the table for a prompt of that length."""
        return self.cost.mean_density(self.served_rows(length), length)

    def speedup(self, length: int) -> float:
        """Predicted gain of attention over dense, see `CostModel.speedup`."""
        return self.cost.speedup(self.served_rows(length), length)

    def with_rows(self, rows: Sequence[Sequence[Pattern]], mass: Rows, recall: float) -> Found:
        """The same search with budgets grown until heads keep the mass `recall`."""
        basis = f"{self.patterns.provenance.basis}; grown to a kept mass of {recall}"
        about = replace(self.patterns.provenance, basis=basis, recall=_median(mass))
        table = _table(dict(zip(self.layers, rows, strict=True)), self.patterns.shape, about, mass)
        return replace(self, patterns=table, scores={"mass": mass})


def choose(
    candidates: Sequence[Pattern],
    scores: dict[str, Scores],
    *,
    objective: str,
    space: str,
    lengths: tuple[int, ...],
    cost: CostModel,
    config: Any,  # noqa: ANN401
    model_name: str | None,
) -> Found:
    """For each head the candidate of best mean score over the prompts.

    Args:
        candidates: what was scored.
        scores: by "prompt/layer".
        objective: which score decides.
        space: name of the candidates' preset.
        lengths: tokens of each prompt.
        cost: what candidates cost.
        config: the text model's configuration.
        model_name: id of the weights.
    """
    layers = sorted({int(key.split("/")[1]) for key in scores})
    tables = {
        name: torch.tensor(
            [[scores[f"{p}/{layer}"][name] for layer in layers] for p in range(len(lengths))]
        )  # [prompts, layers, candidates, heads]
        for name in next(iter(scores.values()))
    }
    best = tables[objective].mean(dim=0).argmax(dim=1)
    kept = {
        name: table.mean(dim=0).gather(1, best[:, None])[:, 0].tolist()
        for name, table in tables.items()
    }
    about = Provenance(
        model=model_name,
        architectures=(config.model_type,),
        tokens=max(lengths),
        objective=objective,
        basis=f"minference search: space {space}, {len(lengths)} prompts, {cost.describe()}",
        recall=_median(kept["mass"]),
        date=datetime.now(UTC).date().isoformat(),
        version=f"minference {minference.__version__}",
    )
    rows = {
        layer: [candidates[c] for c in row]
        for layer, row in zip(layers, best.tolist(), strict=True)
    }
    shape = config.num_hidden_layers, config.num_attention_heads
    return Found(
        patterns=_table(rows, shape, about, kept["mass"]),
        layers=tuple(layers),
        scores=kept,
        stability=_stability(tables[objective], best, candidates),
        lengths=lengths,
        cost=cost,
    )


def _stability(table: Tensor, best: Tensor, candidates: Sequence[Pattern]) -> Stability:
    own = table.argmax(dim=2)  # [prompts, layers, heads]
    kinds = sorted({p.kind for p in candidates})
    kind = torch.tensor([kinds.index(p.kind) for p in candidates])
    same = (own == best).float()
    chosen = table.gather(2, best.expand(len(table), -1, -1)[:, :, None])[:, :, 0]
    return Stability(
        same=float(same.mean()),
        same_kind=float((kind[own] == kind[best]).float().mean()),
        by_prompt=tuple(float(x) for x in same.mean(dim=(1, 2))),
        loss=float((table.amax(dim=2) - chosen).mean()),
    )


def _table(
    rows: Mapping[int, Sequence[Pattern]], shape: tuple[int, int], about: Provenance, mass: Rows
) -> HeadPatterns:
    layers, heads = shape
    kept = dict(zip(rows, mass, strict=True))
    return HeadPatterns(
        tuple(tuple(rows.get(layer, (Dense(),) * heads)) for layer in range(layers)),
        about,
        tuple(
            tuple(round(x, 4) for x in kept[layer]) if layer in kept else (None,) * heads
            for layer in range(layers)
        ),
    )


def _median(rows: Rows) -> float:
    flat = sorted(value for row in rows for value in row)
    return flat[len(flat) // 2]
