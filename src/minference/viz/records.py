"""Plots of benchmark records: time against length with the break-even, and rates or parts as bars.

The parts are those of a whole model's first token.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from minference.json_files import read_json_lines
from minference.viz.pictures import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Record = dict[str, Any]
Curve = dict[int, float]
"""Milliseconds by length in tokens."""
PARTS = ("linear", "attention", "index", "kv", "rest")


def read(path: Path) -> list[Record]:
    """Records that may be shown: those with a time behind a gate that is not red.

    Raises:
        ValueError: a file without one.
    """
    records = read_json_lines(path)
    shown = [r for r in records if "length" in r and "ms_p50" in r and r.get("gate") is not False]
    if not shown:
        raise ValueError(
            f"{path} must hold a record with length and ms_p50 whose gate is not red, got "
            f"{len(records)} other records; write some with `minference bench attention --out`"
        )
    return shown


def name_of(record: Record) -> str:
    """Legend of a record: the model or implementation, and the case without its seed or what was
    run."""
    what = record["op"].removesuffix("_attention").replace("_", " ")
    name = f"{record.get('model', record['impl'])}, {record.get('case', what).split('-seed')[0]}"
    return f"{name}, extrapolated" if "extrapolated_from" in record else name


def curves(records: Sequence[Record]) -> dict[str, Curve]:
    """Median time by length of each name; index and kernel together where both were timed."""
    taken: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        taken[name_of(record)][record["length"]].append(record.get("together_ms", record["ms_p50"]))
    return {name: {n: median(ms) for n, ms in sorted(by.items())} for name, by in taken.items()}


def break_even(dense: Curve, sparse: Curve) -> int | None:
    """Shortest measured length from which on the sparse curve is never above the dense one."""
    found = None
    for length in sorted(dense.keys() & sparse.keys(), reverse=True):
        if sparse[length] > dense[length]:
            break
        found = length
    return found


def fastest(named: dict[str, Curve]) -> Curve:
    """Least time at each length."""
    lengths = {n for curve in named.values() for n in curve}
    return {n: min(c[n] for c in named.values() if n in c) for n in sorted(lengths)}


def _draw_times(axes: Axes, records: Sequence[Record]) -> None:
    dense = curves([r for r in records if r["op"].startswith("dense")])
    sparse = curves([r for r in records if not r["op"].startswith("dense")])
    measured = {name: curve for name, curve in dense.items() if not name.endswith("extrapolated")}
    for name, curve in (dense | sparse).items():
        style = "-" if name in sparse else "--" if name in measured else ":"
        axes.plot(list(curve), list(curve.values()), style, marker="o", label=name)
    point = break_even(fastest(measured), fastest(sparse))
    if point is not None:
        axes.axvline(point, color="grey", linewidth=0.8, label=f"not slower from {point} tokens")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("tokens")
    axes.set_ylabel("milliseconds, index included")
    axes.legend(fontsize=7)


def _draw_rates(axes: Axes, records: Sequence[Record]) -> None:
    longest = max(r["length"] for r in records)
    rates: dict[str, list[float]] = defaultdict(list)
    for record in records:
        if record["length"] == longest and "tflops" in record:
            rates[name_of(record)].append(record["tflops"])
    axes.barh(list(rates), [median(values) for values in rates.values()])
    axes.set_xlabel(f"TFLOP/s over computed pairs, kernel alone, {longest} tokens")
    axes.tick_params(axis="y", labelsize=7)


def _draw_parts(axes: Axes, records: Sequence[Record]) -> None:
    taken: dict[tuple[int, str], list[Record]] = defaultdict(list)
    several = len({record.get("model") for record in records}) > 1
    for record in records:
        kind = record["op"].removesuffix("_prefill")
        name = f"{kind}, {record['model']}" if several else kind
        taken[record["length"], name].append(record)
    names = [f"{length:,} {name}" for length, name in sorted(taken)]
    before = [0.0] * len(names)
    for part in PARTS:
        shares = [
            100 * median(r[f"{part}_s"] / r["first_token_s"] for r in own)
            for _, own in sorted(taken.items())
        ]
        axes.barh(names, shares, left=before, label="keys and values" if part == "kv" else part)
        before = [a + b for a, b in zip(before, shares, strict=True)]
    axes.set_xlabel("% of the time to the first token")
    axes.tick_params(axis="y", labelsize=7)
    axes.legend(fontsize=7, ncols=len(PARTS), loc="lower center", bbox_to_anchor=(0.5, 1))


def plot(sources: Sequence[Path], picture: Path) -> None:
    """Draws the records of JSONL files into a picture.

    Raises:
        ValueError: a file without records that may be shown.
    """
    from matplotlib.figure import Figure

    records = [record for source in sources for record in read(source)]
    devices = {str(r.get("gpu") or r.get("cpu") or "") for r in records}
    for record in records if len(devices) > 1 else ():
        device = str(record.get("gpu") or record.get("cpu")).removeprefix("NVIDIA ").split(" ")[0]
        record["model" if "model" in record else "impl"] += f" on {device}"
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_times(left, records)
    whole = [r for r in records if "linear_s" in r]
    if whole:
        _draw_parts(right, whole)
    else:
        _draw_rates(right, records)
    figure.suptitle(", ".join(sorted(devices)))
    save_figure(figure, picture)
