"""`minference bench prefill`: time to first token of a whole model, through the public call.

A run is `attach` and one `generate` with 16 tokens decoded after the first. Its first forward is
split by clocks around every linear layer (the whole MLP where it is compiled), around every update
of the cache, and by the handle's records. The parts are index, attention, linear layers, keys and
values (what of their moves is not hidden behind the compute) and the rest: norms, rotary
embeddings, activations. The marks wait for nothing; on the GPU they are events, and the whole is
the host's clock.

Random weights attend to nothing in particular. So a planted run stands beside the sparse one: each
layer's keys and last queries are overwritten with a pattern of columns and clustered slashes before
its index is built. What that takes is a part of its own, `plant_s`.
"""

from __future__ import annotations

import argparse
import gc
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from minference.bench.cases import vs1
from minference.bench.records import Recorder
from minference.bench.shapes import SHAPES, ModelShape, shape_of
from minference.integrations.transformers import attach
from minference.integrations.transformers.records import Mark, mark, seconds
from minference.lengths import length_argument
from minference.methods import Dense, Method, MInference
from minference.ops.checks import check_count
from minference.ops.estimate.reference import ROWS
from minference.testing import default_device, planted_qkv

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DECODED = 16
RUNS = ("dense", "sparse", "planted")
PARTS = ("index", "attention", "linear", "kv", "plant")
Record = dict[str, Any]
Plant = Callable[[Tensor, Tensor], None]


