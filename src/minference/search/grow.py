"""Raise budgets head by head until a recall target is reached (arXiv 2501.15383, section 5.2.2)."""

from collections.abc import Sequence

from minference.patterns import Dense, Pattern
from minference.search.cost import CostModel
from minference.search.score import Call, LayerScorer
from minference.search.space import grown

FACTOR = 1.5
TOO_DENSE = 0.9
"""Density at the length searched from which a head is made dense."""


def grow_to_recall(
    call: Call, patterns: Sequence[Pattern], target: float, model: CostModel, *, rows: int
) -> tuple[list[Pattern], list[float]]:
    """Patterns of the layer's heads whose mean kept mass is at least `target`, and that mass.

    Every head under the target gets 1.5 times its budgets, again and again; a head that would
    compute nine tenths of the prompt becomes dense.

    Raises:
        ValueError: a target outside (0, 1].
    """
    if not 0 < target <= 1:
        raise ValueError(f"the recall target must be in (0, 1], got {target}")
    scorer, own = LayerScorer(call, rows), list(patterns)
    length = call.context.layout.kv_len
    while True:
        mass = scorer.scores(own)["mass"].tolist()
        short = [h for h, kept in enumerate(mass) if kept < target and own[h] != Dense()]
        if not short:
            return own, [1.0 if p == Dense() else m for p, m in zip(own, mass, strict=True)]
        for h in short:
            larger = grown(own[h], FACTOR)
            full = model.density(larger.served(length), length) >= TOO_DENSE
            own[h] = Dense() if full else larger
