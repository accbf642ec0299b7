"""Sparse attention of one layer's long rows: what the CPU and the CUDA backend share.

Needs no vLLM: a backend hands in queries, a way to read a request's context, and the output.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from minference import env
from minference.index import SparseIndex, real_bounds
from minference.integrations.vllm.density import sampled_density
from minference.integrations.vllm.metrics import Recorder
from minference.integrations.vllm.options import Options
from minference.integrations.vllm.pages import Request
from minference.integrations.vllm.rows import Row, long_rows, other_rows
from minference.log import get_logger
from minference.methods import Context, Method
from minference.methods.thresholds import work
from minference.ops.build import Layout, dense_index

# on a GPU, counting an index's pairs stops the stream: one step in so many is measured
_GPU_DENSITY_EVERY = 16


@dataclass
class Runtime:
    """What all layers of a worker share.

    Attributes:
        options: what was asked.
        method: built for the served model.
        min_context: contexts of fewer tokens stay dense.
        min_work: so do chunks of less work, as `methods.thresholds.work` counts it.
        isolate: whether an error may be turned into NaN rows, because a scheduler is there that
            fails the requests whose logits are NaN; without it the error goes up.
        recorder: counts and logs.
        layers: attention layers of the model; those behind them draft tokens.
        alone: whether this worker computes the whole model. Beside others (tensor or pipeline
            parallelism) a row may have failed where it cannot see it.
    """

    options: Options
    method: Method
    min_context: int
    min_work: int
    isolate: bool
    recorder: Recorder
    layers: int = sys.maxsize
    alone: bool = True
    step: object = None
    poisoned: bool = False
    _serving: bool = False
    _steps: int = 0

    def start_step(self) -> None:
        """Forgets the last step; called where a step's rows are first seen."""
        self.poisoned = self._serving = False
        self.recorder.start_step()

    def serve(self) -> None:
        """Counts the step as one with a long row."""
        self._steps += not self._serving
        self._serving = True

    def measures(self, device: torch.device) -> bool:
        """Whether this step's densities are measured: always on a CPU, else the first of some."""
        return device.type == "cpu" or self._steps % _GPU_DENSITY_EVERY == 1

    def clean(self, part: Tensor) -> Tensor:
        """Keys or values as they may enter the pages.

        A failed row is NaN from the failing layer on, and some kernels multiply what a page
        holds past the end of a context by zero: a NaN there would reach the next owner.
        """
        elsewhere = self.isolate and not self.alone
        return torch.nan_to_num(part, nan=0.0) if self.poisoned or elsewhere else part


