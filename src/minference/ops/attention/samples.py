"""Rows that attended to an index's own keys attend to its samples too, the readable way."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from minference.index import BLOCK, TILE, SparseIndex
from minference.index_samples import sample_keys, sample_stride
from minference.ops.scores import softcapped

LARGEST = 14 * math.log(2)
"""Logarithm of the most that a sample counts, in units of a row's own keys: weights are rounded to
the dtype of the values, and half precision ends at 2^16."""


def join_samples(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B Hkv N D"],
    v: Float[Tensor, "B Hkv N D"],
    index: SparseIndex,
    out: Float[Tensor, "B H L D"],
    lse: Float[Tensor, "B H L"],
    *,
    scale: float,
    softcap: float = 0.0,
) -> tuple[Float[Tensor, "B H L D"], Float[Tensor, "B H L"]]:
    """Output and log-sum-exp once the samples of each tile take part in the softmax.

    Rows without keys of their own stay as they are.

    Args:
        q: queries.
        k: keys.
        v: values.
        index: one with samples.
        out: the output over the index's own keys; written in place.
        lse: its log-sum-exp; written in place.
        scale: factor of the scores.
        softcap: as in `sparse_attention`.
    """
    share = q.shape[1] // index.heads
    for b in range(index.batch):
        rows, shift, first = index.rows(b), index.query_start(b), int(index.first[b])
        for tile in index.tiles(b):
            keys = sample_keys(tile, index.samples, q.device)
            if not len(keys):
                continue
            stride = sample_stride(tile, index.samples)
            a, z = max(rows.start, tile * TILE), min(rows.stop, (tile + 1) * TILE)
            here = slice(a - shift, z - shift)
            for h in range(index.heads):
                own = slice(h * share, (h + 1) * share)
                kv_head = h * k.shape[1] // index.heads
                some_k, some_v = (x[b, kv_head, first + keys].float() for x in (k, v))
                scores = softcapped(q[b, own, here].float() @ some_k.T * scale, softcap)
                left_out = index.tile_blocks(b, h, tile)[keys // BLOCK] == 0
                weights = sample_weights(
                    scores, lse[b, own, here], left_out, stride, index.sample_share
                )
                mass = 1 + weights.sum(dim=-1)
                joint = out[b, own, here].float() + weights @ some_v
                out[b, own, here] = (joint / mass[..., None]).to(out.dtype)
                lse[b, own, here] += mass.log()
    return out, lse


def sample_weights(
    scores: Float[Tensor, "*G rows n"],
    lse: Float[Tensor, "*G rows"],
    left_out: Bool[Tensor, "... n"],
    stride: int,
    share: float,
) -> Float[Tensor, "*G rows n"]:
    """How much samples weigh, in units of the sum of a row's own keys.

    Those that the row's blocks leave out count once for each of the run's keys, but then at most
    as `share`, and never less than once.
    """
    once = scores - lse[..., None]
    times = torch.minimum(once + math.log(stride), once.clamp(min=math.log(share)))
    times = times.clamp(max=LARGEST).masked_fill(~left_out, -torch.inf)
    return times.masked_fill(lse[..., None] == -torch.inf, -torch.inf).exp()
