"""The logger `minference`, and messages that appear once a process. Floor 0."""

from __future__ import annotations

import functools
import logging

from minference import env

ROOT = "minference"


def get_logger(name: str = ROOT) -> logging.Logger:
    """The logger of a module (pass `__name__`), with MINFERENCE_LOG applied on first use."""
    _apply_level()
    return logging.getLogger(name if name.split(".")[0] == ROOT else f"{ROOT}.{name}")


@functools.cache
def log_once(level: int, message: str, name: str = ROOT) -> None:
    """Logs a message the first time that this process asks for exactly this message.

    Args:
        level: a level of the logging module, such as logging.INFO.
        message: the finished text; anything that varies makes it a new message.
        name: the logger.
    """
    get_logger(name).log(level, message)


def info_once(message: str, name: str = ROOT) -> None:
    """Logs at INFO, once a process: why an automatic choice fell as it did."""
    log_once(logging.INFO, message, name)


def warn_once(message: str, name: str = ROOT) -> None:
    """Logs at WARNING, once a process."""
    log_once(logging.WARNING, message, name)


def forget_messages() -> None:
    """Lets every message of `log_once` appear again; for tests and long-lived servers."""
    log_once.cache_clear()


@functools.cache
def _apply_level() -> None:
    root = logging.getLogger(ROOT)
    if root.level == logging.NOTSET:
        root.setLevel(env.log_level().upper())
    # below WARNING, python's handler of last resort stays silent
    if not root.handlers and not logging.getLogger().handlers and root.level < logging.WARNING:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        root.addHandler(handler)
