"""The command `minference`. One file a command, loaded only when it is called."""

from __future__ import annotations

import importlib
from typing import Any

import typer
from typer.core import TyperGroup

# command -> the module that holds a typer app named `app`
COMMANDS = {
    "bench": "minference.cli.bench",
    "demo": "minference.cli.demo",
    "env": "minference.cli.env",
    "eval": "minference.cli.eval",
    "inspect": "minference.cli.inspect",
    "ls": "minference.cli.ls",
    "run": "minference.cli.run",
    "search": "minference.cli.search",
    "viz": "minference.cli.viz",
}


class _Lazy(TyperGroup):
    """A group whose commands are imported when they are looked up."""

    def list_commands(self, ctx: object) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: object, cmd_name: str) -> Any:  # noqa: ANN401
        if cmd_name not in COMMANDS:
            return None
        command = typer.main.get_command(importlib.import_module(COMMANDS[cmd_name]).app)
        command.name = cmd_name
        return command


app = typer.Typer(cls=_Lazy, no_args_is_help=True, add_completion=False)


@app.callback()
def root() -> None:
    """Dynamic sparse attention for the prefill of long prompts."""


def main() -> None:
    """Entry point: what the library or the system words ends with status 2, untraced."""
    from minference.errors import UnsupportedError

    try:
        app()
    except (ValueError, TypeError, OSError, UnsupportedError) as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(2) from error
