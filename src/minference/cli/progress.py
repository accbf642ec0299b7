"""Progress bars on standard error: any count, and the decoder layers of a prefill."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def bar(label: str, total: int, *, quiet: bool) -> Iterator[Callable[[], None]]:
    """A bar of `total` steps; gives the function that counts one.

    Args:
        label: what the bar is called.
        total: number of steps.
        quiet: no bar; nor is there one where standard error is no terminal.
    """
    if quiet or not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(label, total=total)

        def advance() -> None:
            if not progress.finished:
                progress.advance(task)

        yield advance


@contextmanager
def layer_progress(llm: Any, name: str, *, quiet: bool) -> Iterator[None]:  # noqa: ANN401
    """Counts the decoder layers of the first forward call inside the context.

    Args:
        llm: a transformers causal language model.
        name: what the bar is called.
        quiet: as in `bar`.
    """
    layers = getattr(llm.get_decoder(), "layers", ())
    with bar(f"{name} prefill, layer", len(layers), quiet=quiet or not layers) as advance:
        hooks = [layer.register_forward_hook(lambda *_: advance()) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
