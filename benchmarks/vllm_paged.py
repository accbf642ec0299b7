"""Attention of one layer over vLLM's pages, beside dense kernels in the same run.

Three questions: what the Triton kernel pays for reading pages in place, by layout and page size;
what the copy of a bounded part costs that the Hopper kernel needs; and how long the vLLM backend's
own path takes for a batch of one long prompt and one decoding request: rows from the metadata's
plain lists, index, attention, output. No vLLM is needed: its backend calls what is timed here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from minference.bench.attention import GATE, Shape, dense_records, gate_error
from minference.bench.cases import planted_index, vs1
from minference.bench.records import Recorder
from minference.bench.timing import measure, peak_extra_bytes
from minference.head_patterns import default_patterns
from minference.index import SparseIndex
from minference.integrations.vllm.density import sampled_density
from minference.integrations.vllm.metrics import Recorder as Counters
from minference.integrations.vllm.options import Options
from minference.integrations.vllm.pages import PagedRequest, split_kv
from minference.integrations.vllm.prefill import LayerPrefill, Runtime, serve_rows
from minference.integrations.vllm.rows import Row, batch_rows
from minference.methods import MInference
from minference.ops.attention.api import sparse_attention
from minference.patterns import VerticalSlash
from minference.testing import default_device, layout_of

Record = dict[str, object]
LAYOUTS = ("0.26-hnd", "0.26-nhd", "0.24")
DECODES_AT = 500
"""Context of the decoding request beside the long prompt."""


def cache_of(layout: str, k: Tensor, v: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """A cache as that vLLM lays it out, K and V in pages of random order, and the block table."""
    heads, length, dim = k.shape[1:]
    count = -(-length // size)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).to(k.device)
    both = k.new_zeros((count, size, heads, 2 * dim))
    for part, x in zip(both.split(dim, dim=-1), (k, v), strict=True):
        padded = torch.nn.functional.pad(x[0].transpose(0, 1), (0, 0, 0, 0, 0, -length % size))
        part[order] = padded.view(count, size, heads, dim)
    table = order[None].int()
    if layout == "0.24":
        return torch.stack(both.split(dim, dim=-1), dim=1), table
    nhd = both.transpose(1, 2)
    return (nhd if layout == "0.26-nhd" else nhd.contiguous()), table


def request_of(cache: Tensor, table: Tensor, shape: Shape, length: int) -> PagedRequest:
    return PagedRequest(*split_kv(cache, shape.dim, shape.kv_heads), table[0], length)


def paged(
    request: PagedRequest, q: Tensor, index: SparseIndex, impl: str, workspace: int
) -> Tensor:
    """What a layer does once it has its index: a part of the heads at a time."""
    out, share = torch.empty_like(q), q.shape[1] // request.kv_heads
    parts = request.parts(workspace)
    assert len(parts) == 1, "the planted index is that of all heads; give more workspace"
    for part in parts:
        own = slice(part.start * share, part.stop * share)
        key = request.keys(part)
        out[:, own] = request.attend(
            q[:, own], key, part, index, scale=q.shape[-1] ** -0.5, impl=impl
        )
    return out


def kernel_records(
    shape: Shape, impls: list[str], sizes: list[int], workspace: int
) -> Iterator[Record]:
    """The planted case from contiguous keys, then from pages, each behind the gate."""
    device = default_device()
    q, k, v = shape.tensors(device)
    case = vs1(shape.length, shape.heads, 0)
    index = planted_index(case, layout_of(q, k))
    # what measuring the density adds to a layer of a step that is measured
    sampled = measure(lambda: torch.tensor(sampled_density(index)), device)
    base: Record = {"op": "sampled_density", **shape.to_dict(), "impl": "torch"}
    yield base | sampled.to_dict()
    for impl in impls:
        common = {**shape.to_dict(), "case": case.name, "impl": impl}
        error = gate_error(q, k, v, sparse_attention(q, k, v, index, impl=impl), index)
        record: Record = {"op": "sparse_attention", **common, "gate_error": error}
        times = measure(lambda impl=impl: sparse_attention(q, k, v, index, impl=impl), device)
        yield record | {"gate": error <= GATE[shape.dtype]} | times.to_dict()
        for layout in LAYOUTS:
            for size in sizes:
                cache, table = cache_of(layout, k, v, size)
                request = request_of(cache, table, shape, shape.length)

                def call(request: PagedRequest = request, impl: str = impl) -> Tensor:
                    return paged(request, q, index, impl, workspace)

                error = gate_error(q, k, v, call(), index)
                record = {"op": "paged_sparse_attention", **common, "layout": layout}
                record |= {"page_size": size, "gate_error": error}
                record["gate"] = error <= GATE[shape.dtype]
                record["peak_extra_bytes"] = peak_extra_bytes(call, device)
                yield record | measure(call, device).to_dict()
                copy = slice(0, shape.kv_heads)
                if impl == impls[0]:
                    copied = measure(lambda r=request, c=copy: r.keys(c), device)
                    head: Record = {"op": "copy_keys", **shape.to_dict(), "layout": layout}
                    yield head | {"impl": "torch", "page_size": size} | copied.to_dict()
                del cache, request


def backend_records(shape: Shape, impls: list[str], workspace: int) -> Iterator[Record]:
    """A long prompt and a decode in one batch, through the backend's own rows."""
    device = default_device()
    q, k, v = shape.tensors(device)
    cache, table = cache_of("0.26-hnd", k, v, 16)
    table = table.expand(2, -1)
    starts, lengths = [0, shape.length, shape.length + 1], [shape.length, DECODES_AT]
    query = torch.cat([q[0].transpose(0, 1), q[0, :, :1].transpose(0, 1)])
    output = torch.empty_like(query)
    method = MInference(patterns=default_patterns(1, shape.heads, VerticalSlash(1000, 6096)))

    def read(row: Row) -> PagedRequest:
        pages = split_kv(cache, shape.dim, shape.kv_heads)
        return PagedRequest(*pages, table[row.number], row.context)

    def dense(rest: tuple[Row, ...], query: Tensor, part: Tensor) -> None:
        for row in rest:
            request, heads = read(row), slice(0, shape.kv_heads)
            part[:] = torch.nn.functional.scaled_dot_product_attention(
                query.transpose(0, 1)[None], request.keys(heads), request.values(heads),
                enable_gqa=True,
            )[0].transpose(0, 1)  # fmt: skip

    for impl in impls:
        counters = Counters(lambda line: None, publish=False)
        options = Options(impl=impl, workspace_mib=workspace >> 20)
        runtime = Runtime(options, method, 0, 0, False, counters)
        layer = LayerPrefill(runtime, 0, tuple(range(shape.heads)), shape.dim, shape.dim**-0.5)

        def step(layer: LayerPrefill = layer) -> Tensor:
            rows = batch_rows(starts, lengths)
            assert serve_rows(layer, rows, query, output, read=read, dense=dense)
            return output

        runtime.start_step()
        step()
        density = counters.summary()["density"]
        # densities are read from the device in the step above only
        runtime.start_step()
        record: Record = {"op": "vllm_layer", **shape.to_dict(), "impl": impl, "layout": "0.26-hnd"}
        record |= {"page_size": 16, "density": density, "workspace_bytes": workspace}
        record["peak_extra_bytes"] = peak_extra_bytes(lambda: step().new_empty(0), device)
        yield record | measure(step, device).to_dict()


