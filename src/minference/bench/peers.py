"""What `benchmarks/peer_times.py` recorded of each method, for tables and the figure."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class MethodTime:
    """Attention of a layer by a method, index included.

    Attributes:
        milliseconds: index and kernel together, the median.
        speedup: over the fastest dense kernel of the same run.
        over: name of that kernel.
        density: share of the causal area that was computed.
        gpu: what it ran on; None on a CPU.
    """

    milliseconds: float
    speedup: float
    over: str
    density: float
    gpu: str | None


Times = dict[tuple[int, str], MethodTime]


def read_times(paths: Iterable[Path]) -> Times:
    """Times by length and method; of several the last counts. Records that failed their gate, were
    refused or have no dense kernel beside them are left out."""
    found: Times = {}
    for path in paths:
        for record in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            if record["op"] != "peer" or "speedup" not in record:
                continue
            found[record["length"], record["method"]] = MethodTime(
                record["together_ms"],
                record["speedup"],
                record["speedup_over"],
                record["density"],
                record["gpu"],
            )
    return found
