"""Candidate patterns, and how they are brought to the same cost (arXiv 2407.02490, algorithm 1)."""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace

from minference.errors import unknown_name
from minference.patterns import BUDGET_LENGTH, AShape, BlockSparse, Pattern, VerticalSlash
from minference.search.cost import CostModel

TARGET = AShape(1024, 4096)
"""The paper's: every candidate costs what this one does."""
STEP = 50

SPACES: dict[str, tuple[Pattern, ...]] = {
    "paper": (
        AShape(1024, 4096),
        VerticalSlash(30, 2048),
        VerticalSlash(100, 1800),
        VerticalSlash(500, 1500),
        VerticalSlash(3000, 200),
        BlockSparse(100),
    ),
    "published": (
        AShape(100, 800),
        VerticalSlash(30, 800),
        VerticalSlash(100, 750),
        VerticalSlash(500, 700),
        VerticalSlash(3500, 100),
        BlockSparse(100),
    ),
    "wide": (
        AShape(64, 4096),
        AShape(256, 4096),
        VerticalSlash(30, 2048),
        VerticalSlash(250, 2000),
        VerticalSlash(1000, 1500),
        VerticalSlash(2000, 1000),
        VerticalSlash(3000, 600),
        VerticalSlash(4000, 200),
        BlockSparse(80),
    ),
}


def space(name: str) -> tuple[Pattern, ...]:
    """The candidates of a preset: the paper's table 7, the published code's, or more of each kind.

    Raises:
        ValueError: no such preset.
    """
    if name not in SPACES:
        raise unknown_name("search space", name, SPACES)
    return SPACES[name]


def equalised(
    candidates: Sequence[Pattern],
    target: float,
    model: CostModel,
    length: int = BUDGET_LENGTH,
) -> tuple[Pattern, ...]:
    """The candidates with their largest budget moved, in steps of 50 (blocks: of 1), until as
    prompts of `length` tokens get them they cost as near as they can to the target's share.

    Sinks, the local band and whole blocks do not shrink with the length, so that patterns of equal
    cost at one length differ at another: equal is meant at `length`.

    Args:
        candidates: patterns with budgets for BUDGET_LENGTH tokens.
        target: cost of a row of BUDGET_LENGTH tokens; of shorter prompts in proportion.
        model: what patterns cost.
        length: prompt at which costs are equal.
    """
    return tuple(
        _nearest(candidate, target, model, min(length, BUDGET_LENGTH)) for candidate in candidates
    )


def _nearest(candidate: Pattern, target: float, model: CostModel, length: int) -> Pattern:
    with_budget, step = _free(candidate)
    own, budgets = target * length / BUDGET_LENGTH, range(1, BUDGET_LENGTH // step)

    def cost(steps: int, at: int = length) -> float:
        return model.row_cost(with_budget(steps * step).served(at), at)

    above = bisect_left(budgets, own, key=cost) + 1
    near = (above - 1, above) if above > 1 else (above,)
    best = min(near, key=lambda steps: abs(cost(steps) - own))
    # blocks are whole: of the budgets that cost as much, the largest that the longest can bear
    same = bisect_right(budgets, cost(best), key=cost)
    most = bisect_right(budgets, target, key=lambda steps: cost(steps, BUDGET_LENGTH))
    return with_budget(step * max(best, min(same, most)))


def _free(candidate: Pattern) -> tuple[Callable[[int], Pattern], int]:
    match candidate:
        case AShape():
            return lambda n: replace(candidate, local=n), STEP
        case VerticalSlash(vertical=vertical, slash=slash) if slash >= vertical:
            return lambda n: replace(candidate, slash=n), STEP
        case VerticalSlash():
            return lambda n: replace(candidate, vertical=n), STEP
        case BlockSparse():
            return lambda n: replace(candidate, topk=n), 1
        case _:
            raise TypeError(f"{type(candidate).__name__} is no candidate of a search")


def grown(pattern: Pattern, factor: float) -> Pattern:
    """The pattern with every budget larger by the factor."""
    match pattern:
        case VerticalSlash(vertical=vertical, slash=slash):
            return VerticalSlash(round(vertical * factor), round(slash * factor))
        case AShape(sink=sink, local=local):
            return AShape(sink, round(local * factor))
        case BlockSparse(topk=topk, block=block):
            return BlockSparse(math.ceil(topk * factor), block)
        case _:
            return pattern
