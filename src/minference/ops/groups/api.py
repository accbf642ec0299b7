"""The grouped estimate: which key blocks each query tile needs, from rows spread over its group."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from minference.errors import UnsupportedError
from minference.index import TILE, Ragged
from minference.ops._dispatch import resolve_impl
from minference.ops.build import Layout
from minference.ops.checks import check_qkv
from minference.ops.groups.guard import Guarded, guard, kept_shares, stride_of
from minference.ops.groups.plan import ALWAYS, GROUP_TILES, Plan, group_count, list_room


def grouped_blocks(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B Hkv N D"],
    layout: Layout,
    plan: Plan,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    impl: str = "auto",
) -> tuple[Ragged, Ragged]:
    """Block entries of every query tile of the chunk, one list for the heads of a KV head.

    Args:
        q: queries; row r is key position N - L + r of the buffer.
        k: keys.
        layout: which places hold real tokens.
        plan: how many rows, and what is kept.
        scale: factor of the scores; D ** -0.5 unless given.
        softcap: as in `sparse_attention`.
        impl: as in `sparse_attention`; "hopper" means the Triton estimate.

    Returns:
        The lists, and a wider one for every group of 4 tiles.
    """
    check_qkv(q, k)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    name = _name(impl, q)
    if name == "triton" and plan.rows & (plan.rows - 1):
        raise UnsupportedError(
            f"the Triton estimate takes a power of two of rows, got {plan.rows}; use impl='torch'"
        )
    sizes = [layout.q_len, layout.kv_len, plan.rows, plan.most, plan.wider, plan.candidates]
    bounds = (layout.first, layout.stop)
    lists = _grouped_blocks(q, k, *bounds, sizes, plan.mass, scale, softcap, name)
    return Ragged(*lists[:3]), Ragged(*lists[3:])


def guard_blocks(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B Hkv N D"],
    lists: Ragged,
    wider: Ragged,
    layout: Layout,
    *,
    target: float,
    scale: float | None = None,
    softcap: float = 0.0,
    impl: str = "auto",
) -> Guarded:
    """What `grouped_blocks` gave, with the wider list or every block where a row that it did not
    see keeps less than `target` of its attention or drops a block that holds much of it; arguments
    as there."""
    check_qkv(q, k)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    parts = [x for r in (lists, wider) for x in (r.values, r.start, r.count)]
    sizes = [layout.q_len, layout.kv_len]
    bounds = (layout.first, layout.stop)
    name = _name(impl, q)
    *kept, recall, level = _guard_blocks(q, k, parts, *bounds, sizes, target, scale, softcap, name)
    return Guarded(Ragged(*kept), recall, level)


def _name(impl: str, q: Tensor) -> str:
    name = resolve_impl(impl, q.device, q.dtype, q.shape[-1])
    return "triton" if name == "hopper" else name


@torch.library.custom_op("minference::guard_blocks", mutates_args=())
def _guard_blocks(
    q: Tensor,
    k: Tensor,
    parts: list[Tensor],
    first: Tensor,
    stop: Tensor,
    sizes: list[int],
    target: float,
    scale: float,
    softcap: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    layout = Layout(first, stop, *sizes)
    lists, wider = Ragged(*parts[:3]), Ragged(*parts[3:])
    how = {"scale": scale, "softcap": softcap}
    if impl == "triton":
        from minference.ops.groups.triton_levels import guard as fused

        done, _ = fused(q, k, lists, wider, layout, target, **how)
    else:
        kept = (
            kept_shares(q, k, lists, 1, layout, **how),
            kept_shares(q, k, wider, GROUP_TILES, layout, **how),
        )
        done = guard(lists, wider, layout, kept, target)
    return done.lists.values, done.lists.start, done.lists.count, done.recall, done.level


@_guard_blocks.register_fake
def _(q, k, parts, first, stop, sizes, target, scale, softcap, impl):  # noqa: ANN001, ANN202
    layout = Layout(first, stop, *sizes)
    room = parts[0].numel() + parts[3].numel() + 2 * -(-layout.kv_len // TILE)
    slots = -(-group_count(layout) // stride_of(layout))
    recall = q.new_empty((*parts[1].shape[:2], slots), dtype=torch.float32)
    return (
        parts[0].new_empty(room),
        torch.empty_like(parts[1]),
        torch.empty_like(parts[2]),
        recall,
        recall.to(torch.int64),
    )


@torch.library.custom_op("minference::grouped_blocks", mutates_args=())
def _grouped_blocks(
    q: Tensor,
    k: Tensor,
    first: Tensor,
    stop: Tensor,
    sizes: list[int],
    mass: float,
    scale: float,
    softcap: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    q_len, kv_len, rows, most, wider, candidates = sizes
    layout = Layout(first, stop, q_len, kv_len)
    plan = Plan(rows, mass, most, wider, candidates)
    match impl:
        case "reference":
            from minference.ops.groups import reference as module
        case "torch":
            from minference.ops.groups import torch_cpu as module
        case _:
            from minference.ops.groups import triton as module
    made = module.grouped_blocks(q, k, layout, plan, scale=scale, softcap=softcap)
    lists, wider = made
    return (lists.values, lists.start, lists.count, wider.values, wider.start, wider.count)


@_grouped_blocks.register_fake
def _(q, k, first, stop, sizes, mass, scale, softcap, impl):  # noqa: ANN001, ANN202
    layout = Layout(first, stop, sizes[0], sizes[1])
    fakes = []
    kinds = ((layout.chunk_tiles, sizes[3] + ALWAYS), (group_count(layout), sizes[4]))
    for lists, entries in kinds:
        room = list_room(layout, entries)
        shape = (len(first), k.shape[1], lists)
        fakes += [
            q.new_empty(math.prod(shape) * room, dtype=torch.int32),
            q.new_empty(shape, dtype=torch.int64),
            q.new_empty(shape, dtype=torch.int32),
        ]
    return tuple(fakes)
