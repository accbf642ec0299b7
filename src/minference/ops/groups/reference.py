"""Vertical and slash lines of each group of query rows, estimated from rows spread over it."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minference.index import BLOCK, TILE, Ragged
from minference.ops.build import Layout
from minference.ops.select.reference import offset_slots

GROUP_TILES = 4


def group_count(layout: Layout) -> int:
    """Most groups that the chunk can touch."""
    rows = GROUP_TILES * TILE
    return min(layout.q_len // rows + 2, -(-layout.kv_len // rows))


def spread_rows(
    layout: Layout, group: int, rows: int
) -> tuple[Int[Tensor, "B rows"], Bool[Tensor, " B"]]:
    """Evenly spaced positions among a group's real rows, and whether the group has any."""
    size = GROUP_TILES * TILE
    begin = layout.kv_len - layout.q_len - layout.first
    group_start = (begin.clamp(min=0) // size + group) * size
    a = torch.maximum(group_start, begin.clamp(min=0))
    z = torch.minimum(group_start + size, layout.stop - layout.first)
    step = 2 * torch.arange(rows, device=layout.device) + 1
    positions = a[:, None] + step * (z - a).clamp(min=0)[:, None] // (2 * rows)
    return positions, z > a


def group_masses(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B Hkv N D"],
    layout: Layout,
    *,
    rows: int,
    scale: float,
    softcap: float = 0.0,
) -> tuple[Float[Tensor, "B Hkv G slots"], Float[Tensor, "B Hkv G blocks"]]:
    """Attention mass of every block offset and of every key block, a group and KV head.

    Masses are means over the query heads of a KV head and over `rows` rows of the group; slot s
    is offset s - 1. Groups without real rows have none.
    """
    places = layout.first[:, None] + torch.arange(layout.kv_len, device=q.device)
    wide = places.clamp(max=layout.kv_len - 1)[:, None, :, None]
    keys = k.gather(2, wide.expand(-1, k.shape[1], -1, k.shape[3])).float()
    groups = [
        _one_group(q, keys, layout, group, rows, scale, softcap)
        for group in range(group_count(layout))
    ]
    by_offset, by_block = (torch.stack(masses, dim=2) for masses in zip(*groups, strict=True))
    return by_offset, by_block


def _one_group(
    q: Tensor, keys: Tensor, layout: Layout, group: int, rows: int, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    batch, kv_heads, kv_len, dim = keys.shape
    positions, real = spread_rows(layout, group, rows)
    place = (positions + layout.first[:, None] - (kv_len - layout.q_len)).clamp(0, q.shape[2] - 1)
    own = q.gather(2, place[:, None, :, None].expand(-1, q.shape[1], -1, dim)).float()
    own = own.view(batch, kv_heads, -1, dim)  # query heads of a KV head one after another
    scores = (own @ keys.transpose(2, 3) * scale).unflatten(2, (-1, rows))
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    future = torch.arange(kv_len, device=q.device) > positions[..., None]
    scores = scores.masked_fill(future[:, None, None], float("-inf"))
    mass = scores.softmax(dim=-1).mean(dim=2) * real[:, None, None, None] / rows
    slots = offset_slots(kv_len)
    blocks = 2 * -(-kv_len // TILE)
    mass = torch.nn.functional.pad(mass, (0, blocks * BLOCK - kv_len))
    mass = mass.unflatten(3, (blocks, BLOCK)).sum(dim=-1)
    slot = 2 * (positions // TILE)[..., None] - torch.arange(blocks, device=q.device) + 1
    slot = slot.clamp(0, slots - 1)[:, None].expand_as(mass).flatten(2)
    by_offset = mass.new_zeros(batch, kv_heads, slots).scatter_add_(2, slot, mass.flatten(2))
    return by_offset, mass.sum(dim=2)


def keep_mass(masses: Float[Tensor, "*rows n"], share: float) -> Bool[Tensor, "*rows n"]:
    """The fewest entries of each row that hold at least `share` of its sum; none of a zero row."""
    ordered, order = masses.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered
    kept = (before < share * masses.sum(dim=-1, keepdim=True)) & (ordered > 0)
    return torch.zeros_like(kept).scatter(-1, order, kept)


def block_lists(flags: Bool[Tensor, "B H G blocks"]) -> Ragged:
    """Block entries, in both halves of a tile, of the flagged blocks."""
    number = torch.arange(flags.shape[-1], device=flags.device)
    past_all = flags.shape[-1]
    rows = torch.where(flags, number, past_all).sort(dim=-1).values
    return Ragged.from_rows(rows * 4 + 3, flags.sum(dim=-1))
