"""Keep the columns and block offsets of most estimated mass, budgets a head."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minference.index import Ragged
from minference.ops.select import lists

SINK_COLUMNS = 30
"""Columns that are always kept, as published."""

LOCAL_BAND = 100
"""Distances below this are always kept, as published."""


def select_columns(
    column_scores: Float[Tensor, "B H N"], budgets: tuple[int, ...], *, sink: int = SINK_COLUMNS
) -> Ragged:
    """The `max(budgets[h], sink)` columns of most mass a head, the first `sink` always.

    Ties go to the smaller position; a negative score marks a position that does not exist.
    """
    check_budgets(budgets, column_scores.shape[1])
    return Ragged(*_select_columns(column_scores, list(budgets), sink))


def select_offsets(
    offset_masses: Float[Tensor, "B H n"], budgets: tuple[int, ...], *, local: int = LOCAL_BAND
) -> tuple[Ragged, Int[Tensor, "B H 1 W"]]:
    """The `budgets[h]` block offsets of most mass a head, those of distances below `local` always.

    Ties go to the smaller offset.

    Returns:
        The offset lists and their bitmap, as in `SparseIndex`.
    """
    check_budgets(budgets, offset_masses.shape[1])
    *lists, bits = _select_offsets(offset_masses, list(budgets), local)
    return Ragged(*lists), bits


def check_budgets(budgets: tuple[int, ...], heads: int) -> None:
    """Raise ValueError unless there is a whole number of at least 0 for each head."""
    if len(budgets) != heads:
        raise ValueError(
            f"budgets must hold one number for each of the {heads} heads, got {len(budgets)}"
        )
    bad = [b for b in budgets if isinstance(b, bool) or not isinstance(b, int) or b < 0]
    if bad:
        raise ValueError(f"budgets must be ints of at least 0, got {bad[0]!r}; round or clamp it")


@torch.library.custom_op("minference::select_columns", mutates_args=())
def _select_columns(scores: Tensor, budgets: list[int], sink: int) -> tuple[Tensor, Tensor, Tensor]:
    chosen = lists.select_columns(scores, tuple(budgets), sink)
    return chosen.values, chosen.start, chosen.count


@_select_columns.register_fake
def _(scores, budgets, sink):  # noqa: ANN001, ANN202
    return _fake_lists(scores)


@torch.library.custom_op("minference::select_offsets", mutates_args=())
def _select_offsets(
    masses: Tensor, budgets: list[int], local: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    chosen, bits = lists.select_offsets(masses, tuple(budgets), local)
    return chosen.values, chosen.start, chosen.count, bits


@_select_offsets.register_fake
def _(masses, budgets, local):  # noqa: ANN001, ANN202
    words = (*masses.shape[:2], 1, -(-masses.shape[2] // 32))
    return *_fake_lists(masses), masses.new_empty(words, dtype=torch.int32)


def _fake_lists(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a `Ragged` of one list a head holds, without contents."""
    shape = (*scores.shape[:2], 1)
    return (
        scores.new_empty(scores.numel(), dtype=torch.int32),
        scores.new_empty(shape, dtype=torch.int64),
        scores.new_empty(shape, dtype=torch.int32),
    )
