"""What an attached model tells of its last prefill: density, time and recall by layer."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from minference.index import SparseIndex

Mark = float | torch.cuda.Event


def mark(device: torch.device) -> Mark:
    """The time on the clock that the device's work goes by."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def seconds(begin: Mark, end: Mark) -> float:
    """Time between two marks; waits for the device."""
    if isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        end.synchronize()
        return begin.elapsed_time(end) / 1000
    return float(end) - float(begin)  # type: ignore[arg-type]


@dataclass
class LayerRecord:
    """One layer of a prefill.

    Attributes:
        layer: number of the layer.
        index: what the method built, None where it asked for dense attention.
        dense: whether the dense kernel served.
        begin, built, end: marks before the index, between index and attention, and after.
        recall: share of the attention mass kept by sampled rows, [B, H, R].
    """

    layer: int
    index: SparseIndex | None
    dense: bool
    begin: Mark
    built: Mark
    end: Mark
    recall: Tensor | None = None

    def to_dict(self) -> dict[str, float]:
        """Numbers: layer, density of what was computed, seconds; of the index its own density, also
        where the dense kernel served; recall where it was asked for."""
        asked = 1.0 if self.index is None else self.index.density()
        row = {
            "layer": self.layer,
            "density": 1.0 if self.dense else asked,
            "index_density": asked,
            "index_seconds": seconds(self.begin, self.built),
            "attention_seconds": seconds(self.built, self.end),
        }
        if self.recall is not None:
            row |= {"recall": float(self.recall.mean()), "recall_min": float(self.recall.min())}
        return row


def kept_mass(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    index: SparseIndex,
    rows: int,
    *,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """exp(lse_sparse - lse_dense) of `rows` rows spread over the queries, [B, H, R].

    Rows of padding count as 1.

    Args:
        query: [B, H, L, D].
        key: [B, Hkv, N, D].
        lse: of the sparse attention, [B, H, L], sinks included.
        index: what the sparse attention computed.
        rows: how many rows.
        scale, softcap, sinks: as in `sparse_attention`.
    """
    length, past = query.shape[2], key.shape[2] - query.shape[2]
    at = torch.linspace(0, length - 1, min(rows, length), device=query.device).round().long()
    places = torch.arange(key.shape[2], device=query.device)
    seen = places <= (past + at)[:, None]
    real = (places >= index.first[:, None]) & (places < index.stop[:, None])  # [B, N]
    mask = seen & real[:, None]
    group = query.shape[1] // key.shape[1]
    dense = []
    for head in range(query.shape[1]):
        scores = query[:, head, at].float() * scale @ key[:, head // group].float().transpose(1, 2)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        total = scores.masked_fill_(~mask, -torch.inf).logsumexp(dim=-1)
        dense.append(total if sinks is None else torch.logaddexp(total, sinks[head].float()))
    return (lse[:, :, at] - torch.stack(dense, dim=1)).exp().nan_to_num(1.0)
