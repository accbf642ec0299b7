"""`minference bench attention`: index and kernel, apart and together, beside dense kernels.

Each case passes a correctness gate first: rows of three tiles of every head against a softmax in
float32 under the index's mask. A case that fails it is reported without a speed. fp8 has a
tolerance of its own, its time holds the quantisation of q, k and v, and its records also say how
far it is from the same case in the inputs' dtype.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minference.bench.baselines import dense_kernels
from minference.bench.cases import SEEDS, Case, heads_to_plant, planted_index, scattered, table, vs1
from minference.bench.records import Recorder
from minference.bench.timing import measure, peak_extra_bytes
from minference.errors import UnsupportedError, unknown_name
from minference.index import TILE, SparseIndex
from minference.index_samples import sample_keys, sample_stride
from minference.index_tiles import computed_pairs
from minference.lengths import causal_pairs, length_argument
from minference.ops._dispatch import check_impl, resolve_impl
from minference.ops._e4m3 import E4M3
from minference.ops.attention.api import sparse_attention
from minference.ops.attention.fp8 import PRECISIONS, product_dtype
from minference.ops.attention.samples import sample_weights
from minference.ops.lines.api import best_lines
from minference.ops.select.lists import offset_budget
from minference.testing import default_device, layout_of

GATE = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2, E4M3: 6e-2}
"""Largest relative error (2-norm) that passes."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of one attention layer."""

    length: int
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        sizes = (self.length, self.heads, self.kv_heads, self.dim)
        if min(sizes) < 1 or self.heads % self.kv_heads:
            raise ValueError(
                "length, heads, kv_heads and dim must be at least 1, and heads a multiple of "
                f"kv_heads, got {', '.join(map(str, sizes))}"
            )

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Standard-normal q, k, v made on the device."""
        generator = torch.Generator(device).manual_seed(0)
        sizes = [(1, heads, self.length, self.dim) for heads in (self.heads, *[self.kv_heads] * 2)]
        q, k, v = (
            torch.randn(size, generator=generator, device=device, dtype=self.dtype)
            for size in sizes
        )
        return q, k, v

    @property
    def causal_pairs(self) -> float:
        """Pairs of a query and a key that it sees, in all heads."""
        return self.heads * causal_pairs(self.length, self.length)

    def to_dict(self) -> dict[str, object]:
        named = {"length": self.length, "heads": self.heads, "kv_heads": self.kv_heads}
        return {**named, "dim": self.dim, "dtype": str(self.dtype).removeprefix("torch.")}


def index_call(q: Tensor, k: Tensor, case: Case, impl: str) -> Callable[[], object]:
    """The work that makes an index with the case's budgets: estimate and selection, all heads."""
    layout = layout_of(q[:1, :1], k[:1, :1])
    offsets = tuple(offset_budget(s) for s in case.slashes)
    call = (q, k, layout.first, layout.stop, case.verticals, offsets)
    return lambda: best_lines(*call, impl=impl)