def summary(record: Record) -> str:
    parts = [str(record[x]) for x in ("op", "impl", "layout", "page_size") if x in record]
    if "refused" in record:
        return " ".join(parts) + f": refused, {record['refused']}"
    line = " ".join(parts) + f": {record['ms_p50']} ms"
    if "gate_error" in record:
        line += f", gate {'green' if record['gate'] else 'RED'} ({record['gate_error']:.2e})"
    return line + (f", density {record['density']:.4f}" if "density" in record else "")


def main(arguments: list[str] | None = None) -> int:
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--length", type=int, default=131_072)
    made.add_argument("--heads", type=int, default=32)
    made.add_argument("--kv-heads", type=int, default=8)
    made.add_argument("--dim", type=int, default=128)
    made.add_argument("--dtype", default="bfloat16")
    made.add_argument("--impls", nargs="+", default=["triton", "hopper"])
    made.add_argument("--page-sizes", type=int, nargs="+", default=[16, 64])
    made.add_argument("--workspace-mib", type=int, default=512)
    made.add_argument("--dense", nargs="*", default=None, help="dense kernels; all unless given")
    made.add_argument("--out", type=Path, default=None)
    given = made.parse_args(arguments)
    shape = Shape(
        length=given.length, heads=given.heads, kv_heads=given.kv_heads, dim=given.dim,
        dtype=getattr(torch, given.dtype),
    )  # fmt: skip
    recorder, workspace = Recorder(given.out), given.workspace_mib << 20
    dense = None if given.dense is None else tuple(given.dense)
    red = False

    def store(records: Iterator[Record]) -> None:
        nonlocal red
        for record in records:
            red |= recorder.write(record).get("gate") is False
            sys.stdout.write(summary(record) + "\n")
            sys.stdout.flush()

    store(kernel_records(shape, given.impls, given.page_sizes, workspace))
    store(dense_records(shape, shape.tensors(default_device()), dense))
    store(backend_records(shape, given.impls, workspace))
    return int(red)


if __name__ == "__main__":
    sys.exit(main())
