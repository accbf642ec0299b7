"""Block lists for every tile of 128 rows from pooled scores, a few row blocks at a time."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minference.index import BLOCK, TILE, Ragged
from minference.ops.checks import check_qkv

CHUNK = 1 << 24
"""Scores held at a time."""


def pooled_block_lists(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B Hkv N D"],
    first: Int[Tensor, " B"],
    stop: Int[Tensor, " B"],
    budgets: tuple[int, ...],
    *,
    heads: Sequence[int] | None = None,
    keep_ends: bool = True,
) -> Ragged:
    """The best `budgets[x]` key blocks of every 64 rows, as entries of a `SparseIndex`'s `blocks`.

    Pooling is anchored at position 0 of each batch row; a chunk pools the queries that it holds.
    The entries of a tile are the union over its two row halves, each with the bits of the halves
    that want it. With `keep_ends` the diagonal block and block 0 are always chosen; the published
    selection does not force them.

    Args:
        q: queries.
        k: keys.
        first: buffer place of each batch row's first real key.
        stop: buffer place after its last real key.
        budgets: key blocks of each of `heads`.
        heads: query heads to choose blocks for; all unless given.
        keep_ends: always choose the diagonal block and block 0.

    Returns:
        Lists for groups of one tile, [B, len(heads), tiles] from the chunk's first tile on.
    """
    check_qkv(q, k)
    own = list(range(q.shape[1]) if heads is None else heads)
    return Ragged(*_pooled_block_lists(q, k, first, stop, list(budgets), own, keep_ends))


@torch.library.custom_op("minference::pooled_block_lists", mutates_args=())
def _pooled_block_lists(
    q: Tensor,
    k: Tensor,
    first: Tensor,
    stop: Tensor,
    budgets: list[int],
    heads: list[int],
    keep_ends: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, q_len, _ = q.shape
    kv_len, group = k.shape[2], q.shape[1] // k.shape[1]
    shift = kv_len - q_len
    tiles, cap = _sizes(q_len, kv_len, budgets)
    rows = torch.zeros((batch, len(heads), tiles, cap), dtype=torch.int32, device=q.device)
    count = torch.zeros((batch, len(heads), tiles), dtype=torch.int32, device=q.device)
    for b in range(batch):
        first_tile = (shift - first[b]).clamp(min=0) // TILE
        for x, h in enumerate(heads):
            pooled_k = _pool(k[b, h // group], first[b], first[b], stop[b], -(-kv_len // BLOCK))
            begin = first[b] + first_tile * TILE - shift
            pooled_q = _pool(q[b, h], begin, first[b] - shift, stop[b] - shift, 2 * tiles)
            rows[b, x], count[b, x] = _tile_lists(
                pooled_q, pooled_k, 2 * first_tile, budgets[x], cap, keep_ends=keep_ends
            )
    lists = Ragged.from_rows(rows, count)
    return lists.values, lists.start, lists.count


@_pooled_block_lists.register_fake
def _(q, k, first, stop, budgets, heads, keep_ends):  # noqa: ANN001, ANN202
    tiles, cap = _sizes(q.shape[2], k.shape[2], budgets)
    shape = (len(q), len(heads), tiles)
    return (
        q.new_empty(len(q) * len(heads) * tiles * cap, dtype=torch.int32),
        q.new_empty(shape, dtype=torch.int64),
        q.new_empty(shape, dtype=torch.int32),
    )


def _sizes(q_len: int, kv_len: int, budgets: list[int]) -> tuple[int, int]:
    """Tiles that a chunk may touch, and entries that each has room for."""
    return q_len // TILE + 2, min(2 * max(budgets), 2 * -(-kv_len // TILE))


def _pool(
    x: Float[Tensor, "P D"],
    begin: Int[Tensor, ""],
    low: Int[Tensor, ""],
    high: Int[Tensor, ""],
    blocks: int,
) -> Float[Tensor, "blocks D"]:
    """Means of `blocks` blocks from row `begin` on; rows outside [low, high) count as zeros."""
    row = begin + torch.arange(blocks * BLOCK, device=x.device)
    real = (row >= low) & (row < high) & (row >= 0) & (row < x.shape[0])
    gathered = x.index_select(0, row.clamp(0, x.shape[0] - 1)) * real[:, None]
    return gathered.unflatten(0, (blocks, BLOCK)).mean(dim=1, dtype=torch.float32)


def _tile_lists(
    q: Float[Tensor, "rows D"],
    k: Float[Tensor, "blocks D"],
    first_row: Int[Tensor, ""],
    topk: int,
    cap: int,
    *,
    keep_ends: bool,
) -> tuple[Int[Tensor, "tiles cap"], Int[Tensor, " tiles"]]:
    blocks = k.shape[0]
    column = torch.arange(blocks, device=q.device)
    step = max(2, CHUNK // blocks // 2 * 2)
    entries, counts = [], []
    for begin in range(0, q.shape[0], step):
        part = q[begin : begin + step]
        row = first_row + torch.arange(begin, begin + part.shape[0], device=q.device)[:, None]
        scores = part @ k.T
        if keep_ends:
            scores.masked_fill_((column == 0) | (column == row), torch.inf)
        chosen = _top_flags(scores.masked_fill_(column > row, -torch.inf), min(topk, blocks))
        chosen &= column <= row
        bits = chosen[0::2].int() + 2 * chosen[1::2].int()
        entries.append(_compact_entries(bits, cap))
        counts.append((bits != 0).sum(dim=-1))
    return torch.cat(entries), torch.cat(counts)


def _top_flags(scores: Float[Tensor, "rows n"], topk: int) -> Tensor:
    """The `topk` best of each row, ties to the smaller place: scores become unique integers."""
    bits = scores.view(torch.int32).long()
    ordered = torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits) << 20
    unique = ordered - torch.arange(scores.shape[-1], device=scores.device)
    best = unique.topk(topk, dim=-1, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, value=True)


def _compact_entries(bits: Int[Tensor, "tiles n"], cap: int) -> Int[Tensor, "tiles cap"]:
    place = torch.where(bits != 0, (bits != 0).cumsum(dim=-1) - 1, cap).clamp(max=cap)
    block = torch.arange(bits.shape[-1], dtype=torch.int32, device=bits.device)
    rows = torch.zeros((bits.shape[0], cap + 1), dtype=torch.int32, device=bits.device)
    return rows.scatter_(-1, place, 4 * block + bits)[:, :cap]
