"""Progress on standard error: any count, the decoder layers of a prefill, prompts."""

from __future__ import annotations

import atexit
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minference.eval.runner import Progress


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


def prompt_progress() -> Progress:
    """Shows which prompt of how many comes next: a bar on a terminal, a line elsewhere."""
    from rich.console import Console
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    if not console.is_terminal:
        return lambda done, total, what: print(f"{done}/{total} {what}", file=sys.stderr)
    bar = Bar(console=console)
    task = bar.add_task("", total=None)
    bar.start()
    # an interrupted bar would leave the terminal without a cursor
    atexit.register(bar.stop)

    def show(done: int, total: int, what: str) -> None:
        bar.update(task, completed=done, total=total, description=what)
        if done == total:
            bar.stop()

    return show
