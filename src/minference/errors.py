"""What the library raises besides ValueError and TypeError. Floor 0.

A message says what was asked, what was expected, what came, and what to do about it.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class UnsupportedError(RuntimeError):
    """A request that is well formed but that this machine, model or build cannot serve."""


class MissingDependencyError(ImportError, UnsupportedError):
    """An optional package that the request needs is not installed."""


class PatternFileError(ValueError):
    """A pattern file that cannot be read as head patterns."""


def unknown_name(kind: str, name: object, valid: Iterable[str]) -> ValueError:
    """Builds the error for a name outside a closed set; the caller raises it.

    Args:
        kind: what the name stands for, in the singular ("method", "impl").
        name: what the caller gave.
        valid: every accepted name.
    """
    names = sorted(valid)
    near = difflib.get_close_matches(str(name), names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return ValueError(f"unknown {kind} {name!r}: {hint}valid names are {', '.join(names)}")


def require(module: str, extra: str) -> ModuleType:
    """Imports an optional module, or raises an error that names the extra to install.

    Raises:
        MissingDependencyError: the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not (module == error.name or module.startswith(error.name + ".")):
            raise
        raise MissingDependencyError(
            f"{module} is needed here and is not installed: pip install 'minference[{extra}]'",
            name=error.name,
        ) from error
