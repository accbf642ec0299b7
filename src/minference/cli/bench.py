"""`minference bench attention`: index and kernel beside the dense kernels of this machine."""

from __future__ import annotations

import typer

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
