"""`minference bench`: index and kernel beside the dense kernels of this machine, and plots."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from minference.cli.outputs import check_picture

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.callback()
def bench() -> None:
    """Measure on this machine; every record tells device, versions, commit and command."""


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def attention(context: typer.Context) -> None:
    """Index and kernel of planted patterns, apart and together; --help lists the options."""
    from minference.bench.attention import main

    raise typer.Exit(main(context.args))


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def prefill(context: typer.Context) -> None:
    """Time to first token of a whole model, dense and sparse; --help lists the options."""
    from minference.bench.prefill import main

    raise typer.Exit(main(context.args))


@app.command()
def plot(
    records: Annotated[list[Path], typer.Argument(help="JSONL files of records", exists=True)],
    out: Annotated[Path, typer.Option("--out", "-o", help="picture to write")] = Path("bench.png"),
) -> None:
    """Time against length with the break-even, and TFLOP/s or parts, of recorded measurements."""
    from minference.viz.records import plot as draw

    draw(records, check_picture(out))
    typer.echo(str(out))
