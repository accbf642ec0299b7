"""The grouped estimate: which key blocks each query tile needs, from rows spread over its group."""

import math
from collections.abc import Iterator
from importlib import import_module

import torch
from jaxtyping import Float
from torch import Tensor

from minference.errors import UnsupportedError
from minference.index import Ragged
from minference.ops._dispatch import resolve_impl
from minference.ops.build import Layout
from minference.ops.checks import check_qkv, score_factor
from minference.ops.groups.guard import Guarded, guard, kept_shares, stride_of
from minference.ops.groups.last import last_layout, put_last
from minference.ops.groups.plan import ALWAYS, GROUP_TILES, Plan, group_count, list_room

MODULES = {"reference": "reference", "torch": "torch_cpu", "triton": "triton"}
"""Where the implementations are; imported when they are called."""


def grouped_blocks(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B Hkv N D"],
    layout: Layout,
    plan: Plan,
    *,
    last: tuple[int, Plan] | None = None,
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
        last: rows at the chunk's end and what their groups' tiles are estimated with instead.
        scale: factor of the scores; D ** -0.5 unless given.
        softcap: as in `sparse_attention`.
        impl: as in `sparse_attention`; "hopper" means the Triton estimate.

    Returns:
        The lists, and a wider one for every group of 4 tiles.
    """
    check_qkv(q, k)
    scale = score_factor(q, scale, softcap)
    name = _name(impl, q)
    rows, own = last or (0, plan)
    for some in (plan, own):
        if name == "triton" and some.rows & (some.rows - 1):
            raise UnsupportedError(
                f"the Triton estimate takes a power of two of rows, got {some.rows}; use "
                "impl='torch'"
            )
    sizes = [layout.q_len, layout.kv_len, rows, *_sizes(plan), *_sizes(own)]
    masses = [plan.mass, own.mass]
    bounds = (layout.first, layout.stop)
    lists = _grouped_blocks(q, k, *bounds, sizes, masses, scale, softcap, name)
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
    scale = score_factor(q, scale, softcap)
    parts = [x for r in (lists, wider) for x in (r.values, r.start, r.count)]
    sizes = [layout.q_len, layout.kv_len]
    bounds = (layout.first, layout.stop)
    name = _name(impl, q)
    *kept, recall, level = _guard_blocks(q, k, parts, *bounds, sizes, target, scale, softcap, name)
    return Guarded(Ragged(*kept), recall, level)


def _sizes(plan: Plan) -> list[int]:
    return [plan.rows, plan.most, plan.wider, plan.candidates, plan.cell]


def _plans(sizes: list[int], masses: list[float]) -> Iterator[Plan]:
    for at, mass in enumerate(masses):
        rows, most, wider, candidates, cell = sizes[3 + 5 * at : 8 + 5 * at]
        yield Plan(rows, mass, most, wider, candidates, cell)


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
    room = parts[0].numel() + parts[3].numel() + layout.blocks
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
    masses: list[float],
    scale: float,
    softcap: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    layout = Layout(first, stop, *sizes[:2])
    plan, closer = _plans(sizes, masses)
    module = import_module(f"minference.ops.groups.{MODULES[impl]}")
    keys = module.read_keys(k, layout, plan, softcap)
    how = {"scale": scale, "softcap": softcap}
    lists, wider = module.grouped_blocks(q, keys, layout, plan, **how)
    if rows := sizes[2]:
        own = last_layout(layout, rows)
        last, _ = module.grouped_blocks(q[:, :, -own.q_len :], keys, own, closer, **how)
        lists = put_last(lists, last, layout, own)
    return (lists.values, lists.start, lists.count, wider.values, wider.start, wider.count)


@_grouped_blocks.register_fake
def _(q, k, first, stop, sizes, masses, scale, softcap, impl):  # noqa: ANN001, ANN202
    layout = Layout(first, stop, *sizes[:2])
    plan, closer = _plans(sizes, masses)
    kinds = [
        (layout.chunk_tiles, list_room(layout, plan.most + ALWAYS)),
        (group_count(layout), list_room(layout, plan.wider)),
    ]
    more = 0
    if sizes[2]:
        more = last_layout(layout, sizes[2]).chunk_tiles
        more *= list_room(layout, closer.most + ALWAYS)
    fakes = []
    for (lists, room), extra in zip(kinds, (more, 0), strict=True):
        shape = (len(first), k.shape[1], lists)
        fakes += [
            q.new_empty(math.prod(shape[:2]) * (lists * room + extra), dtype=torch.int32),
            q.new_empty(shape, dtype=torch.int64),
            q.new_empty(shape, dtype=torch.int32),
        ]
    return tuple(fakes)
