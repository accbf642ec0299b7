"""The model and the prompt of a command: options that several commands share, and their values."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minference.head_patterns import tables_in
from minference.lengths import parse_length

if TYPE_CHECKING:
    from minference.eval.runner import Subject
    from minference.eval.side_by_side import Prompt
    from minference.methods.spec import MethodSpec

Text = Annotated[
    str | None, typer.Option("--prompt", help="The prompt; stdin without it and --file.")
]
File = Annotated[Path | None, typer.Option(help="File that holds the prompt.")]
DemoFacts = Annotated[bool, typer.Option(help="Hide facts in Python's documentation and ask.")]
Tokens = Annotated[str, typer.Option(help="Length of the demo prompt, as 16384 or 16k.")]
Seed = Annotated[int, typer.Option(help="Facts, places and prose of the demo prompt.")]
Layer = Annotated[int, typer.Option(help="Layer to draw.")]
Head = Annotated[int, typer.Option(help="Query head to draw.")]
MethodText = Annotated[str, typer.Option("--method", help="name:key=value,... of `minference ls`.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress lines.")]

BUDGETS = {"patterns", "vertical", "slash", "budget_length"}


def load(name: str) -> tuple[Any, Any]:
    """The model and its tokenizer, loaded by transformers, which takes seconds to import."""
    from minference.integrations.transformers.load import load as load_now

    return load_now(name)


def load_config(name: str) -> Any:  # noqa: ANN401
    """The configuration, by which a command refuses what does not suit the model."""
    from minference.integrations.transformers.load import load_config as load_now

    return load_now(name)


def load_subject(name: str, *, quiet: bool) -> Subject:
    """The model with its name; says on standard error that it is being loaded, unless quiet."""
    from minference.eval.runner import Subject

    if not quiet:
        typer.echo(f"loading {name}", err=True)
    return Subject(name, *load(name))


def default_method() -> str:
    """The method of a command that names none, on the device that `load` takes."""
    import torch

    from minference.methods import default_method_name
    from minference.ops._dispatch import default_device

    return default_method_name(default_device(), torch.bfloat16)


def text(prompt: str | None, file: Path | None, demo_facts: bool) -> str | None:
    """The prompt as it was given, from stdin where no option names it; None for a demo prompt.

    Raises:
        ValueError: several prompts, none, or a file that is no text.
    """
    given = [
        name
        for name, value in (
            ("--prompt", prompt is not None),
            ("--file", file is not None),
            ("--demo-facts", demo_facts),
        )
        if value
    ]
    if len(given) > 1:
        raise ValueError(f"one prompt is read, got {' and '.join(given)}; give one of them")
    if demo_facts or prompt is not None:
        return prompt
    if file is not None:
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--file {str(file)!r} cannot be read as text: {error}") from error
    if sys.stdin.isatty():
        raise ValueError("no prompt; give --prompt TEXT, --file FILE or --demo-facts, or pipe one")
    return sys.stdin.read()


def with_own_patterns(spec: MethodSpec, model: str, *, quiet: bool) -> MethodSpec:
    """The method with the patterns that a search left in the model's folder, told on standard
    error, unless it takes none or its options say something of patterns or budgets."""
    from minference.methods import get_method
    from minference.methods.spec import takes_patterns

    found = tables_in(model)
    takes = takes_patterns(get_method(spec.name))
    if not found or not takes or {key for key, _ in spec.options} & BUDGETS:
        return spec
    if not quiet:
        typer.echo(f"patterns of {found[0]}", err=True)
    return replace(spec, options=(*spec.options, ("patterns", str(found[0]))))


def check_prompt(config: Any, text: str | None, tokens: str) -> None:  # noqa: ANN401
    """Raises ValueError, before weights are read, for an empty text, or without one for a length
    that is none or that the model does not take."""
    from minference.eval.side_by_side import check_length, check_text

    if text is None:
        check_length(config, parse_length(tokens))
    else:
        check_text(text)


def prompt_for(subject: Subject, text: str | None, tokens: str, seed: int) -> Prompt:
    """The given text, else a demo prompt of that many tokens of the model."""
    from minference.eval.side_by_side import Prompt, hidden_fact

    return hidden_fact(subject, parse_length(tokens), seed) if text is None else Prompt(text)
