"""Key tiles by antidiagonal sums of scores (XAttention, arXiv 2503.16428), some tiles at a time.

The reference says what is computed for one head; here all heads go through one product, whose
scores are held for so many query tiles as fit.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minference.index import TILE, Ragged
from minference.ops.build import Layout
from minference.ops.checks import check_qkv
from minference.ops.scores import softcapped
from minference.ops.tiles.lists import (
    fewest,
    key_tiles,
    keys_by_position,
    queries_of_tiles,
    tile_lists,
    tile_numbers,
    unfilled_lists,
)

CHUNK = 1 << 26
"""Scores held at a time."""


def antidiagonal_tiles(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B Hkv N D"],
    layout: Layout,
    *,
    stride: int,
    threshold: float,
    scale: float,
    softcap: float = 0.0,
) -> Ragged:
    """The fewest key tiles of every query tile that hold the share `threshold` of its strided
    softmax weights; the first and the tile's own count first and are always among them.

    Args:
        q: queries; row r is key position N - L + r of the buffer.
        k: keys.
        layout: which places hold real tokens.
        stride: queries and keys of one antidiagonal, a divisor of 128.
        threshold: share of the weights.
        scale: factor of the scores.
        softcap: applied to the mean score of an antidiagonal.

    Returns:
        Block entries for groups of one tile, from the chunk's first tile on.
    """
    check_qkv(q, k)
    sizes = (layout.first, layout.stop, stride, threshold, scale, softcap)
    return Ragged(*_antidiagonal_tiles(q, k, *sizes))


@torch.library.custom_op("minference::antidiagonal_tiles", mutates_args=())
def _antidiagonal_tiles(
    q: Tensor,
    k: Tensor,
    first: Tensor,
    stop: Tensor,
    stride: int,
    threshold: float,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    layout = Layout(first, stop, q.shape[2], k.shape[2])
    keys = keys_by_position(k, layout)[0].unflatten(2, (-1, stride)).flatten(3)
    # the most left padding bounds from below where a run's rows lie
    lowest = max(0, layout.kv_len - layout.q_len - int(first.max())) // TILE
    parts = []
    for tiles in _runs(q, layout, stride):
        columns = min(keys.shape[2], (_highest(layout) + tiles.stop) * (TILE // stride))
        begin = (lowest + tiles.start) * (TILE // stride)
        masses = _masses(q, keys[:, :, :columns], layout, tiles, begin, stride, scale, softcap)
        parts.append(_covering(masses, tile_numbers(layout, tiles), threshold))
    lists = tile_lists(parts)
    return lists.values, lists.start, lists.count


@_antidiagonal_tiles.register_fake
def _(q, k, first, stop, stride, threshold, scale, softcap):  # noqa: ANN001, ANN202
    return unfilled_lists(q, k, first, stop)


def _highest(layout: Layout) -> int:
    """No chunk's first tile has a higher number."""
    return (layout.kv_len - layout.q_len) // TILE


def _runs(q: Tensor, layout: Layout, stride: int) -> list[range]:
    """Runs of the chunk's tiles whose scores fit."""
    a_tile = q.shape[0] * q.shape[1] * (TILE // stride) * key_tiles(layout) * (TILE // stride)
    step = max(1, CHUNK // a_tile)
    tiles = layout.chunk_tiles
    return [range(a, min(a + step, tiles)) for a in range(0, tiles, step)]


def _masses(
    q: Float[Tensor, "B H L D"],
    keys: Float[Tensor, "B Hkv columns SD"],
    layout: Layout,
    tiles: range,
    begin: int,
    stride: int,
    scale: float,
    softcap: float,
) -> Float[Tensor, "B H tiles keys"]:
    """Weights of the run's strided rows, summed over tiles; rows lie at column `begin` or later."""
    batch, heads = q.shape[:2]
    rows, real = queries_of_tiles(q, layout, tiles)
    # the last query of a run meets the first key
    rows = (rows * (scale / stride)).unflatten(2, (-1, stride)).flip(3).flatten(3)
    real = real.unflatten(1, (-1, stride)).any(dim=-1)
    packed = rows.reshape(batch, keys.shape[1], -1, rows.shape[3])
    scores = softcapped(
        (packed @ keys.transpose(2, 3)).view(batch, heads, real.shape[1], -1), softcap
    )
    size = TILE // stride
    row = (tile_numbers(layout, tiles)[..., None] * size).expand(-1, -1, size)
    row = (row + torch.arange(size, device=q.device)).flatten(1)
    column = torch.arange(begin, scores.shape[3], device=q.device)
    scores[..., begin:].masked_fill_((column > row[..., None])[:, None], -torch.inf)
    weights = scores.softmax(dim=-1, dtype=torch.float32)
    masses = weights.unflatten(3, (-1, size)).sum(dim=-1)
    masses.masked_fill_(~real[:, None, :, None], 0)
    return masses.unflatten(2, (-1, size)).sum(dim=3)


def _covering(
    masses: Float[Tensor, "B H tiles keys"], tile: Int[Tensor, "B tiles"], threshold: float
) -> Tensor:
    key = torch.arange(masses.shape[3], device=masses.device)
    forced = ((key == 0) | (key == tile[..., None]))[:, None]
    others = masses.masked_fill(forced, 0)
    total, rest = (x.sum(dim=-1, keepdim=True, dtype=torch.float64) for x in (masses, others))
    return fewest(others, threshold * total - (total - rest)) | forced
