"""`minference inspect`: the head map of a model id or a pattern file, or where two differ."""

from __future__ import annotations

import json
from collections import Counter
from typing import Annotated, Any

import typer

from minference.head_patterns import HeadPatterns

app = typer.Typer(add_completion=False)


@app.command()
def show(
    sources: Annotated[list[str], typer.Argument(help="Supported model id, or a pattern file.")],
    diff: bool = typer.Option(False, "--diff", help="The heads in which two tables differ."),
    length: str = typer.Option("128k", help="Prompt whose density --diff predicts."),
    as_json: bool = typer.Option(False, "--json", help="The table as JSON."),
) -> None:
    """One letter a head, one row a layer, and what the letters mean."""
    if len(sources) != 1 + diff:
        wanted = "two tables with --diff" if diff else "one table, or two with --diff"
        raise ValueError(f"inspect takes {wanted}, got {len(sources)}: {', '.join(sources)}")
    if diff:
        _show_difference(sources, length, as_json=as_json)
        return
    data = HeadPatterns.from_pretrained(sources[0]).to_dict()
    if as_json:
        typer.echo(json.dumps(data))
        return
    typer.echo(f"{sources[0]}: {data['layers']} layers, {data['heads']} heads")
    for layer, row in enumerate(data["rows"]):
        typer.echo(f"{layer:4}  {row}")
    for letter, pattern in data["legend"].items():
        fields = ", ".join(f"{k}={v}" for k, v in pattern.items() if k != "kind")
        typer.echo(f"  {letter}  {pattern['kind']}({fields})")


def difference(old: HeadPatterns, new: HeadPatterns, length: int) -> dict[str, Any]:
    """The heads that differ, heads by kind, and the mean predicted density of both tables.

    Raises:
        ValueError: tables of different shapes.
        TypeError: a pattern whose cost is not modelled.
    """
    from minference.search.cost import CostModel

    if old.shape != new.shape:
        raise ValueError(
            f"tables must have the same layers and heads to be compared, got {old.shape} and "
            f"{new.shape}; inspect each alone"
        )
    changed = [
        {"layer": layer, "head": head, "old": one.to_dict(), "new": other.to_dict()}
        for layer, (row, others) in enumerate(zip(old.patterns, new.patterns, strict=True))
        for head, (one, other) in enumerate(zip(row, others, strict=True))
        if one != other
    ]
    cost = CostModel()
    sides = {}
    for name, table in (("old", old), ("new", new)):
        kinds = dict(Counter(pattern.kind for row in table.patterns for pattern in row))
        sides[name] = {"kinds": kinds, "density": cost.mean_density(table.patterns, length)}
    gain = sides["new"]["density"] - sides["old"]["density"]
    return {"changed": changed, **sides, "density_difference": gain, "length": length}


def _show_difference(sources: list[str], length: str, *, as_json: bool) -> None:
    from minference.lengths import parse_length
    from minference.viz.head_map import label_of

    tables = [HeadPatterns.from_pretrained(source) for source in sources]
    found = difference(tables[0], tables[1], parse_length(length))
    if as_json:
        typer.echo(json.dumps(found))
        return
    for entry in found["changed"]:
        layer, head = entry["layer"], entry["head"]
        one, other = (label_of(table[layer][head]) for table in tables)
        typer.echo(f"layer {layer:3}  head {head:3}  {one} -> {other}")
    typer.echo(f"{len(found['changed'])} of {tables[0].layers * tables[0].heads} heads differ")
    for name, source in zip(("old", "new"), sources, strict=True):
        kinds = ", ".join(f"{count} {kind}" for kind, count in found[name]["kinds"].items())
        typer.echo(f"{source}: {kinds}; predicted density {found[name]['density']:.4f}")
    typer.echo(f"difference {found['density_difference']:+.4f} at {found['length']} tokens")
