"""`minference eval infinitebench`, `pg19` and `ruler`: published data sets under every method."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minference.cli import eval_model as asked
from minference.cli.progress import prompt_progress

if TYPE_CHECKING:
    from minference.eval.records import Records
    from minference.eval.runner import Progress

Model = Annotated[str, typer.Argument(help="Hub id or path of a transformers model.")]
Methods = Annotated[str, typer.Option(help="name:key=value,..., comma-separated.")]
Output = Annotated[Path, typer.Option("-o", "--out", "--output", help="Folder of the results.")]
Device = Annotated[str | None, typer.Option(help="Default: cuda where there is one.")]
AsJson = Annotated[bool, typer.Option("--json", help="Scores as one JSON object.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress.")]


def infinitebench(
    model: Model,
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Files such as longbook_qa_eng.jsonl; passkey, number_string and kv_retrieval are "
            "generated where there is no such file."
        ),
    ],
    methods: Methods = "dense,minference",
    length: Annotated[
        str, typer.Option(help="Tokens of a prompt; longer ones lose their middle.")
    ] = "128k",
    samples: Annotated[
        int | None, typer.Option(min=1, help="The first so many of each source.")
    ] = None,
    output: Output = Path("out/eval"),
    device: Device = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """InfiniteBench: its files, or its retrieval tasks generated; greedy answers, its scores."""
    from minference.eval.infinitebench.run import KIND, answer_example, read_sources
    from minference.eval.items import run_items
    from minference.lengths import parse_length
    from minference.methods.spec import parse_methods

    specs, tokens = parse_methods(methods), parse_length(length)
    subject = asked.checked_subject(model, device, [tokens])
    items = read_sources(sources, subject, tokens, samples=samples)
    told = {"kind": KIND, "command": _command(), "progress": _shown(as_json or quiet)}
    _show(run_items(subject, specs, items, output, answer_example, **told), KIND, as_json)


def pg19(
    model: Model,
    folder: Annotated[Path, typer.Argument(help="Folder of *.txt files, as PG-19 comes.")],
    methods: Methods = "dense,minference",
    lengths: Annotated[str, typer.Option(help="Tokens, comma-separated.")] = "4k,8k,16k,32k",
    books: Annotated[
        int | None, typer.Option(min=1, help="The first so many of each length.")
    ] = None,
    output: Output = Path("out/eval"),
    device: Device = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Perplexity and bits per byte of the books in a folder, by length."""
    from minference.eval.items import run_items
    from minference.eval.pg19 import KIND, read_book, read_books
    from minference.lengths import parse_length
    from minference.methods.spec import parse_methods

    specs, tokens = parse_methods(methods), [parse_length(text) for text in lengths.split(",")]
    subject = asked.checked_subject(model, device, tokens)
    items = read_books(folder, subject, tokens, books=books)
    told = {"kind": KIND, "command": _command(), "progress": _shown(as_json or quiet)}
    _show(run_items(subject, specs, items, output, read_book, **told), KIND, as_json)


def ruler(
    model: Model,
    tasks: Annotated[str, typer.Option(help="ruler, niah or lm-eval's names.")] = "niah",
    methods: Methods = "dense,minference",
    lengths: Annotated[str, typer.Option(help="Tokens, comma-separated.")] = "4k",
    samples: Annotated[int, typer.Option(min=1, help="Samples for each task and length.")] = 25,
    output: Output = Path("out/eval"),
    device: Device = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """RULER through lm-eval's own tasks, offline: essays become prose of this Python."""
    from minference.eval.ruler import KIND, resolve_ruler, run_ruler
    from minference.lengths import parse_length
    from minference.methods.spec import parse_methods

    specs, names = parse_methods(methods), resolve_ruler(tasks.split(","))
    tokens = [parse_length(text) for text in lengths.split(",")]
    subject = asked.checked_subject(model, device, tokens)
    told = {"command": _command(), "progress": _shown(as_json or quiet)}
    records = run_ruler(subject, specs, names, tokens, output, samples=samples, **told)
    _show(records, KIND, as_json)


def _show(records: Records, kind: str, as_json: bool) -> None:
    from minference.eval.results import item_scores, result_tables

    own = list(records.of(kind))
    if as_json:
        typer.echo(json.dumps({"file": str(records.path), "scores": item_scores(own)}))
        return
    typer.echo("\n\n".join(table for _, table in result_tables(own).values()))


def _shown(quiet: bool) -> Progress | None:
    return None if quiet else prompt_progress()


def _command() -> str:
    return " ".join(["minference", *sys.argv[1:]])
