"""Keep the columns and block offsets of most estimated mass, budgets a head."""

from types import ModuleType

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minference.index import Ragged
from minference.ops._dispatch import resolve_impl

SINK_COLUMNS = 30
"""Columns that are always kept, as published."""

LOCAL_BAND = 100
"""Distances below this are always kept, as published."""


def select_columns(
    column_scores: Float[Tensor, "B H N"],
    budgets: tuple[int, ...],
    *,
    sink: int = SINK_COLUMNS,
    impl: str = "auto",
) -> Ragged:
    """The `max(budgets[h], sink)` columns of most mass a head, the first `sink` always.

    Ties go to the smaller position; a negative score marks a position that does not exist.
    """
    _check_budgets(column_scores, budgets)
    return _module(impl, column_scores).select_columns(column_scores, budgets, sink)


def select_offsets(
    offset_masses: Float[Tensor, "B H n"],
    budgets: tuple[int, ...],
    *,
    local: int = LOCAL_BAND,
    impl: str = "auto",
) -> tuple[Ragged, Int[Tensor, "B H 1 W"]]:
    """The `budgets[h]` block offsets of most mass a head, those of distances below `local` always.

    Ties go to the smaller offset.

    Returns:
        The offset lists and their bitmap, as in `SparseIndex`.
    """
    _check_budgets(offset_masses, budgets)
    return _module(impl, offset_masses).select_offsets(offset_masses, budgets, local)


def _check_budgets(scores: Tensor, budgets: tuple[int, ...]) -> None:
    if len(budgets) != scores.shape[1]:
        raise ValueError(
            f"budgets must hold one number for each of the {scores.shape[1]} heads, got "
            f"{len(budgets)}"
        )
    bad = [b for b in budgets if isinstance(b, bool) or not isinstance(b, int) or b < 0]
    if bad:
        raise ValueError(f"budgets must be ints of at least 0, got {bad[0]!r}; round or clamp it")


def _module(impl: str, scores: Tensor) -> ModuleType:
    if resolve_impl(impl, scores.device, torch.float32, 128) in ("triton", "hopper"):
        from minference.ops.select import triton as module
    else:
        from minference.ops.select import reference as module
    return module
