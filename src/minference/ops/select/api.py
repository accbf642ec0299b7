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
    lists = _select_columns(column_scores, list(budgets), sink, _name(impl, column_scores))
    return Ragged(*lists)


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
    name = _name(impl, offset_masses)
    *lists, bits = _select_offsets(offset_masses, list(budgets), local, name)
    return Ragged(*lists), bits


def _check_budgets(scores: Tensor, budgets: tuple[int, ...]) -> None:
    if len(budgets) != scores.shape[1]:
        raise ValueError(
            f"budgets must hold one number for each of the {scores.shape[1]} heads, got "
            f"{len(budgets)}"
        )
    bad = [b for b in budgets if isinstance(b, bool) or not isinstance(b, int) or b < 0]
    if bad:
        raise ValueError(f"budgets must be ints of at least 0, got {bad[0]!r}; round or clamp it")


def _name(impl: str, scores: Tensor) -> str:
    name = resolve_impl(impl, scores.device, torch.float32, 128)
    return "triton" if name in ("triton", "hopper") else "reference"


def _module(name: str) -> ModuleType:
    if name == "triton":
        from minference.ops.select import triton as module
    else:
        from minference.ops.select import reference as module
    return module


@torch.library.custom_op("minference::select_columns", mutates_args=())
def _select_columns(
    scores: Tensor, budgets: list[int], sink: int, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    chosen = _module(impl).select_columns(scores, tuple(budgets), sink)
    return chosen.values, chosen.start, chosen.count


@_select_columns.register_fake
def _(scores, budgets, sink, impl):  # noqa: ANN001, ANN202
    room = scores.numel()
    if impl == "triton":
        room = max(1, len(scores) * sum(min(max(b, sink), scores.shape[2]) for b in budgets))
    return _fake_lists(scores, room)


@torch.library.custom_op("minference::select_offsets", mutates_args=())
def _select_offsets(
    masses: Tensor, budgets: list[int], local: int, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    chosen, bits = _module(impl).select_offsets(masses, tuple(budgets), local)
    return chosen.values, chosen.start, chosen.count, bits


@_select_offsets.register_fake
def _(masses, budgets, local, impl):  # noqa: ANN001, ANN202
    words = (*masses.shape[:2], 1, -(-masses.shape[2] // 32))
    return *_fake_lists(masses, masses.numel()), masses.new_empty(words, dtype=torch.int32)


def _fake_lists(scores: Tensor, room: int) -> tuple[Tensor, Tensor, Tensor]:
    """What a `Ragged` of one list a head holds, without contents."""
    shape = (*scores.shape[:2], 1)
    return (
        scores.new_empty(room, dtype=torch.int32),
        scores.new_empty(shape, dtype=torch.int64),
        scores.new_empty(shape, dtype=torch.int32),
    )