def gate_error(q: Tensor, k: Tensor, v: Tensor, out: Tensor, index: SparseIndex) -> float:
    """Largest relative error over the rows of three tiles, a head at a time, in float32."""
    tiles = index.tiles(0)
    worst = 0.0
    for tile in {tiles[0], tiles[len(tiles) // 2], tiles[-1]}:
        a, z = tile * TILE, min((tile + 1) * TILE, index.kv_len)
        for h in range(q.shape[1]):
            kv_head = h * k.shape[1] // q.shape[1]
            mask = index.tile_mask(0, h * index.heads // q.shape[1], tile)[: z - a, :z]
            scores = q[0, h, a:z].float() @ k[0, kv_head, :z].float().T * q.shape[-1] ** -0.5
            own = scores.masked_fill(~mask, -torch.inf)
            weights = own.softmax(dim=-1)
            if index.samples:
                keys = sample_keys(tile, index.samples, q.device)
                stride = sample_stride(tile, index.samples)
                lse = own.logsumexp(dim=-1)
                weights[:, keys] += sample_weights(
                    scores[:, keys], lse, ~mask[:, keys], stride, index.sample_share
                )
                weights /= weights.sum(dim=-1, keepdim=True)
            expected = weights @ v[0, kv_head, :z].float()
            error = (out[0, h, a:z].float() - expected).norm() / expected.norm()
            worst = max(worst, float(error.nan_to_num(torch.inf)))
    return worst


def distance(out: Tensor, native: Tensor) -> dict[str, object]:
    """How far an output is from that in the inputs' dtype, a head at a time."""
    most, square, size = 0.0, 0.0, 0.0
    for own, other in zip(out.flatten(0, 1), native.flatten(0, 1), strict=True):
        gap = own.float() - other.float()
        most = max(most, float(gap.abs().max()))
        square += float(gap.square().sum())
        size += float(other.float().square().sum())
    return {"native_max_abs": most, "native_relative": (square / size) ** 0.5}


def sparse_record(
    case: Case,
    shape: Shape,
    qkv: tuple[Tensor, Tensor, Tensor],
    impl: str,
    precision: str = "native",
) -> dict[str, object]:
    """One case by one implementation: the gate, then index, kernel and both."""
    q, k, v = qkv
    index = planted_index(case, layout_of(q[:1, :1], k[:1, :1]))

    def kernel(precision: str = precision) -> Tensor:
        out = sparse_attention(q, k, v, index, impl=impl, precision=precision)
        assert isinstance(out, Tensor)
        return out

    error = gate_error(q, k, v, kernel(), index)
    most = GATE[product_dtype(precision, shape.dtype)]
    record: dict[str, object] = {"op": "sparse_attention", "case": case.name, "impl": impl}
    record |= {"precision": precision, **shape.to_dict()}
    record |= {"gate_error": error, "gate": error <= most}
    if not record["gate"]:
        return record
    if precision != "native":
        record |= distance(kernel(), kernel("native"))
    build = index_call(q, k, case, impl)
    times = measure(kernel, q.device)
    pairs = int(computed_pairs(index, 0).sum())
    record |= times.to_dict()
    record["keys_per_row"] = round(pairs / (shape.heads * shape.length), 1)
    record["density"] = pairs / shape.causal_pairs
    record["tflops"] = round(4 * shape.dim * pairs / times.ms_p50 / 1e9, 1)
    record["index_ms"] = measure(build, q.device).ms_p50
    record["together_ms"] = measure(lambda: (build(), kernel()), q.device).ms_p50
    record["peak_extra_bytes"] = peak_extra_bytes(kernel, q.device)
    record["index_peak_extra_bytes"] = peak_extra_bytes(
        lambda: (build(), q.new_empty(0))[1], q.device
    )
    return record


def dense_records(
    shape: Shape, qkv: tuple[Tensor, Tensor, Tensor], names: tuple[str, ...] | None = None
) -> Iterator[dict[str, object]]:
    """Every dense kernel here on the same tensors; one that refuses says why."""
    for name, attend in dense_kernels(qkv[0].device).items():
        if names is not None and name not in names:
            continue
        record: dict[str, object] = {"op": "dense_attention", "impl": name, **shape.to_dict()}
        try:
            times = measure(lambda attend=attend: attend(*qkv), qkv[0].device)
        except (RuntimeError, ImportError, TypeError) as error:
            yield record | {"refused": str(error).splitlines()[0][:200]}
            continue
        yield (
            record
            | times.to_dict()
            | {"tflops": round(4 * shape.dim * shape.causal_pairs / times.ms_p50 / 1e9, 1)}
        )


def with_speedup(record: dict[str, object], dense_ms: dict[str, float]) -> dict[str, object]:
    """The record, with its speed-up over the fastest dense kernel of this run, index included;
    unchanged where its gate is red or no dense kernel was timed."""
    together = record.get("together_ms")
    if not record.get("gate") or not isinstance(together, float) or not dense_ms:
        return record
    best = min(dense_ms, key=lambda name: dense_ms[name])
    return record | {"speedup": round(dense_ms[best] / together, 3), "speedup_over": best}


PLANTED = {"vs1": vs1, "scattered": scattered}


def layer_named(case: str) -> tuple[str, int] | None:
    """Table and layer of a case TABLE@LAYER; None of another."""
    source, _, layer = case.rpartition("@")
    return (source, int(layer)) if source and layer.isdigit() else None


def cases_of(name: str, shape: Shape, seeds: tuple[int, ...]) -> Iterator[Case]:
    """Cases by name: vs1, scattered, or TABLE@LAYER of a published table."""
    if layer := layer_named(name):
        yield table(*layer, shape.length, seeds[0])
        return
    for seed in seeds:
        yield PLANTED[name](shape.length, shape.heads, seed)


def check_names(
    cases: list[str], impls: list[str], dense: tuple[str, ...] | None, device: torch.device
) -> None:
    """Raises ValueError for a case, an implementation or a dense kernel that is not there."""
    for name in cases:
        if layer := layer_named(name):
            heads_to_plant(*layer)
        elif name not in PLANTED:
            raise ValueError(f"case must be vs1, scattered or TABLE@LAYER, got {name!r}")
    for impl in impls:
        check_impl(impl)
    kernels = dense_kernels(device)
    for name in dense or ():
        if name not in kernels:
            raise unknown_name("dense kernel", name, kernels)


def run(
    shapes: list[Shape],
    cases: list[str],
    impls: list[str],
    *,
    precisions: tuple[str, ...] = ("native",),
    seeds: tuple[int, ...] = SEEDS,
    dense: tuple[str, ...] | None = None,
    device: torch.device | None = None,
) -> Iterator[dict[str, object]]:
    """Records of every shape: the dense kernels first, then each case by each implementation in
    each precision.

    Args:
        dense: names of the dense kernels to run; all that are here unless given.
    """
    device = device or default_device()
    check_names(cases, impls, dense, device)
    for shape in shapes:
        qkv = shape.tensors(device)
        timed: dict[str, float] = {}
        for record in dense_records(shape, qkv, dense):
            if isinstance(ms := record.get("ms_p50"), float):
                timed[str(record["impl"])] = ms
            yield record
        for name in cases:
            for case in cases_of(name, shape, seeds):
                for impl, precision in itertools.product(impls, precisions):
                    dtype = product_dtype(precision, shape.dtype)
                    try:
                        # "auto" is told by the name of what serves
                        served = resolve_impl(impl, device, dtype, shape.dim)
                        record = sparse_record(case, shape, qkv, served, precision)
                        yield with_speedup(record, timed)
                    except UnsupportedError as error:
                        asked = {"impl": impl, "precision": precision}
                        yield {"op": "sparse_attention", **asked, "refused": str(error)}
        del qkv
        gc.collect()


def summary(record: dict[str, object]) -> str:
    """One line for people; without a speed where the gate is red."""
    name = f"{record.get('length')} {record.get('case', 'dense')} {record['impl']}"
    name += " fp8" if record.get("precision") == "fp8" else ""
    if "refused" in record:
        return f"{name}: refused, {record['refused']}"
    if record.get("gate") is False:
        return f"{name}: WRONG, relative error {record['gate_error']:.2e}, not timed"
    line = f"{name}: {record['ms_p50']} ms, {record['tflops']} TFLOP/s"
    if "index_ms" in record:
        line += f", index {record['index_ms']} ms, together {record['together_ms']} ms"
        line += f", {record['keys_per_row']} keys a row, density {record['density']:.4f}"
    if "native_relative" in record:
        line += f", {record['native_relative']:.4f} from native (at most "
        line += f"{record['native_max_abs']:.2e})"
    if "speedup" in record:
        line += f", {record['speedup']} times as fast as {record['speedup_over']}"
    return line


def parser() -> argparse.ArgumentParser:
    """Options of the benchmark."""
    made = argparse.ArgumentParser(prog="minference bench attention", description=__doc__)
    made.add_argument("--lengths", type=length_argument, nargs="+", default=[1 << 17])
    made.add_argument("--cases", nargs="+", default=["vs1"])
    made.add_argument("--impls", nargs="+", default=["auto"])
    made.add_argument("--precision", choices=PRECISIONS, nargs="+", default=["native"])
    made.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    made.add_argument("--dense", nargs="*", default=None, help="dense kernels; all unless given")
    made.add_argument("--heads", type=int, default=32)
    made.add_argument("--kv-heads", type=int, default=8)
    made.add_argument("--dim", type=int, default=128)
    made.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    made.add_argument("--out", type=Path, default=None, help="JSONL file to append to")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; 1 if any gate was red."""
    given = parser().parse_args(arguments)
    sizes = {"heads": given.heads, "kv_heads": given.kv_heads, "dim": given.dim}
    dtype = getattr(torch, given.dtype)
    shapes = [Shape(length=length, dtype=dtype, **sizes) for length in given.lengths]
    recorder = Recorder(given.out)
    dense = None if given.dense is None else tuple(given.dense)
    red = False
    options = {"precisions": tuple(given.precision), "seeds": tuple(given.seeds), "dense": dense}
    for record in run(shapes, given.cases, given.impls, **options):
        full = recorder.write(record)
        red |= full.get("gate") is False
        sys.stdout.write(summary(full) + "\n")
        sys.stdout.flush()
    return int(red)


if __name__ == "__main__":
    sys.exit(main())
