"""`minference ls`: the methods, and the models with published patterns."""

from __future__ import annotations

import json

import typer

from minference.head_patterns import get_support_models

app = typer.Typer(add_completion=False)


@app.command()
def show(as_json: bool = typer.Option(False, "--json", help="JSON on one line.")) -> None:
    """Names that other commands and calls accept."""
    from minference.methods import method_names

    found = {"methods": method_names(), "models": get_support_models()}
    if as_json:
        typer.echo(json.dumps(found))
        return
    for kind, names in found.items():
        typer.echo(kind)
        for name in names:
            typer.echo(f"  {name}")
