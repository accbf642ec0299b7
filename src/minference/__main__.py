"""The command `minference`, also as `python -m minference`; its packages are the extra `cli`."""

from __future__ import annotations

import sys

from minference.errors import MissingDependencyError, require


def main() -> None:
    """Entry point: says what to install where the extra is missing."""
    try:
        for package in ("typer", "rich"):
            require(package, "cli")
    except MissingDependencyError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from error
    from minference.cli import main as command

    command()


if __name__ == "__main__":
    main()
