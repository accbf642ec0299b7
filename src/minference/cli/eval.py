"""`minference eval`: exact match of a model under several methods, and `minference eval report`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from minference.errors import unknown_name

if TYPE_CHECKING:
    from minference.eval.records import Records
    from minference.eval.runner import Progress, Subject


class _ModelFirst(TyperGroup):
    """`eval MODEL ...` is short for `eval run MODEL ...`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:  # noqa: ANN401
        if args and args[0] not in self.commands:
            args = ["run", *args]
        return super().resolve_command(ctx, args)


app = typer.Typer(cls=_ModelFirst, no_args_is_help=True, add_completion=False)


@app.command()
def run(
    model: str = typer.Argument(help="Hub id or path of a transformers model."),
    tasks: str = typer.Option("niah", help="Tasks or groups of tasks, comma-separated."),
    methods: str = typer.Option("dense,minference", help="name:key=value,..., comma-separated."),
    lengths: str = typer.Option("4k,8k", help="Prompt lengths in tokens, comma-separated."),
    samples: int = typer.Option(5, help="Questions for each task and length."),
    placement: str = typer.Option("end", help="end: after the prompt; spread: along its end."),
    split: str = typer.Option("heldout", help="heldout to report, dev to tune on."),
    output: str = typer.Option("out/eval", "-o", "--output", help="Folder of the results."),
    device: str | None = typer.Option(None, help="Default: cuda where there is one."),
    as_json: bool = typer.Option(False, "--json", help="Scores as one JSON object."),
    quiet: bool = typer.Option(False, "--quiet", help="No progress."),
) -> None:
    """Ask the same seeded questions under every method; run it again to go on after a kill."""
    from minference.eval.plan import make_cells, resolve_tasks
    from minference.eval.runner import run_cells
    from minference.lengths import parse_length
    from minference.methods.spec import parse_methods

    for kind, value, valid in (
        ("placement", placement, ("end", "spread")),
        ("split", split, ("dev", "heldout")),
    ):
        if value not in valid:
            raise unknown_name(kind, value, valid)
    specs = parse_methods(methods)
    cells = list(
        make_cells(
            resolve_tasks(tasks.split(",")),
            [parse_length(length) for length in lengths.split(",")],
            samples=samples,
            placement=placement,  # type: ignore[arg-type]
            split=split,  # type: ignore[arg-type]
        )
    )
    records = run_cells(
        _load(model, device),
        specs,
        cells,
        Path(output),
        command=" ".join(["minference", *sys.argv[1:]]),
        progress=None if quiet or as_json else _progress(),
    )
    _show(records, as_json)


@app.command()
def report(
    folder: str = typer.Argument(help="Folder or JSONL file that `minference eval` wrote."),
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="HTML page to write, pictures inside.")
    ] = None,
    pictures: Annotated[
        Path | None, typer.Option(help="Folder for the page's pictures as PNG files.")
    ] = None,
    as_json: bool = typer.Option(False, "--json", help="Scores as one JSON object."),
) -> None:
    """Print the table of results that lie in a folder, or write them as one HTML page."""
    from minference.eval.records import FILE_NAME, Records

    path = Path(folder)
    records = Records.read(path / FILE_NAME if path.is_dir() else path)
    if output is None:
        if pictures is not None:
            raise ValueError("--pictures needs the page that they belong to: give -o report.html")
        _show(records, as_json)
        return
    from minference.eval.html import write_report

    title = f"Evaluation: {path.resolve().name}"
    files = write_report(records.lines, output, title=title, pictures=pictures)
    names = [str(file) for file in files]
    typer.echo(json.dumps({"files": names}) if as_json else "\n".join(f"wrote {n}" for n in names))


def _show(records: Records, as_json: bool) -> None:
    from minference.eval.statistics import scores
    from minference.eval.tables import markdown_table

    if not as_json:
        typer.echo(markdown_table(records.lines))
        return
    found = [
        {"task": task, "length": length, "placement": placement, "method": method}
        | asdict(score)
        | {"accuracy": score.accuracy}
        for (task, length, placement), methods in scores(records.lines).items()
        for method, score in methods.items()
    ]
    typer.echo(json.dumps({"file": str(records.path), "scores": found}))


def _load(name: str, device: str | None) -> Subject:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from minference.eval.runner import Subject

    target = device or ("cuda" if torch.cuda.is_available() else "cpu")
    # bfloat16 matrix products are slow on most CPUs
    dtype = torch.float32 if target == "cpu" else "auto"
    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    return Subject(name, model.to(target).eval(), AutoTokenizer.from_pretrained(name))


def _progress() -> Progress:
    """A bar on a terminal, a line a prompt elsewhere."""
    from rich.console import Console
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    if not console.is_terminal:
        return lambda done, total, what: typer.echo(f"{done}/{total} {what}", err=True)
    bar = Bar(console=console)
    task = bar.add_task("", total=None)
    bar.start()

    def show(done: int, total: int, what: str) -> None:
        bar.update(task, completed=done, total=total, description=what)
        if done == total:
            bar.stop()

    return show
