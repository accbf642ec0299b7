"""The last-query estimate (arXiv 2407.02490): attention mass by column, distance, block offset."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minference.ops._dispatch import check_impl, resolve_impl
from minference.ops.checks import check_qkv, score_factor
from minference.ops.estimate.reference import ROWS, LineScores, MassScores, distances_to_offsets
from minference.ops.select.lists import offset_slots


def last_query_lines(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B Hkv N D"],
    first: Int[Tensor, " B"],
    stop: Int[Tensor, " B"],
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    rows: int = ROWS,
    impl: str = "auto",
) -> LineScores:
    """Attention mass of the last `rows` real queries on every column and at every distance.

    Args:
        q: queries; row r is key position N - L + r of the buffer.
        k: keys.
        first: buffer place of each batch row's first real key.
        stop: buffer place after its last real key.
        scale: factor of the scores; D ** -0.5 unless given.
        softcap: as in `sparse_attention`.
        rows: how many queries to score.
        impl: "reference" or the vectorised torch for every other name.

    Returns:
        columns[b, h, p], the mass on position p, and slashes[b, h, d], the mass at distance d,
        float32 [B, H, N], -1 from the number of real keys on.
    """
    check_qkv(q, k)
    check_impl(impl)
    scale = score_factor(q, scale, softcap)
    name = "reference" if impl == "reference" else "torch"
    return LineScores(*_last_query_lines(q, k, first, stop, scale, softcap, rows, name))


def last_query_masses(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B Hkv N D"],
    first: Int[Tensor, " B"],
    stop: Int[Tensor, " B"],
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    rows: int = ROWS,
    impl: str = "auto",
) -> MassScores:
    """Attention mass of the last `rows` real queries on every column and every block offset.

    Arguments as in `last_query_lines`; a Triton implementation reads each key tile once for all
    query heads of its KV head, twice in all.

    Returns:
        columns[b, h, p], the mass on position p (-1 from the number of real keys on), and
        offsets[b, h, x], the mass that lies in blocks of relative offset x - 1, float32.
    """
    check_qkv(q, k)
    scale = score_factor(q, scale, softcap)
    name = resolve_impl(impl, q.device, q.dtype, q.shape[-1])
    if name in ("reference", "torch"):
        lines = last_query_lines(
            q, k, first, stop, scale=scale, softcap=softcap, rows=rows, impl=name
        )
        return MassScores(lines.columns, distances_to_offsets(lines.slashes))
    return MassScores(*_last_query_masses(q, k, first, stop, scale, softcap, rows))


@torch.library.custom_op("minference::last_query_lines", mutates_args=())
def _last_query_lines(
    q: Tensor,
    k: Tensor,
    first: Tensor,
    stop: Tensor,
    scale: float,
    softcap: float,
    rows: int,
    impl: str,
) -> tuple[Tensor, Tensor]:
    if impl == "reference":
        from minference.ops.estimate import reference as module
    else:
        from minference.ops.estimate import torch_cpu as module
    return module.last_query_lines(q, k, first, stop, scale=scale, softcap=softcap, rows=rows)


@_last_query_lines.register_fake
def _(q, k, first, stop, scale, softcap, rows, impl):  # noqa: ANN001, ANN202
    shape = (*q.shape[:2], k.shape[2])
    return q.new_empty(shape, dtype=torch.float32), q.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("minference::last_query_masses", mutates_args=())
def _last_query_masses(
    q: Tensor, k: Tensor, first: Tensor, stop: Tensor, scale: float, softcap: float, rows: int
) -> tuple[Tensor, Tensor]:
    from minference.ops.estimate import triton as kernel

    return kernel.last_query_masses(q, k, first, stop, scale=scale, softcap=softcap, rows=rows)


@_last_query_masses.register_fake
def _(q, k, first, stop, scale, softcap, rows):  # noqa: ANN001, ANN202
    columns = q.new_empty((*q.shape[:2], k.shape[2]), dtype=torch.float32)
    return columns, columns.new_empty((*q.shape[:2], offset_slots(k.shape[2])))
