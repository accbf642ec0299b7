"""The five environment variables, parsed in one place; nothing is kept here. Floor 0."""

from __future__ import annotations

import os
from pathlib import Path

from minference.errors import unknown_name

IMPLS = ("auto", "reference", "torch", "triton", "hopper")
LOG_LEVELS = ("debug", "info", "warning", "error", "critical")
VARIABLES = {
    "MINFERENCE_IMPL": "implementation that impl='auto' stands for; an explicit impl wins",
    "MINFERENCE_LOG": "level of the logger 'minference'",
    "MINFERENCE_CONFIG": "JSON file with options for the vLLM plugin",
    "MINFERENCE_CACHE": "folder for what the library keeps between runs",
    "MINFERENCE_DISABLE": "1 means dense attention everywhere",
}

_TRUE = ("1", "true", "yes", "on")
_FALSE = ("", "0", "false", "no", "off")


def impl() -> str:
    """What `impl="auto"` stands for: one of IMPLS.

    Raises:
        ValueError: MINFERENCE_IMPL is set to an unknown name.
    """
    return _choice("MINFERENCE_IMPL", "auto", IMPLS)


def log_level() -> str:
    """The level of the library's logger: one of LOG_LEVELS.

    Raises:
        ValueError: MINFERENCE_LOG is set to an unknown name.
    """
    return _choice("MINFERENCE_LOG", "warning", LOG_LEVELS)


def config_path() -> Path | None:
    """The file of MINFERENCE_CONFIG, or None; whether it exists is the reader's affair."""
    value = os.environ.get("MINFERENCE_CONFIG", "").strip()
    return Path(value).expanduser() if value else None


def cache_dir() -> Path:
    """The cache folder: MINFERENCE_CACHE, else `minference` in the user's cache folder."""
    value = os.environ.get("MINFERENCE_CACHE", "").strip()
    if value:
        return Path(value).expanduser()
    base = os.environ.get("XDG_CACHE_HOME", "").strip() or "~/.cache"
    return Path(base).expanduser() / "minference"


def disabled() -> bool:
    """Whether MINFERENCE_DISABLE asks for dense attention everywhere.

    Raises:
        ValueError: the variable is neither a yes nor a no.
    """
    value = os.environ.get("MINFERENCE_DISABLE", "").strip().lower()
    if value in _TRUE:
        return True
    if value in _FALSE:
        return False
    raise ValueError(
        f"MINFERENCE_DISABLE must be one of {', '.join(_TRUE)} or "
        f"{', '.join(v for v in _FALSE if v)}, got {value!r}"
    )


def snapshot() -> dict[str, str | None]:
    """The variables as they are set now, for bug reports; None means unset."""
    return {name: os.environ.get(name) for name in VARIABLES}


def _choice(variable: str, default: str, valid: tuple[str, ...]) -> str:
    value = os.environ.get(variable, "").strip().lower() or default
    if value not in valid:
        raise unknown_name(f"value of {variable}", value, valid)
    return value
