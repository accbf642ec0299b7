"""What `benchmarks/peer_times.py` recorded of each method, for tables and the figure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from minference.json_files import read_json_lines


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
    refused or have no dense kernel beside them are left out.

    Raises:
        ValueError: a file without a time.
    """
    found: Times = {}
    for path in paths:
        timed = [r for r in read_json_lines(path) if r.get("op") == "peer" and "speedup" in r]
        if not timed:
            raise ValueError(
                f"{path} must hold times of benchmarks/peer_times.py with a dense kernel beside "
                "them, got none"
            )
        for record in timed:
            found[record["length"], record["method"]] = MethodTime(
                record["together_ms"],
                record["speedup"],
                record["speedup_over"],
                record["density"],
                record["gpu"],
            )
    return found
