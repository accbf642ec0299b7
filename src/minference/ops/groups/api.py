"""The grouped estimate: which key blocks each query tile needs, from rows spread over its group."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from minference.errors import UnsupportedError
from minference.index import Ragged
from minference.ops._dispatch import resolve_impl
from minference.ops.build import Layout
from minference.ops.checks import check_qkv
from minference.ops.groups.plan import Plan, list_room


def grouped_blocks(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B Hkv N D"],
    layout: Layout,
    plan: Plan,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    impl: str = "auto",
) -> Ragged:
    """Block entries of every query tile of the chunk, one list for the heads of a KV head.

    Args:
        q: queries; row r is key position N - L + r of the buffer.
        k: keys.
        layout: which places hold real tokens.
        plan: how many rows and candidates, and the share of their mass that is kept.
        scale: factor of the scores; D ** -0.5 unless given.
        softcap: as in `sparse_attention`.
        impl: as in `sparse_attention`; "hopper" means the Triton estimate.
    """
    check_qkv(q, k)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    name = resolve_impl(impl, q.device, q.dtype, q.shape[-1])
    name = "triton" if name == "hopper" else name
    if name == "triton" and plan.rows & (plan.rows - 1):
        raise UnsupportedError(
            f"the Triton estimate takes a power of two of rows, got {plan.rows}; use impl='torch'"
        )
    knobs = [plan.mass, plan.share]
    sizes = [layout.q_len, layout.kv_len, plan.rows, plan.cell, plan.sum_cell, plan.floor, plan.cap]
    lists = _grouped_blocks(q, k, layout.first, layout.stop, sizes, knobs, scale, softcap, name)
    return Ragged(*lists)


@torch.library.custom_op("minference::grouped_blocks", mutates_args=())
def _grouped_blocks(
    q: Tensor,
    k: Tensor,
    first: Tensor,
    stop: Tensor,
    sizes: list[int],
    knobs: list[float],
    scale: float,
    softcap: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    q_len, kv_len, rows, cell, sum_cell, floor, cap = sizes
    layout = Layout(first, stop, q_len, kv_len)
    plan = Plan(rows, cell, sum_cell, floor, knobs[1], cap, knobs[0])
    match impl:
        case "reference":
            from minference.ops.groups import reference as module
        case "torch":
            from minference.ops.groups import torch_cpu as module
        case _:
            from minference.ops.groups import triton as module
    lists = module.grouped_blocks(q, k, layout, plan, scale=scale, softcap=softcap)
    return lists.values, lists.start, lists.count


@_grouped_blocks.register_fake
def _(q, k, first, stop, sizes, knobs, scale, softcap, impl):  # noqa: ANN001, ANN202
    layout = Layout(first, stop, sizes[0], sizes[1])
    shape = (len(first), k.shape[1], layout.chunk_tiles)
    room = list_room(layout, sizes[6])
    return (
        q.new_empty(shape[0] * shape[1] * shape[2] * room, dtype=torch.int32),
        q.new_empty(shape, dtype=torch.int64),
        q.new_empty(shape, dtype=torch.int32),
    )
