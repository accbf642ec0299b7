"""Variants of the portable Triton attention, timed beside it in turns.

    python benchmarks/triton_variants.py --out results.jsonl
    python benchmarks/triton_variants.py --precision fp8 --out results.jsonl

Each variant is the module `ops/attention/triton.py` with some lines replaced, written to a folder
of its own and imported from there: nothing of the library changes. A variant whose output is not
that of the library's kernel is reported and not timed.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from minference.bench.attention import GATE, Shape
from minference.bench.cases import planted_index, vs1
from minference.bench.records import Recorder
from minference.bench.timing import measure
from minference.index import SparseIndex
from minference.index_tiles import computed_pairs
from minference.lengths import length_argument
from minference.ops._triton import AttentionLaunch
from minference.ops.attention import triton as library
from minference.ops.attention import triton_parts
from minference.ops.attention.fp8 import E4M3, PRECISIONS
from minference.testing import default_device, layout_of

AHEAD = """        ahead = tl.load(steps + tl.minimum((i + 1) // SPLIT, n_pairs - 1))
"""
INSIDE = (
    ("(ahead + 1) * _BLOCK", "(tl.load(steps + pair) + 1) * _BLOCK"),
    (AHEAD, ""),
    ("base - ahead * _BLOCK", "base - tl.load(last - i) * _BLOCK"),
    ("        ahead = tl.load(last - tl.minimum(i + 1, n_singles - 1))\n", ""),
)
"""Offsets read within their step, as before."""


@dataclass(frozen=True)
class Variant:
    """Lines to replace, and how to launch what comes of it."""

    name: str
    launch: AttentionLaunch
    edits: tuple[tuple[str, str], ...] = ()


DIAGONAL = """    if (low | high) != 0:
        acc, peak, total = _diagonal(
            q, wide, acc, peak, total, scaling, pos, tile, origin, real, low, high, window, sink,
            D, WIDE, TMA, SOFTCAP, PRECISION, PAGE,
        )  # fmt: skip
"""
BASE = "    base = origin + tile * _TILE\n"
DIAGONAL_FIRST = ((DIAGONAL, ""), (BASE, DIAGONAL + BASE))
COMPARED = (("    plain = count_below(columns, n, plain)\n", "    plain = n * 0 - 1\n"),)
"""Columns by the positions of rows, as those that not all rows see."""


def _own_step(old: str, new: str, before: str = "") -> tuple[tuple[str, str], ...]:
    """The softmax step with another line, in the variant's own module."""
    own = inspect.getsource(triton_parts.attend.fn)
    assert own.count(old) == 1
    line = "MIN_FP8_DIM = 32\n"
    return ((line, f"{before}\n\n{own.replace(old, new)}\n\n{line}"),)


def _fast_sums() -> tuple[tuple[str, str], ...]:
    """fp8 weights times values summed over all steps by the tensor cores, some 14 bits wide."""
    order = "from minference.ops.attention.triton_fp8 import in_value_order\n"
    return _own_step(", max_num_imprecise_acc=KEYS", "", order)


EXP2 = '''EXP2_4 = tl.constexpr("""{
.reg .f32 x, whole, part, y;
.reg .b32 up;
ex2.approx.ftz.f32 $0, $4;
ex2.approx.ftz.f32 $1, $5;
ex2.approx.ftz.f32 $2, $6;
max.ftz.f32 x, $7, 0fC2FC0000;
add.rn.ftz.f32 whole, x, 0f4B400000;
sub.rn.ftz.f32 part, whole, 0f4B400000;
sub.rn.ftz.f32 part, x, part;
fma.rn.ftz.f32 y, part, 0f3D61FBB0, 0f3E786F0F;
fma.rn.ftz.f32 y, y, part, 0f3F31798D;
fma.rn.ftz.f32 y, y, part, 0f3F7FFB49;
mov.b32 up, whole;
shl.b32 up, up, 23;
mov.b32 $3, y;
add.s32 $3, $3, up;
}""")


@triton.jit
def _exp2(x):
    return tl.inline_asm_elementwise(
        EXP2_4, "=r,=r,=r,=r,r,r,r,r", [x], dtype=tl.float32, is_pure=True, pack=4
    )
'''
"""Every fourth exponential by a polynomial of degree 3, 7e-5 off, on the ordinary cores."""
POLYNOMIAL = _own_step(
    "weights = tl.exp2(scores * factor - safe[:, None])",
    "weights = _exp2(scores * factor - safe[:, None])",
    EXP2 + "\nfrom minference.ops.attention.triton_fp8 import in_value_order\n",
)


VARIANTS = (
    Variant("library", AttentionLaunch(128, 128, 3, 8)),
    Variant("diagonal first", AttentionLaunch(128, 128, 3, 8), DIAGONAL_FIRST),
    Variant("columns by position", AttentionLaunch(128, 128, 3, 8), COMPARED),
    Variant("polynomial", AttentionLaunch(128, 128, 3, 8), POLYNOMIAL),
    Variant("2 stages", AttentionLaunch(128, 128, 2, 8)),
    Variant("offsets inside, 2 stages", AttentionLaunch(128, 128, 2, 8), INSIDE),
    Variant("64 keys, 4 stages", AttentionLaunch(128, 64, 4, 8)),
    Variant("64 rows, 4 warps", AttentionLaunch(64, 64, 3, 4)),
    Variant("64 keys, 2 stages, 4 warps", AttentionLaunch(128, 64, 2, 4)),
)
FP8_VARIANTS = (
    Variant("library", AttentionLaunch(64, 128, 3, 4)),
    Variant("2 stages", AttentionLaunch(64, 128, 2, 4)),
    Variant("128 rows, 8 warps, offsets inside", AttentionLaunch(128, 128, 3, 8), INSIDE),
    Variant("128 rows, 8 warps", AttentionLaunch(128, 128, 3, 8)),
    Variant("128 rows, 8 warps, 4 stages", AttentionLaunch(128, 128, 4, 8)),
    Variant("64 keys", AttentionLaunch(64, 64, 3, 4)),
    Variant("sums in the tensor cores", AttentionLaunch(64, 128, 3, 4), _fast_sums()),
    Variant("the same, 128 rows, 64 keys", AttentionLaunch(128, 64, 3, 4), _fast_sums()),
)
"""Not here, because the compiler (Triton 3.6, sm_90) makes nothing of them: reading the columns a
step ahead spills 900 bytes at 3 stages; asking for the next step's scores before this step's
exponentials gets a wait right behind the product; warp_specialize=True gives the same code."""


def module_of(variant: Variant, folder: Path) -> ModuleType:
    """The library's module with the variant's lines in place.

    Raises:
        ValueError: lines that the library no longer has.
    """
    text = Path(library.__file__).read_text()
    for old, new in variant.edits:
        if text.count(old) != 1:
            raise ValueError(f"variant {variant.name!r} replaces lines that are gone: {old!r}")
        text = text.replace(old, new)
    name = "variant_" + "".join(c if c.isalnum() else "_" for c in variant.name)
    path = folder / f"{name}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def calls_of(
    qkv: tuple[Tensor, Tensor, Tensor],
    index: SparseIndex,
    names: list[str] | None,
    folder: Path,
    *,
    fp8: bool,
) -> dict[str, Callable[[], Tensor]]:
    """Each variant's call on the same tensors; in fp8 the time holds the quantisation."""
    q, k, v = qkv

    def call_of(variant: Variant) -> Callable[[], Tensor]:
        module = module_of(variant, folder)
        options = {"scale": q.shape[-1] ** -0.5, "launch": variant.launch, "fp8": fp8}
        return lambda: module.sparse_attention(q, k, v, index, **options)[0]

    found = {}
    for variant in FP8_VARIANTS if fp8 else VARIANTS:
        if names is None or variant.name in names:
            found[variant.name] = call_of(variant)
    return found


def main() -> None:
    """One record a variant: the median over the rounds."""
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("--length", type=length_argument, default=1 << 17)
    given.add_argument("--heads", type=int, default=32)
    given.add_argument("--kv-heads", type=int, default=8)
    given.add_argument("--dim", type=int, default=128)
    given.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    given.add_argument("--precision", choices=PRECISIONS, default="native")
    given.add_argument("--rounds", type=int, default=3)
    given.add_argument("--names", nargs="+", default=None)
    given.add_argument("--out", type=Path, default=None)
    options = given.parse_args()
    recorder, device = Recorder(options.out), default_device()
    sizes = {"heads": options.heads, "kv_heads": options.kv_heads, "dim": options.dim}
    shape = Shape(length=options.length, dtype=getattr(torch, options.dtype), **sizes)
    qkv = shape.tensors(device)
    index = planted_index(vs1(options.length, options.heads, 0), layout_of(qkv[0], qkv[1]))
    pairs, fp8 = int(computed_pairs(index, 0).sum()), options.precision == "fp8"
    most = GATE[E4M3 if fp8 else shape.dtype]
    with tempfile.TemporaryDirectory() as folder:
        calls = calls_of(qkv, index, options.names, Path(folder), fp8=fp8)
        scale = options.dim**-0.5
        expected = library.sparse_attention(*qkv, index, scale=scale, fp8=fp8)[0].float()
        errors: dict[str, float | str] = {}
        for name, call in calls.items():
            try:
                errors[name] = float((call().float() - expected).norm() / expected.norm())
            except Exception as error:
                errors[name] = f"{type(error).__name__}: {error}"[:300]
        good = [n for n, e in errors.items() if isinstance(e, float) and e < most]
        times: dict[str, list[float]] = {name: [] for name in good}
        for turn in range(options.rounds):
            for name in good[turn % len(good) :] + good[: turn % len(good)]:
                times[name].append(measure(calls[name], device).ms_p50)
    for name, error in errors.items():
        record: dict[str, object] = {"op": "triton_variant", "variant": name, "error": error}
        record |= {"case": "vs1-seed0", "precision": options.precision, **shape.to_dict()}
        if name in times:
            ms = sorted(times[name])[len(times[name]) // 2]
            record |= {"ms_p50": ms, "ms_rounds": times[name]}
            record["tflops"] = round(4 * options.dim * pairs / ms / 1e9, 1)
        recorder.write(record)
        print(f"{name}: {record.get('ms_p50')} ms, {record.get('tflops')} TFLOP/s, error {error}")


if __name__ == "__main__":
    main()
