"""`minference bench prefill`: time to first token of a whole model, through the public call.

A run is `attach` and one `generate` with 16 tokens decoded after the first. Its first forward is
split by clocks around every linear layer and by the handle's records into index, attention, linear
layers and the rest, which holds norms, rotary embeddings and the moves of keys and values. The
marks wait for nothing; on the GPU they are events, and the whole is the host's clock.
"""

from __future__ import annotations

import argparse
import gc
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from minference.bench.records import Recorder
from minference.bench.shapes import SHAPES, ModelShape, shape_of
from minference.integrations.transformers import attach
from minference.integrations.transformers.records import Mark, mark, seconds
from minference.lengths import parse_length
from minference.methods import Dense, Method, MInference
from minference.testing import default_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DECODED = 16
Record = dict[str, Any]


class Clock:
    """Marks of a model's first forward: its end, and both ends of every linear layer."""

    def __init__(self, model: PreTrainedModel, device: torch.device) -> None:
        self.device = device
        self.first_token: float | None = None
        self.marks: list[tuple[Mark, Mark]] = []
        self._begun: list[Mark] = []
        self._hooks = [model.register_forward_hook(self._forward_ends)]
        for module in model.modules():
            if isinstance(module, nn.Linear):
                self._hooks.append(module.register_forward_pre_hook(self._begin))
                self._hooks.append(module.register_forward_hook(self._end))

    def _begin(self, module: nn.Module, args: object) -> None:
        if self.first_token is None:
            self._begun.append(mark(self.device))

    def _end(self, module: nn.Module, args: object, output: object) -> None:
        if self.first_token is None:
            self.marks.append((self._begun.pop(), mark(self.device)))

    def _forward_ends(self, module: nn.Module, args: object, output: object) -> None:
        if self.first_token is None:
            synchronize(self.device)
            self.first_token = time.perf_counter()

    def linear_seconds(self) -> float:
        return sum(seconds(*pair) for pair in self.marks)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


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
    **options: Any,  # noqa: ANN401
) -> Record:
    """One prompt through attach and generate; the times of its first forward by part, in seconds.

    Args:
        model: a model of transformers.
        ids: the prompt, [1, L].
        method: what builds the indices.
        decoded: tokens after the first.
        **options: of `attach`.
    """
    device = ids.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with attach(model, method, record=True, **options) as handle:
        clock = Clock(model, device)
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
        "linear_s": clock.linear_seconds(),
    }
    record: Record = {"first_token_s": first - begin, "decode_s": end - first, "decoded": decoded}
    record |= {**parts, "rest_s": first - begin - sum(parts.values())}
    record["ms_p50"] = record["first_token_s"] * 1e3
    record["layers_recorded"] = len(layers)
    record["density"] = sum(layer["density"] for layer in layers) / max(1, len(layers))
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
    device: torch.device, options: dict[str, Any],
) -> Iterator[Record]:  # fmt: skip
    """Dense and sparse records of each length, shortest first; each is its second run, after one
    with a single decoded token whose time, compilation included, is kept as `first_run_s`.

    Args:
        name: the shape's name, for the records.
        shape: the model's.
        lengths: of the prompts, in tokens.
        dense_up_to: longest prompt that is run densely; longer ones are extrapolated.
        dtype: of the weights.
        device: where to build and run.
        options: of `attach`.
    """
    model = shape.build(max(lengths) + DECODED + 1, device, dtype)
    methods: dict[str, Callable[[], Method]] = {
        "dense": Dense,
        "sparse": lambda: MInference(patterns=shape.patterns()),
    }
    own = {"model": name, "layers": shape.layers, "dtype": str(dtype).removeprefix("torch.")}
    own |= {"kv": options.get("kv", "device"), "fuse": options.get("fuse", False)}
    generator = torch.Generator().manual_seed(0)
    longest: Record | None = None
    for length in sorted(lengths):
        ids = torch.randint(shape.vocabulary, (1, length), generator=generator).to(device)
        for kind, make in methods.items():
            head = {"op": f"{kind}_prefill", "impl": "auto", **own, "length": length}
            if kind == "dense" and length > dense_up_to:
                if longest is not None:
                    yield extrapolated(longest, length)
                continue
            first = measure(model, ids, make(), decoded=1, **options)["first_token_s"]
            record = head | measure(model, ids, make(), **options) | {"first_run_s": first}
            longest = record if kind == "dense" else longest
            gc.collect()
            yield record


def summary(record: Record) -> str:
    """One line for people."""
    line = f"{record['length']} {record['op']}: first token {record['first_token_s']:.3f} s"
    if "extrapolated_from" in record:
        return f"{line}, EXTRAPOLATED from {record['extrapolated_from']} tokens, not measured"
    parts = ", ".join(f"{p} {record[f'{p}_s']:.3f}" for p in ("index", "attention", "linear"))
    line += f" ({parts}, rest {record['rest_s']:.3f}), {record['decoded']} tokens after it"
    return f"{line} {record['decode_s']:.3f} s, density {record['density']:.4f}"


def parser() -> argparse.ArgumentParser:
    """Options of the benchmark."""
    made = argparse.ArgumentParser(prog="minference bench prefill", description=__doc__)
    made.add_argument("--model", choices=list(SHAPES), default="llama-3-8b")
    made.add_argument("--lengths", type=parse_length, nargs="+", default=[1 << 15, 1 << 17])
    made.add_argument("--layers", type=int, default=None, help="the first layers only")
    made.add_argument("--dense-up-to", type=parse_length, default=1 << 18)
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
    options = {"kv": given.kv, "impl": given.impl, "min_seq_len": given.min_seq_len}
    options |= {"chunk_tokens": given.chunk_tokens or None, "fuse": given.fuse}
    records = run(
        given.model,
        shape_of(given.model, given.layers),
        given.lengths,
        dense_up_to=given.dense_up_to,
        dtype=getattr(torch, given.dtype),
        device=default_device(),
        options=options,
    )
    for record in records:
        sys.stdout.write(summary(recorder.write(record)) + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
