"""`minference viz`: pictures of what a model's heads do."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from minference.head_patterns import HeadPatterns

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.callback()
def root() -> None:
    """Pictures of what a model's heads do."""


@app.command()
def heads(
    source: str = typer.Argument(help="Supported model id, or a pattern file."),
    out: str = typer.Option("heads.png", "-o", "--out", help="Picture to write."),
    as_json: bool = typer.Option(False, "--json", help="What was drawn, as JSON."),
) -> None:
    """The pattern of every head, by layer and head."""
    from minference.viz.head_map import head_map_figure

    table = HeadPatterns.from_pretrained(source)
    figure = head_map_figure(table, title=source)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)
    drawn = {"picture": out, "layers": table.layers, "heads": table.heads}
    typer.echo(json.dumps(drawn) if as_json else f"wrote {out}")