class Clock:
    """Marks of a model's first forward: its end, and both ends of what its parts do."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.first_token: float | None = None
        self.spans: dict[str, list[tuple[Mark, Mark]]] = {"linear": [], "kv": [], "plant": []}
        self._begun: list[Mark] = []
        self._hooks: list[Any] = []

    def watch(self, model: PreTrainedModel, *, fused: bool) -> None:
        """Hooks for the linear layers, the cache and the end; behind those of an attached model,
        which may exchange the cache."""
        self._hooks = [
            model.register_forward_pre_hook(self._forward_begins, with_kwargs=True),
            model.register_forward_hook(self._forward_ends),
        ]
        for module in _linear(model, fused=fused):
            self._hooks.append(module.register_forward_pre_hook(self._begin))
            self._hooks.append(module.register_forward_hook(self._end))

    @contextmanager
    def span(self, part: str) -> Iterator[None]:
        """Counts what happens inside to a part."""
        begin = mark(self.device)
        yield
        if self.first_token is None:
            self.spans[part].append((begin, mark(self.device)))

    def _forward_begins(self, module: nn.Module, args: object, kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        if cache is not None and "update" not in vars(cache):
            cache.update = partial(self._update, cache.update)

    def _update(self, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        with self.span("kv"):
            return plain(*args, **kwargs)

    def _begin(self, module: nn.Module, args: object) -> None:
        if self.first_token is None:
            self._begun.append(mark(self.device))

    def _end(self, module: nn.Module, args: object, output: object) -> None:
        if self.first_token is None:
            self.spans["linear"].append((self._begun.pop(), mark(self.device)))

    def _forward_ends(self, module: nn.Module, args: object, output: object) -> None:
        if self.first_token is None:
            synchronize(self.device)
            self.first_token = time.perf_counter()

    def seconds(self, part: str) -> float:
        return sum(seconds(*pair) for pair in self.spans[part])

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


def planting(shape: ModelShape, length: int, device: torch.device, dtype: torch.dtype) -> Plant:
    """Overwrites keys, and the last queries, which estimates read, with case VS-1."""
    lines = list(vs1(length, shape.heads, 0).lines)
    kinds = {"dim": shape.dim, "device": device, "dtype": dtype}
    last, keys, _ = planted_qkv(lines, length, kv_heads=shape.kv_heads, rows=ROWS, **kinds)

    def plant(q: Tensor, k: Tensor) -> None:
        q[:, :, -ROWS:] = last
        k.copy_(keys)

    return plant


def _linear(model: PreTrainedModel, *, fused: bool) -> list[nn.Module]:
    """The linear layers; of compiled MLPs the whole, as a hook inside would break their graph."""
    whole: list[nn.Module] = []
    if fused:
        whole = [part for name, part in model.named_modules() if name.endswith(".mlp")]
    inside = {part for mlp in whole for part in mlp.modules()}
    return whole + [x for x in model.modules() if isinstance(x, nn.Linear) and x not in inside]


def synchronize(device: torch.device) -> None:
    """Waits for a GPU; nothing on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    model: Any,  # noqa: ANN401
    ids: Tensor,
    method: Method,
    *,
    decoded: int = DECODED,
    plant: Plant | None = None,
    **options: Any,  # noqa: ANN401
) -> Record:
    """One prompt through attach and generate; the times of its first forward by part, in seconds.

    Args:
        model: a model of transformers.
        ids: the prompt, [1, L].
        method: what builds the indices.
        decoded: tokens after the first.
        plant: changes a layer's q and k before its index is built.
        **options: of `attach`.
    """
    device = ids.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    clock = Clock(device)

    def observe(context: object, q: Tensor, k: Tensor, v: Tensor) -> None:
        if plant is not None:
            with clock.span("plant"):
                plant(q, k)

    with attach(model, method, record=True, observe=observe, **options) as handle:
        clock.watch(model, fused=options.get("fuse", False))
        synchronize(device)
        begin = time.perf_counter()
        try:
            tokens = decoded + 1
            model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
            synchronize(device)
        finally:
            clock.remove()
        end, layers = time.perf_counter(), handle.records
        first = end if clock.first_token is None else clock.first_token
    parts = {
        "index_s": sum(layer["index_seconds"] for layer in layers),
        "attention_s": sum(layer["attention_seconds"] for layer in layers),
        **{f"{part}_s": clock.seconds(part) for part in clock.spans},
    }
    record: Record = {"first_token_s": first - begin, "decode_s": end - first, "decoded": decoded}
    record |= {**parts, "rest_s": first - begin - sum(parts.values())}
    record["ms_p50"] = record["first_token_s"] * 1e3
    record["layers_recorded"] = len(layers)
    # a prompt below the method's threshold is dense and leaves no records
    record["density"] = sum(layer["density"] for layer in layers) / len(layers) if layers else 1.0
    gpu = device.type == "cuda"
    record["peak_device_bytes"] = torch.cuda.max_memory_allocated(device) if gpu else None
    record["peak_host_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return record


def extrapolated(measured: Record, length: int) -> Record:
    """A dense record for a longer prompt: attention grows with the square of the length, the rest
    with the length. Marked as not measured."""
    ratio = length / measured["length"]
    attention = measured["attention_s"] * ratio**2
    first = attention + (measured["first_token_s"] - measured["attention_s"]) * ratio
    kept = {
        name: measured[name] for name in ("op", "impl", "model", "layers", "dtype", "kv", "fuse")
    }
    kept |= {"length": length, "first_token_s": first, "attention_s": attention}
    return kept | {"ms_p50": first * 1e3, "extrapolated_from": measured["length"]}


def run(
    name: str, shape: ModelShape, lengths: list[int], *, dense_up_to: int, dtype: torch.dtype,
    device: torch.device, options: dict[str, Any], kinds: tuple[str, ...] = RUNS,
    once_from: int | None = None, decoded: int = DECODED,
) -> Iterator[Record]:  # fmt: skip
    """Records of each length, shortest first; each is its second run, after one with a single
    decoded token whose time, compilation included, is kept as `first_run_s`.

    Args:
        name: the shape's name, for the records.
        shape: the model's.
        lengths: of the prompts, in tokens.
        dense_up_to: longest prompt that is run densely; longer ones are extrapolated.
        dtype: of the weights.
        device: where to build and run.
        options: of `attach`.
        kinds: of RUNS.
        once_from: leave the first runs out from that length on, so that compilation and the first
            pinned memory count; None for nowhere.
        decoded: tokens after the first.
    """
    model = shape.build(max(lengths) + decoded + 1, device, dtype)
    own = {"model": name, "layers": shape.layers, "dtype": str(dtype).removeprefix("torch.")}
    own["budgets"] = shape.budgets()
    own |= {"kv": options.get("kv", "device"), "fuse": options.get("fuse", False)}
    generator = torch.Generator().manual_seed(0)
    longest: Record | None = None
    for length in sorted(lengths):
        ids = torch.randint(shape.vocabulary, (1, length), generator=generator).to(device)
        for kind in kinds:
            head = {"op": f"{kind}_prefill", "impl": "auto", **own, "length": length}
            if kind == "dense" and length > dense_up_to:
                if longest is not None:
                    yield extrapolated(longest, length)
                continue
            plant = planting(shape, length, device, dtype) if kind == "planted" else None
            more = {**options, "plant": plant}

            def method(kind: str = kind) -> Method:
                return Dense() if kind == "dense" else MInference(patterns=shape.patterns())

            once = once_from is not None and length >= once_from
            first = None if once else measure(model, ids, method(), decoded=1, **more)
            gc.collect()
            record = head | measure(model, ids, method(), decoded=decoded, **more)
            record["first_run_s"] = first and first["first_token_s"]
            longest = record if kind == "dense" else longest
            del plant, more
            gc.collect()
            yield record


def summary(record: Record) -> str:
    """One line for people."""
    line = f"{record['length']} {record['op']}: first token {record['first_token_s']:.3f} s"
    if "extrapolated_from" in record:
        return f"{line}, EXTRAPOLATED from {record['extrapolated_from']} tokens, not measured"
    parts = ", ".join(f"{p} {record[f'{p}_s']:.3f}" for p in PARTS if record[f"{p}_s"])
    line += f" ({parts}, rest {record['rest_s']:.3f}), {record['decoded']} tokens after it"
    return f"{line} {record['decode_s']:.3f} s, density {record['density']:.4f}"


def parser() -> argparse.ArgumentParser:
    """Options of the benchmark."""
    made = argparse.ArgumentParser(prog="minference bench prefill", description=__doc__)
    made.add_argument("--model", choices=list(SHAPES), default="llama-3-8b")
    made.add_argument("--lengths", type=length_argument, nargs="+", default=[1 << 15, 1 << 17])
    made.add_argument(
        "--once", type=length_argument, nargs="?", const=0, default=None, metavar="LENGTH",
        help="no first run, from that length on: compilation and pinning count",
    )  # fmt: skip
    made.add_argument("--decoded", type=int, default=DECODED, help="tokens after the first")
    made.add_argument("--runs", choices=RUNS, nargs="+", default=list(RUNS))
    made.add_argument("--layers", type=int, default=None, help="the first layers only")
    made.add_argument("--dense-up-to", type=length_argument, default=1 << 18)
    made.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    made.add_argument("--chunk-tokens", type=int, default=8192, help="0 for whole prompts")
    made.add_argument("--fuse", action="store_true", help="compile the work on whole chunks")
    made.add_argument("--kv", choices=["device", "host", "host_fp8"], default="device")
    made.add_argument("--impl", default="auto")
    made.add_argument("--min-seq-len", type=int, default=None)
    made.add_argument("--out", type=Path, default=None, help="JSONL file to append to")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark."""
    given = parser().parse_args(arguments)
    recorder = Recorder(given.out)
    check_count("decoded", given.decoded)
    options = {"kv": given.kv, "impl": given.impl, "min_seq_len": given.min_seq_len}
    options |= {"chunk_tokens": given.chunk_tokens or None, "fuse": given.fuse}
    shape = shape_of(given.model, given.layers)
    sys.stdout.write(f"heads of {given.model} and their budgets: {shape.budgets()}\n")
    records = run(
        given.model,
        shape,
        given.lengths,
        dense_up_to=given.dense_up_to,
        dtype=getattr(torch, given.dtype),
        device=default_device(),
        options=options,
        kinds=tuple(given.runs),
        once_from=given.once,
        decoded=given.decoded,
    )
    for record in records:
        sys.stdout.write(summary(recorder.write(record)) + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
