"""What a search found, for people: the summary as values, and the model card of a table."""

from __future__ import annotations

from collections import Counter
from typing import Any

from minference.patterns import BUDGET_LENGTH
from minference.search.found import Found

LENGTHS = (16_384, 32_768, 131_072, 1_048_576)
LOW = 0.8
"""Kept mass below which a head is counted as served badly."""


def summary(found: Found) -> dict[str, Any]:
    """What was found, as JSON-ready values."""
    own, told = found.stability, found.patterns.provenance
    timings = found.cost.timings
    return {
        "heads": {
            str(p): n for p, n in Counter(p for row in found.rows for p in row).most_common()
        },
        "objective": told.objective,
        "scores": {name: _spread(rows) for name, rows in found.scores.items()},
        "stability": {
            "same": own.same,
            "same_kind": own.same_kind,
            "by_prompt": list(own.by_prompt),
            "loss": own.loss,
        },
        "lengths": list(found.lengths),
        "density": {n: found.density(n) for n in LENGTHS},
        "speedup": {n: found.speedup(n) for n in LENGTHS},
        "speedup_is": "counted" if timings is None else "fitted",
        "cost": None if timings is None else timings.to_dict(),
    }


def report(found: Found) -> str:
    """The result as lines for people."""
    own = found.stability
    lines = [f"searched on prompts of {list(found.lengths)} tokens"]
    counts = Counter(p for row in found.rows for p in row)
    lines += [f"  {count:4} heads  {pattern}" for pattern, count in counts.most_common()]
    for name, rows in found.scores.items():
        told = _spread(rows)
        lines.append(
            f"  {name} score {told['mean']:.3f} on average, {told['least']:.3f} for the worst head"
        )
    lines.append(
        f"  {own.same:.0%} of the prompts' own choices are the table's ({own.same_kind:.0%} of "
        f"their kinds); it loses {own.loss:.4f} of score to them"
    )
    lines.append(
        "  predicted density "
        + ", ".join(f"{found.density(n):.3f} at {_length(n)}" for n in LENGTHS)
    )
    lines.append(
        f"  predicted speed-up of attention, {_basis(found)}: "
        + ", ".join(f"{found.speedup(n):.1f} at {_length(n)}" for n in LENGTHS)
    )
    return "\n".join(lines)


def model_card(found: Found, file: str, pictures: tuple[str, ...] = ()) -> str:
    """A page in markdown about a table.

    Args:
        found: the search.
        file: name of the table's file.
        pictures: paths of pictures to show, as the page names them.
    """
    about, own = found.patterns.provenance, found.stability
    name = about.model or "a model"
    mass = sorted(x for row in found.scores["mass"] for x in row)
    low = sum(x < LOW for x in mass)
    blocks = [
        f"# Head patterns of {name}",
        f"A sparse attention pattern for each of the {len(found.layers)} x {found.patterns.heads} "
        "heads, found by `minference search`; prefill only, decoding is dense.",
        "```python\nimport minference\n\nmethod = minference.methods.MInference.from_pretrained("
        f'"{file}", budget_length={BUDGET_LENGTH:_})\n'
        "handle = minference.attach(model, method)\n```",
        "## Where it comes from",
        _table(("field", "value"), [(k, _text(v)) for k, v in about.to_dict().items()]),
        f"Prompts of {', '.join(str(n) for n in found.lengths)} tokens. Budgets are for contexts "
        "of 128K tokens and shrink in proportion below. Candidates cost the same at the length of "
        f"the longest prompt ({found.cost.describe()}).",
        "## Kinds of patterns by layer",
        _kinds(found),
        "## Recall",
        f"Attention mass kept on sampled rows: {sum(mass) / len(mass):.3f} on average, "
        f"{mass[len(mass) // 2]:.3f} for the median head, {mass[0]:.3f} for the worst; {low} of "
        f"{len(mass)} heads keep less than {LOW}.",
        _by_layer(found),
        "## Density and speed-up",
        f"Predicted for prefill attention alone, {_basis(found)}; not measured end to end.",
        _table(
            ("tokens", "density", "speed-up"),
            [(_length(n), f"{found.density(n):.4f}", f"{found.speedup(n):.2f}") for n in LENGTHS],
        ),
        "## How stable it is",
        f"{own.same:.1%} of the (prompt, head) pairs have the table's choice as their own best, "
        f"{own.same_kind:.1%} its kind; on average the table scores {own.loss:.4f} less than each "
        "prompt's own choice would.",
        _table(
            ("prompt", "tokens", "same choice"),
            [
                (str(i), str(n), f"{share:.1%}")
                for i, (n, share) in enumerate(zip(found.lengths, own.by_prompt, strict=True))
            ],
        ),
    ]
    blocks += [f"![{path}]({path})" for path in pictures]
    return "\n\n".join(blocks) + "\n"


def _kinds(found: Found) -> str:
    kinds = sorted({p.kind for row in found.rows for p in row})
    lines = []
    for layer, row in zip(found.layers, found.rows, strict=True):
        counts = Counter(p.kind for p in row)
        lines.append((str(layer), *(str(counts[kind]) for kind in kinds)))
    return _table(("layer", *kinds), lines)


def _by_layer(found: Found) -> str:
    return _table(
        ("layer", "mean mass", "least mass"),
        [
            (str(layer), f"{sum(row) / len(row):.3f}", f"{min(row):.3f}")
            for layer, row in zip(found.layers, found.scores["mass"], strict=True)
        ],
    )


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(value: object) -> str:
    told = ", ".join(value) if isinstance(value, list | tuple) else value
    return f"{told:.4f}" if isinstance(told, float) else str(told)


def _basis(found: Found) -> str:
    if found.cost.timings is None:
        return "the inverse of the density, which is the most there can be"
    return f"from kernels timed on {found.cost.timings.device}, index included"


def _spread(rows: list[list[float]]) -> dict[str, float]:
    flat = sorted(value for row in rows for value in row)
    return {"mean": sum(flat) / len(flat), "median": flat[len(flat) // 2], "least": flat[0]}


def _length(tokens: int) -> str:
    return f"{tokens >> 10}K" if tokens < 1 << 20 else f"{tokens >> 20}M"
