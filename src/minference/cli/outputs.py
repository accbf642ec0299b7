"""Where a command writes: checked before any work, so that nothing is computed in vain."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from minference.errors import require, unknown_name

PICTURES = (".pdf", ".png", ".svg")


def check_writable(path: Path) -> None:
    """Raises ValueError unless a file can be written there, which is tried."""
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    reason = "it is a folder" if path.is_dir() else None
    if reason is None and not folder.is_dir():
        reason = f"{str(folder)!r} is no folder"
    if reason is None:
        try:
            handle, draft = tempfile.mkstemp(dir=folder, prefix=".minference")
            os.close(handle)
            os.unlink(draft)
        except OSError as error:
            reason = error.strerror or str(error)
    if reason is not None:
        raise ValueError(
            f"{str(path)!r} cannot be written: {reason}; name a file in a folder of your own"
        )


def check_distinct(*paths: Path | None) -> None:
    """Raises ValueError if two files of a command, of which it writes one, are the same."""
    given = [path.resolve() for path in paths if path is not None]
    for path in given:
        if given.count(path) > 1:
            raise ValueError(
                f"{str(path)!r} is named twice, and would be written over; name two files"
            )


def check_picture(path: Path) -> Path:
    """The path, if a picture can be drawn and written there.

    Raises:
        ValueError: no name of a picture, or no place to write to.
        MissingDependencyError: matplotlib is not installed.
    """
    require("matplotlib", "viz")
    if path.suffix.lower() not in PICTURES:
        raise unknown_name("kind of picture", path.suffix, PICTURES)
    check_writable(path)
    return path
