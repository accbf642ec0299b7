"""A progress bar by decoder layer, on standard error, while a model reads a long prompt."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def layer_progress(llm: Any, name: str, *, quiet: bool) -> Iterator[None]:  # noqa: ANN401
    """Counts the decoder layers of the first forward call inside the context.

    Args:
        llm: a transformers causal language model.
        name: what the bar is called.
        quiet: no bar; nor is there one where standard error is no terminal.
    """
    layers = getattr(llm.get_decoder(), "layers", None)
    if quiet or layers is None or not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(f"{name} prefill, layer", total=len(layers))

        def after(*_: object) -> None:
            if not progress.finished:
                progress.advance(task)

        hooks = [layer.register_forward_hook(after) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
