"""What sparse prefill did, counted in each worker: for logs, for `stats`, and for Prometheus."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from minference.lengths import causal_pairs

_HELP = {
    "chunks": "Prompt chunks that sparse attention served",
    "tokens": "Prompt tokens that sparse attention served",
    "causal_pairs": "Query-key pairs of the measured chunks, averaged over layers and heads",
    "computed_pairs": "Pairs of them that were computed; the ratio is the density",
    "failures": "Errors inside sparse attention, one a layer and chunk",
}


@dataclass
class Totals:
    """Sums since the start; density = computed_pairs / causal_pairs."""

    chunks: int = 0
    tokens: int = 0
    causal_pairs: float = 0.0
    computed_pairs: float = 0.0
    failures: int = 0

    @property
    def density(self) -> float | None:
        """Share of the causal area that was computed; None before the first chunk."""
        return self.computed_pairs / self.causal_pairs if self.causal_pairs else None


@dataclass
class Chunk:
    """One request's chunk of one step, as its layers report it."""

    queries: int
    context: int
    densities: list[float] = field(default_factory=list)

    @property
    def pairs(self) -> float:
        """Query-key pairs of the causal area."""
        return causal_pairs(self.queries, self.context)


@dataclass
class Recorder:
    """Collects the layers of a step and, when the next step starts, adds them up and logs them.

    Attributes:
        report: gets one finished line a chunk.
        publish: whether this worker exports counters; one of each tensor-parallel group does.
    """

    report: Callable[[str], None]
    publish: bool = True
    totals: Totals = field(default_factory=Totals)
    last_layer: int = 0
    _chunks: dict[int, Chunk] = field(default_factory=dict)

    def note(self, layer: int, row: int, queries: int, context: int, density: float | None) -> None:
        """A layer served a row of the step, at this density if it was measured; the last layer
        closes the row."""
        chunk = self._chunks.setdefault(row, Chunk(queries, context))
        if density is not None:
            chunk.densities.append(density)
        if layer == self.last_layer:
            self._close(self._chunks.pop(row))

    def start_step(self) -> None:
        """Closes what the last step left open: layers that turned dense on the way."""
        while self._chunks:
            self._close(self._chunks.popitem()[1])

    def fail(self) -> None:
        """A layer failed on a row."""
        self._add(failures=1)

    def summary(self) -> dict[str, Any]:
        """The totals as plain values."""
        self.start_step()
        return {**asdict(self.totals), "density": self.totals.density}

    def _close(self, chunk: Chunk) -> None:
        self._add(chunks=1, tokens=chunk.queries)
        if not chunk.densities:
            return
        density = sum(chunk.densities) / len(chunk.densities)
        self._add(causal_pairs=chunk.pairs, computed_pairs=density * chunk.pairs)
        self.report(
            f"sparse prefill: {chunk.queries} queries on {chunk.context} keys, density "
            f"{density:.4f} over {len(chunk.densities)} layers"
        )

    def _add(self, **amounts: float) -> None:
        for name, amount in amounts.items():
            setattr(self.totals, name, getattr(self.totals, name) + amount)
            if self.publish:
                _counters()[name].inc(amount)


@functools.cache
def _counters() -> dict[str, Any]:
    # prometheus_client comes with vllm; with PROMETHEUS_MULTIPROC_DIR set, the server's /metrics
    # adds up the counters of all its processes
    from prometheus_client import Counter

    return {name: Counter(f"minference_{name}", text) for name, text in _HELP.items()}
