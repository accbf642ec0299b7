"""From scores to lists: which columns and which relative block offsets a head keeps.

Plain torch on any device, without a host synchronisation. A slash at distance s passes through
block `2 t - o` of tile t iff `64 o - 64 < s <= 64 o + 127`, whatever the tile: that is why one
list of offsets serves every tile of a group.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minference.index import BLOCK, TILE, Ragged, device_ints, pack_bits


def offset_slots(kv_len: int) -> int:
    """Number of relative offsets that a prompt of `kv_len` keys can use; slot x is offset x - 1."""
    return 2 * -(-kv_len // TILE) + 2


def local_offsets(local: int) -> int:
    """Number of slots, from slot 0, that the distances 0..local-1 pass through (local >= 1)."""
    return (local - 1 + BLOCK - 1) // BLOCK + 2


def offset_budget(slash: int) -> int:
    """Most offsets that a budget of `slash` distances may spend: ceil(2 s / 64) + 3."""
    return -(-2 * slash // BLOCK) + 3


def compact(flags: Bool[Tensor, "B H G n"], shift: int = 0) -> Ragged:
    """Lists of the true places of each row, plus `shift`."""
    place = flags.cumsum(dim=-1) - 1
    slots = flags.shape[-1]
    rows = torch.zeros((*flags.shape[:-1], slots + 1), dtype=torch.int32, device=flags.device)
    values = torch.arange(slots, dtype=torch.int32, device=flags.device) + shift
    rows.scatter_(-1, torch.where(flags, place, slots), values.expand(flags.shape))
    return Ragged.from_rows(rows[..., :slots], flags.sum(dim=-1))


def offsets_from_flags(flags: Bool[Tensor, "B H G n"]) -> tuple[Ragged, Int[Tensor, "B H G W"]]:
    """Offset lists and their bitmap from one flag a slot."""
    return compact(flags, shift=-1), pack_bits(flags)


def lines_to_offsets(
    slashes: Int[Tensor, "B H n"], kv_len: int
) -> tuple[Ragged, Int[Tensor, "B H 1 W"]]:
    """Every offset that any of the distances passes through, and those of distance 0.

    Distances outside [0, kv_len) are ignored.
    """
    slots = offset_slots(kv_len)
    distance = slashes.long()
    real = (distance >= 0) & (distance < kv_len)
    low, high = distance // BLOCK, (distance + BLOCK - 1) // BLOCK + 1
    flags = torch.zeros((*slashes.shape[:2], slots + 1), dtype=torch.bool, device=slashes.device)
    for slot in (low, torch.minimum(low + 1, high), high):
        flags.scatter_(-1, torch.where(real, slot, slots), value=True)
    flags[..., :2] = True
    return offsets_from_flags(flags[:, :, None, :slots])


def columns_from_positions(positions: Int[Tensor, "B H n"], kv_len: int) -> Ragged:
    """Sorted column lists without duplicates; positions outside [0, kv_len) are ignored."""
    outside = (positions < 0) | (positions >= kv_len)
    ordered = torch.where(outside, kv_len, positions).sort(dim=-1).values
    repeated = torch.zeros_like(ordered, dtype=torch.bool)
    repeated[..., 1:] = ordered[..., 1:] == ordered[..., :-1]
    ordered = torch.where(repeated, kv_len, ordered).sort(dim=-1).values
    return Ragged.from_rows(ordered[:, :, None], (ordered < kv_len).sum(dim=-1)[..., None])


def top_flags(
    scores: Float[Tensor, "B H n"], budgets: tuple[int, ...], forced: int
) -> Bool[Tensor, "B H n"]:
    """The `max(budgets[h], forced)` best places of each head: the first `forced`, then by score.

    Ties go to the smaller place. Places with a negative score do not exist and are never kept; a
    score that is no number counts as the largest, so that its output shows it.
    """
    real = ~(scores < 0)
    ranked = scores.float().nan_to_num(nan=torch.inf, posinf=torch.inf)
    ranked[..., :forced].masked_fill_(real[..., :forced], torch.inf)
    order = ranked.sort(dim=-1, descending=True, stable=True).indices
    limit = device_ints(tuple(max(b, forced) for b in budgets), scores.device)
    rank = torch.arange(scores.shape[-1], device=scores.device)
    kept = (rank < limit[:, None]).expand(scores.shape)
    return torch.zeros_like(real).scatter_(-1, order, kept) & real


def select_columns(
    column_scores: Float[Tensor, "B H N"], budgets: tuple[int, ...], sink: int
) -> Ragged:
    """The columns of most estimated mass, the first `sink` always; budgets in columns a head."""
    return compact(top_flags(column_scores, budgets, sink)[:, :, None])


def select_offsets(
    offset_masses: Float[Tensor, "B H n"], budgets: tuple[int, ...], local: int
) -> tuple[Ragged, Int[Tensor, "B H 1 W"]]:
    """The offsets of most estimated mass, those of distances below `local` always; budgets in
    offsets a head."""
    flags = top_flags(offset_masses, budgets, local_offsets(local))
    return offsets_from_flags(flags[:, :, None])


def select_distances(
    slash_scores: Float[Tensor, "B H N"], budgets: tuple[int, ...], local: int
) -> tuple[Ragged, Int[Tensor, "B H 1 W"]]:
    """Every offset that one of the best distances passes through (the published selection: budgets
    in distances a head, distances below `local` always kept)."""
    kept = top_flags(slash_scores, budgets, local)
    distances = torch.arange(kept.shape[-1], device=kept.device)
    return lines_to_offsets(torch.where(kept, distances, -1), kept.shape[-1])
