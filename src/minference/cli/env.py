"""`minference env`: what a bug report needs."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version

import typer

from minference import __version__, env

app = typer.Typer(add_completion=False)
PACKAGES = ("torch", "triton", "transformers", "vllm", "numpy", "matplotlib")


@app.command()
def show(as_json: bool = typer.Option(False, "--json", help="JSON on one line.")) -> None:
    """Versions, device and the five environment variables."""
    import torch

    cuda = torch.cuda.is_available()
    found: dict[str, str | None] = {
        "minference": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: _version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        **env.snapshot(),
    }
    if as_json:
        typer.echo(json.dumps(found))
        return
    for name, value in found.items():
        typer.echo(f"{name:20} {'-' if value is None else value}")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
