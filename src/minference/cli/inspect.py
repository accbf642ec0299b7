"""`minference inspect`: the head map of a model id or a pattern file."""

from __future__ import annotations

import json

import typer

from minference.head_patterns import HeadPatterns

app = typer.Typer(add_completion=False)


@app.command()
def show(
    source: str = typer.Argument(help="Supported model id, or a pattern file."),
    as_json: bool = typer.Option(False, "--json", help="The table as JSON."),
) -> None:
    """One letter a head, one row a layer, and what the letters mean."""
    data = HeadPatterns.from_pretrained(source).to_dict()
    if as_json:
        typer.echo(json.dumps(data))
        return
    typer.echo(f"{source}: {data['layers']} layers, {data['heads']} heads")
    for layer, row in enumerate(data["rows"]):
        typer.echo(f"{layer:4}  {row}")
    for letter, pattern in data["legend"].items():
        fields = ", ".join(f"{k}={v}" for k, v in pattern.items() if k != "kind")
        typer.echo(f"  {letter}  {pattern['kind']}({fields})")
