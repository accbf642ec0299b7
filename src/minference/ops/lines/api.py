"""`best_lines`: the whole index of vertical-slash heads, from q and k to lists, as one operator."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minference.index import Ragged, device_ints
from minference.ops._dispatch import resolve_impl
from minference.ops.checks import check_qkv, score_factor
from minference.ops.estimate.api import last_query_masses
from minference.ops.select.api import (
    LOCAL_BAND,
    SINK_COLUMNS,
    check_budgets,
    select_columns,
    select_offsets,
)
from minference.ops.select.lists import local_offsets, offset_slots


@dataclass(frozen=True, eq=False)
class Lines:
    """What a vertical-slash head attends to, as in `SparseIndex`: columns, block offsets and the
    offsets' bitmap."""

    columns: Ragged
    offsets: Ragged
    offset_bits: Int[Tensor, "B h 1 W"]


def best_lines(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B Hkv N D"],
    first: Int[Tensor, " B"],
    stop: Int[Tensor, " B"],
    columns: tuple[int, ...],
    offsets: tuple[int, ...],
    *,
    heads: Sequence[int] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    impl: str = "auto",
) -> Lines:
    """The columns and block offsets of most mass under the last 64 real queries of each head.

    `last_query_masses`, `select_columns` and `select_offsets` in one: on a GPU four launches for
    all heads, which the host does not wait for.

    Args:
        q: queries; row r is key position N - L + r of the buffer.
        k: keys.
        first: buffer place of each batch row's first real key.
        stop: buffer place after its last real key.
        columns: most columns of each of `heads`.
        offsets: most block offsets of each of `heads`.
        heads: query heads to choose for, all unless given.
        scale: factor of the scores; D ** -0.5 unless given.
        softcap: as in `sparse_attention`.
        impl: "reference", "torch", "triton", or "auto" for the fastest.
    """
    check_qkv(q, k)
    every = list(range(q.shape[1]))
    own = every if heads is None else list(heads)
    check_budgets(columns, len(own))
    check_budgets(offsets, len(own))
    scale = score_factor(q, scale, softcap)
    name = resolve_impl(impl, q.device, q.dtype, q.shape[-1])
    if name in ("reference", "torch"):
        masses = last_query_masses(q, k, first, stop, scale=scale, softcap=softcap, impl=name)
        by_column, by_offset = masses if own == every else (x[:, own] for x in masses)
        return Lines(select_columns(by_column, columns), *select_offsets(by_offset, offsets))
    found = _best_lines(q, k, first, stop, own, list(columns), list(offsets), scale, softcap)
    return Lines(Ragged(*found[:3]), Ragged(*found[3:6]), found[6])


@lru_cache(maxsize=256)
def _limits(columns: tuple[int, ...], offsets: tuple[int, ...], kv_len: int) -> tuple[int, ...]:
    """For each list the columns at most, the columns of the lists before it, the offsets at most;
    then the columns of all lists."""
    flat, room = [], 0
    forced, slots = local_offsets(LOCAL_BAND), offset_slots(kv_len)
    for own_columns, own_offsets in zip(columns, offsets, strict=True):
        limit = min(max(own_columns, SINK_COLUMNS), kv_len)
        flat += [limit, room, min(max(own_offsets, forced), slots)]
        room += limit
    return *flat, room


@torch.library.custom_op("minference::best_lines", mutates_args=())
def _best_lines(
    q: Tensor,
    k: Tensor,
    first: Tensor,
    stop: Tensor,
    heads: list[int],
    columns: list[int],
    offsets: list[int],
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from minference.ops.estimate import triton as estimate
    from minference.ops.lines import triton as kernel

    sums = estimate.line_sums(q, k, first, stop, scale=scale, softcap=softcap)
    numbers = _limits(tuple(columns), tuple(offsets), k.shape[2])
    given = (device_ints(tuple(heads), q.device), device_ints(numbers, q.device), numbers[-1])
    forced = SINK_COLUMNS, local_offsets(LOCAL_BAND)
    x, y, bits = kernel.best_lines(sums, first, stop, *given, *forced)
    return x.values, x.start, x.count, y.values, y.start, y.count, bits


@_best_lines.register_fake
def _(q, k, first, stop, heads, columns, offsets, scale, softcap):  # noqa: ANN001, ANN202
    batch, slots = len(q), offset_slots(k.shape[2])
    room = sum(min(max(budget, SINK_COLUMNS), k.shape[2]) for budget in columns)
    shape = (batch, len(heads), 1)

    def ints(*sizes: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return q.new_empty(sizes, dtype=dtype)

    lists = [
        (ints(max(1, values)), ints(*shape, dtype=torch.int64), ints(*shape))
        for values in (batch * room, batch * len(heads) * slots)
    ]
    return *lists[0], *lists[1], ints(*shape, -(-slots // 32))
