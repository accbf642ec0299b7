"""Block lists for every tile of 128 rows from pooled scores, some heads and rows at a time."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minference.index import BLOCK, TILE, Ragged, device_ints, most_tiles
from minference.ops.checks import check_qkv
from minference.ops.pool.reference import ENDS

SCORES = 1 << 24
"""Scores held at a time."""
POOLED = 1 << 26
"""Elements of queries that are copied at a time to be pooled."""


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
        budgets: key blocks of each of `heads`; with `keep_ends` at least two.
        heads: query heads to choose blocks for; all unless given.
        keep_ends: always choose the diagonal block and block 0.

    Returns:
        Lists for groups of one tile, [B, len(heads), tiles] from the chunk's first tile on.
    """
    check_qkv(q, k)
    own = list(range(q.shape[1]) if heads is None else heads)
    most = [max(x, ENDS) if keep_ends else x for x in budgets]
    return Ragged(*_pooled_block_lists(q, k, first, stop, most, own, keep_ends))


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
    read = sorted({h // group for h in heads})
    for b in range(batch):
        first_tile = (shift - first[b]).clamp(min=0) // TILE
        pooled_k = _pool(k[b], read, first[b], first[b], stop[b], -(-kv_len // BLOCK))
        begin = first[b] + first_tile * TILE - shift
        pooled_q = _pool(q[b], heads, begin, first[b] - shift, stop[b] - shift, 2 * tiles)
        rows[b], count[b] = _tile_lists(
            pooled_q,
            _of(pooled_k, [read.index(h // group) for h in heads]),
            2 * first_tile,
            2 * (shift // TILE),
            budgets,
            cap,
            keep_ends=keep_ends,
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
    return most_tiles(q_len), min(2 * max(budgets), 2 * -(-kv_len // TILE))


def _of(x: Float[Tensor, "heads P D"], heads: list[int]) -> Float[Tensor, "own P D"]:
    """Some heads, without a copy where they lie together."""
    if heads == list(range(heads[0], heads[0] + len(heads))):
        return x[heads[0] : heads[-1] + 1]
    return x[device_ints(tuple(heads), x.device)]


def _pool(
    x: Float[Tensor, "heads P D"],
    heads: list[int],
    begin: Int[Tensor, ""],
    low: Int[Tensor, ""],
    high: Int[Tensor, ""],
    blocks: int,
) -> Float[Tensor, "own blocks D"]:
    """Means of `blocks` blocks from row `begin` on; rows outside [low, high) count as zeros."""
    row = begin + torch.arange(blocks * BLOCK, device=x.device)
    real = ((row >= low) & (row < high) & (row >= 0) & (row < x.shape[1]))[:, None]
    row = row.clamp(0, x.shape[1] - 1)
    some = max(1, POOLED // (len(row) * x.shape[2]))
    means = []
    for at in range(0, len(heads), some):
        gathered = _of(x, heads[at : at + some]).index_select(1, row).masked_fill(~real, 0)
        means.append(gathered.unflatten(1, (blocks, BLOCK)).mean(dim=2, dtype=torch.float32))
    return torch.cat(means)


def _tile_lists(
    q: Float[Tensor, "heads rows D"],
    k: Float[Tensor, "heads blocks D"],
    first_row: Int[Tensor, ""],
    most_first: int,
    budgets: list[int],
    cap: int,
    *,
    keep_ends: bool,
) -> tuple[Int[Tensor, "heads tiles cap"], Int[Tensor, "heads tiles"]]:
    """Lists of every two rows; `most_first` is the largest that `first_row` can be."""
    heads, blocks, _ = k.shape
    topk = device_ints(tuple(budgets), q.device)
    step = max(2, SCORES // (heads * blocks) // 2 * 2)
    entries, counts = [], []
    for begin in range(0, q.shape[1], step):
        part = q[:, begin : begin + step]
        row = first_row + torch.arange(begin, begin + part.shape[1], device=q.device)[:, None]
        reach = min(blocks, most_first + begin + part.shape[1])
        column = torch.arange(reach, device=q.device)
        # a row that is no number would choose nothing, and then look like one that attends to zeros
        scores = (part @ k[:, :reach].mT).nan_to_num_(nan=torch.inf)
        if keep_ends:
            scores.masked_fill_((column == 0) | (column == row), torch.inf)
        causal = column <= row
        scores.masked_fill_(~causal, -torch.inf)
        chosen = _top_flags(scores, topk.clamp(max=reach), min(max(budgets), reach)) & causal
        bits = chosen[:, 0::2].int() + 2 * chosen[:, 1::2].int()
        entries.append(_compact_entries(bits, cap))
        counts.append((bits != 0).sum(dim=-1))
    return torch.cat(entries, dim=1), torch.cat(counts, dim=1)


def _top_flags(
    scores: Float[Tensor, "heads rows n"], topk: Int[Tensor, " heads"], most: int
) -> Bool[Tensor, "heads rows n"]:
    """The `topk[h]` best of each row, ties to the smaller place; `most` is the largest of topk."""
    best = scores.topk(most, dim=-1).values
    last = (topk - 1).clamp(min=0).long()[:, None, None].expand(-1, scores.shape[1], 1)
    least = best.gather(-1, last)
    above, level = scores > least, scores == least
    room = topk[:, None, None] - above.sum(dim=-1, keepdim=True)
    return above | (level & (level.cumsum(dim=-1, dtype=torch.int32) <= room))


def _compact_entries(
    bits: Int[Tensor, "heads tiles n"], cap: int
) -> Int[Tensor, "heads tiles cap"]:
    used = bits != 0
    place = torch.where(used, used.cumsum(dim=-1) - 1, cap).clamp(max=cap)
    block = torch.arange(bits.shape[-1], dtype=torch.int32, device=bits.device)
    rows = torch.zeros((*bits.shape[:-1], cap + 1), dtype=torch.int32, device=bits.device)
    return rows.scatter_(-1, place, 4 * block + bits)[..., :cap]
