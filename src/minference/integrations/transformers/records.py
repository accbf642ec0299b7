"""What an attached model tells of its last prefill: density, time and recall by layer."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minference.index import SparseIndex
from minference.ops.attention.recall import dense_rows, kept_mass, output_error, sample_rows

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
        checked: mark after what `kept` takes, which serves nobody but the record.
        kept: share of the attention mass kept by sampled rows, [B, H, R], and the relative error
            of their outputs, [B, H].
    """

    layer: int
    index: SparseIndex | None
    dense: bool
    begin: Mark
    built: Mark
    end: Mark
    checked: Mark
    kept: tuple[Tensor, Tensor] | None = None

    def to_dict(self) -> dict[str, float]:
        """Numbers: layer, density of what was computed, seconds; of the index its own density, also
        where the dense kernel served; recall and the outputs' error where they were asked for."""
        asked = 1.0 if self.index is None else self.index.density()
        row = {
            "layer": self.layer,
            "density": 1.0 if self.dense else asked,
            "index_density": asked,
            "index_seconds": seconds(self.begin, self.built),
            "attention_seconds": seconds(self.built, self.end),
        }
        if self.kept is not None:
            mass, error = self.kept
            row |= {"recall": float(mass.mean()), "recall_min": float(mass.min())}
            row |= {"output_error": float(error.mean())}
            row["recall_seconds"] = seconds(self.end, self.checked)
        return row

    def heads(self) -> list[dict[str, float]]:
        """By head, over the batch: density, recall and the outputs' error, as in `to_dict`.

        Empty where the dense kernel served, which keeps everything.
        """
        if self.index is None or self.dense:
            return []
        lists = self.index.head_density().mean(0).tolist()
        count = len(lists) if self.kept is None else self.kept[0].shape[1]
        rows = [
            {"layer": self.layer, "head": h, "density": lists[h * len(lists) // count]}
            for h in range(count)
        ]
        if self.kept is not None:
            mass, error = self.kept
            for h, row in enumerate(rows):
                row |= {"recall": float(mass[:, h].mean()), "recall_min": float(mass[:, h].min())}
                row |= {"output_error": float(error[:, h].mean())}
        return rows


def kept(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    answer: tuple[Tensor, Tensor],
    index: SparseIndex,
    rows: int,
    **options: Any,  # noqa: ANN401
) -> tuple[Tensor, Tensor]:
    """Attention mass kept by sampled rows, [B, H, R], and the error of their outputs, [B, H].

    Args:
        query: [B, H, L, D].
        key: [B, Hkv, N, D].
        value: like key.
        answer: output and log-sum-exp of the sparse attention, sinks included.
        index: what the sparse attention computed.
        rows: how many rows.
        **options: scale, softcap and sinks, as in `sparse_attention`.
    """
    at = sample_rows(query.shape[2], rows, query.device)
    out, lse = (x[:, :, at] for x in answer)
    dense, dense_lse = dense_rows(query, key, value, index, at, **options)
    return kept_mass(lse, dense_lse), output_error(out, dense)