@dataclass(frozen=True)
class LayerPrefill:
    """One attention layer of this worker.

    Attributes:
        runtime: shared state.
        layer: number of the layer in the whole model.
        heads: global numbers of this worker's query heads.
        head_dim: elements of a head.
        scale: factor of the scores.
        softcap: bound of the scores; 0 for none.
        sinks: a logit a head without a value (gpt-oss).
    """

    runtime: Runtime
    layer: int
    heads: tuple[int, ...]
    head_dim: int
    scale: float
    softcap: float = 0.0
    sinks: Tensor | None = field(default=None, repr=False)

    def candidates(self, rows: Sequence[Row]) -> tuple[Row, ...]:
        """The rows that this layer may serve."""
        runtime, options = self.runtime, self.runtime.options
        if env.disabled() or self.layer < options.starting_layer:
            return ()
        found = long_rows(rows, min_chunk=options.min_chunk, min_context=runtime.min_context)
        shape = len(self.heads), self.head_dim
        return tuple(r for r in found if work(r.queries, r.context, *shape) >= runtime.min_work)

    def attend(self, row: Row, query: Tensor, read: Callable[[], Request], output: Tensor) -> bool:
        """Computes one row; False where the method asks for dense attention.

        Args:
            row: the request's place.
            query: its queries, [queries, H, D].
            read: gives its context.
            output: receives the result, [queries, H, D]; NaN where an error was isolated.
        """
        self.runtime.serve()
        try:
            return self._attend(row, query, read(), output)
        except Exception:
            if not self.runtime.isolate:
                raise
            get_logger(__name__).exception(
                "sparse attention failed in layer %d for a chunk of %d queries on %d keys; its "
                "request is failed",
                self.layer,
                row.queries,
                row.context,
            )
            output.fill_(float("nan"))
            self.runtime.poisoned = True
            self.runtime.recorder.fail()
            return True

    def _attend(self, row: Row, query: Tensor, request: Request, output: Tensor) -> bool:
        q = query.transpose(0, 1)[None]
        first, stop = real_bounds(1, row.context, q.device)
        layout = Layout(first, stop, row.queries, row.context)
        share = q.shape[1] // request.kv_heads
        parts = request.parts(self.runtime.options.workspace_mib << 20)
        dense, densities = [], []
        for part in parts:
            key, own = request.keys(part), _queries_of(part, share)
            index = self.runtime.method.build_index(q[:, own], key, self._context(layout, own))
            if index is None:
                dense.append(part)
            else:
                densities.append(self._write(q[:, own], key, part, index, request, output[:, own]))
            del key
        if len(dense) == len(parts):
            return False
        # heads that ask for dense attention beside others that do not
        for part in dense:
            key, own = request.keys(part), _queries_of(part, share)
            index = dense_index(layout, own.stop - own.start)
            densities.append(self._write(q[:, own], key, part, index, request, output[:, own]))
            del key
        measured = self.runtime.measures(q.device)
        mean = sum(densities) / len(densities) if measured else None
        self.runtime.recorder.note(self.layer, row.number, row.queries, row.context, mean)
        return True

    def _context(self, layout: Layout, own: slice) -> Context:
        return Context(
            layout=layout,
            layer=self.layer,
            heads=self.heads[own],
            scale=self.scale,
            softcap=self.softcap,
            impl=self.runtime.options.impl,
            sinks=self._sinks(own),
        )

    def _sinks(self, own: slice) -> Tensor | None:
        return None if self.sinks is None else self.sinks[own]

    def _write(
        self,
        q: Tensor,
        key: Tensor,
        part: slice,
        index: SparseIndex,
        request: Request,
        output: Tensor,
    ) -> float:
        """Attention of some KV heads into `output`; its density where that is measured."""
        share = q.shape[1] // (part.stop - part.start)
        out = request.attend(
            q,
            key,
            part,
            index,
            scale=self.scale,
            softcap=self.softcap,
            sinks=self._sinks(_queries_of(part, share)),
            impl=self.runtime.options.impl,
        )
        output.copy_(out[0].transpose(0, 1))
        return sampled_density(index) if self.runtime.measures(q.device) else 0.0


def _queries_of(part: slice, share: int) -> slice:
    """The query heads of a part of the KV heads."""
    return slice(part.start * share, part.stop * share)


def serve_rows(
    own: LayerPrefill,
    rows: Sequence[Row],
    query: Tensor,
    output: Tensor,
    *,
    read: Callable[[Row], Request],
    dense: Callable[[tuple[Row, ...], Tensor, Tensor], None],
) -> bool:
    """Long rows by the method, all others by the host's kernel as one batch of their own.

    Args:
        own: the layer.
        rows: the batch.
        query: its queries, [T, H, D].
        output: receives the result, [T, H, D].
        read: a row's context.
        dense: computes rows from their queries into the last argument, both without the others.

    Returns:
        False where no row is the method's: nothing was computed.
    """
    served = []
    for row in own.candidates(rows):
        part = slice(row.begin, row.stop)
        if own.attend(row, query[part], partial(read, row), output[part]):
            served.append(row)
    rest = other_rows(rows, served)
    if served and rest:
        places = torch.cat([torch.arange(r.begin, r.stop) for r in rest]).to(query.device)
        part = torch.empty_like(output[places])
        dense(rest, query[places], part)
        output[places] = part
    return bool(served)
