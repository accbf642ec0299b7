"""The three kernel functions by their published names: attention with given lines, blocks or band.

They take fp16, bf16 or fp32 tensors on CPU or GPU, K and V with one head a query head or one a
group, and a context longer than the queries (which are its last rows).
"""

from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minference.index import real_bounds
from minference.ops.attention.api import sparse_attention
from minference.ops.build import Layout, a_shape_index, assemble
from minference.ops.checks import check_count, check_qkv
from minference.ops.estimate.api import LineScores, last_query_lines
from minference.ops.pool.api import pooled_block_lists
from minference.ops.select.api import LOCAL_BAND, SINK_COLUMNS
from minference.ops.select.lists import (
    columns_from_positions,
    lines_to_offsets,
    select_columns,
    select_distances,
)


def vertical_slash_sparse_attention(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B Hkv N D"],
    v: Float[Tensor, "B Hkv N D"],
    vertical_topk: Int[Tensor, "B H nv"] | int,
    slash: Int[Tensor, "B H ns"] | int,
    *,
    impl: str = "auto",
) -> Float[Tensor, "B H L D"]:
    """Causal attention to columns and to diagonals of keys.

    Every named line is computed; where a diagonal passes through a block of 64 keys for a tile of
    128 queries, the whole block is, and so is the diagonal of distance 0: the result attends to a
    superset of the nominal lines (arXiv 2407.02490, vertical-slash).

    Args:
        q: queries.
        k: keys.
        v: values.
        vertical_topk: key positions, any order; or how many columns to choose by the scores of
            the last 64 queries (the first 30 are always among them).
        slash: distances query - key, any order; or how many to choose likewise (distances below
            100 are always among them).
        impl: as in `sparse_attention`.

    Raises:
        ValueError: shapes that do not fit, or on the CPU a position or distance outside
            [0, N). On a GPU such entries are ignored, since looking would stop the stream.
    """
    check_qkv(q, k, v)
    layout = _whole(q, k)

    @cache
    def estimate() -> LineScores:
        return last_query_lines(q, k, layout.first, layout.stop, impl=impl)

    if isinstance(vertical_topk, int):
        budgets = _counts("vertical_topk", vertical_topk, layout, q.shape[1], least=0)
        columns = select_columns(estimate().columns, budgets, SINK_COLUMNS)
    else:
        _check_lines("vertical_topk", vertical_topk, q, k)
        columns = columns_from_positions(vertical_topk, layout.kv_len)
    if isinstance(slash, int):
        budgets = _counts("slash", slash, layout, q.shape[1], least=1)
        offsets = select_distances(estimate().slashes, budgets, LOCAL_BAND)
    else:
        _check_lines("slash", slash, q, k)
        offsets = lines_to_offsets(slash, layout.kv_len)
    index = assemble(layout, q.shape[1], offsets=offsets, columns=columns)
    return sparse_attention(q, k, v, index, impl=impl)


def block_sparse_attention(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B Hkv N D"],
    v: Float[Tensor, "B Hkv N D"],
    topk: int,
    *,
    impl: str = "auto",
) -> Float[Tensor, "B H L D"]:
    """Causal attention of every 64 queries to their `topk` best key blocks of 64, exactly those.

    Blocks are scored by the product of mean query and mean key; the diagonal block is not forced,
    as published (arXiv 2407.02490, block-sparse).

    Raises:
        ValueError: shapes that do not fit, or topk below 1.
    """
    check_qkv(q, k, v)
    layout = _whole(q, k)
    budgets = _counts("topk", topk, layout, q.shape[1], least=1)
    lists = pooled_block_lists(q, k, layout.first, layout.stop, budgets, keep_ends=False)
    index = assemble(layout, q.shape[1], blocks=lists, group_tiles=1)
    return sparse_attention(q, k, v, index, impl=impl)


def streaming_forward(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B Hkv N D"],
    v: Float[Tensor, "B Hkv N D"],
    init_num: int,
    local_window_num: int,
    *,
    impl: str = "auto",
) -> Float[Tensor, "B H L D"]:
    """Causal attention to the `local_window_num` most recent keys (the query's own among them)
    and to the first `init_num`, exactly those (StreamingLLM, arXiv 2309.17453).

    Raises:
        ValueError: shapes that do not fit, init_num below 0 or local_window_num below 1.
    """
    check_qkv(q, k, v)
    layout = _whole(q, k)
    sinks = _counts("init_num", init_num, layout, q.shape[1], least=0)
    windows = _counts("local_window_num", local_window_num, layout, q.shape[1], least=1)
    return sparse_attention(q, k, v, a_shape_index(layout, sinks, windows), impl=impl)


def _whole(q: Tensor, k: Tensor) -> Layout:
    first, stop = real_bounds(q.shape[0], k.shape[2], q.device)
    return Layout(first, stop, q.shape[2], k.shape[2])


def _counts(name: str, value: int, layout: Layout, heads: int, *, least: int) -> tuple[int, ...]:
    """The same count for every head, at most that of the keys."""
    check_count(name, value, least)
    return (min(value, layout.kv_len),) * heads


def _check_lines(name: str, lines: Tensor, q: Tensor, k: Tensor) -> None:
    if not isinstance(lines, Tensor) or lines.dtype not in (torch.int32, torch.int64):
        got = lines.dtype if isinstance(lines, Tensor) else type(lines).__name__
        raise TypeError(f"{name} must be an int or an int32 or int64 tensor, got {got}")
    if lines.dim() != 3 or lines.shape[:2] != q.shape[:2]:
        raise ValueError(
            f"{name} must have shape [batch {q.shape[0]}, heads {q.shape[1]}, n], got "
            f"{list(lines.shape)}; give every query head its own list"
        )
    if lines.device != q.device:
        raise ValueError(f"{name} must be on {q.device} like q, got {lines.device}; move it")
    if lines.device.type == "cpu" and lines.numel():
        low, high = int(lines.min()), int(lines.max())
        if low < 0 or high >= k.shape[2]:
            raise ValueError(
                f"{name} must lie in [0, {k.shape[2]}), got values from {low} to {high}; drop the "
                f"entries outside the context"
            )
