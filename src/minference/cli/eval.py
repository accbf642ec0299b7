"""`minference eval`: exact match of a model under several methods, and `minference eval report`."""

from __future__ import annotations

import atexit
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from minference.cli.eval_datasets import infinitebench, pg19, ruler
from minference.cli.outputs import check_writable
from minference.errors import unknown_name

if TYPE_CHECKING:
    from minference.eval.records import Records
    from minference.eval.runner import Progress, Subject


DEFAULT_MODEL = "models/needle"


class _RunUnlessNamed(TyperGroup):
    """`eval MODEL --tasks ...` is short for `eval run MODEL --tasks ...`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401
        if args and args[0] not in {*self.commands, *ctx.help_option_names}:
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_RunUnlessNamed,
    no_args_is_help=True,
    add_completion=False,
    help="Ask a model the same questions under every method: `eval MODEL ...`, or a command.",
)


@app.command()
def run(
    model: str = typer.Argument(DEFAULT_MODEL, help="Hub id or path of a transformers model."),
    tasks: str = typer.Option("niah", help="Tasks or groups of tasks, comma-separated."),
    methods: str = typer.Option("dense,minference", help="name:key=value,..., comma-separated."),
    lengths: str = typer.Option("4k,8k", help="Prompt lengths in tokens, comma-separated."),
    samples: int = typer.Option(5, help="Questions for each task and length."),
    depths: int = typer.Option(5, help="Depths of the needle in the task niah."),
    placement: str = typer.Option(
        "end", help="end: after the prompt; cached: after one read once; spread: along its end."
    ),
    split: str = typer.Option("heldout", help="heldout to report, dev to tune on."),
    output: str = typer.Option(
        "out/eval", "-o", "--out", "--output", help="Folder of the results."
    ),
    device: str | None = typer.Option(None, help="Default: cuda where there is one."),
    workers: int | None = typer.Option(
        None,
        min=0,
        help="Processes that write prompts; by default up to 8 beside a GPU, else none.",
    ),
    as_json: bool = typer.Option(False, "--json", help="Scores as one JSON object."),
    quiet: bool = typer.Option(False, "--quiet", help="No progress."),
) -> None:
    """Ask the same seeded questions under every method; run it again to go on after a kill."""
    from minference.eval.plan import check_cells, make_cells, resolve_tasks
    from minference.eval.records import make_folder
    from minference.eval.runner import default_workers, measure_of, run_cells
    from minference.eval.tasks import PLACEMENTS
    from minference.lengths import parse_length
    from minference.methods.spec import parse_methods

    for kind, value, valid in (
        ("placement", placement, PLACEMENTS),
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
            depths=depths,
            placement=placement,  # type: ignore[arg-type]
            split=split,  # type: ignore[arg-type]
        )
    )
    check_device(device)
    make_folder(Path(output))
    limit = _token_limit(model)
    check_cells(cells, measure_of(_tokenizer(model)), limit)
    subject = _load(model, device)
    records = run_cells(
        subject,
        specs,
        cells,
        Path(output),
        workers=default_workers(subject.model.device.type) if workers is None else workers,
        command=" ".join(["minference", *sys.argv[1:]]),
        progress=None if quiet or as_json else _progress(),
    )
    _show(records, as_json)


@app.command()
def report(
    folder: str = typer.Argument(help="Folder or JSONL file that `minference eval` wrote."),
    output: Annotated[
        Path | None,
        typer.Option("-o", "--out", "--output", help="HTML page to write, pictures inside."),
    ] = None,
    pictures: Annotated[
        Path | None, typer.Option(help="Folder for the page's pictures as PNG files.")
    ] = None,
    as_json: bool = typer.Option(False, "--json", help="Scores as one JSON object."),
) -> None:
    """Print the table of results that lie in a folder, or write them as one HTML page."""
    from minference.eval.records import FILE_NAME, Records

    if output is None and pictures is not None:
        raise ValueError("--pictures needs the page that they belong to: give -o report.html")
    for written in (output, pictures and pictures / "picture.png"):
        if written is not None:
            check_writable(written)
    path = Path(folder)
    records = Records.read(path / FILE_NAME if path.is_dir() else path)
    if output is None:
        _show(records, as_json)
        return
    from minference.eval.html import write_report

    title = f"Evaluation: {path.resolve().name}"
    files = write_report(records.lines, output, title=title, pictures=pictures)
    names = [str(file) for file in files]
    typer.echo(json.dumps({"files": names}) if as_json else "\n".join(f"wrote {n}" for n in names))


for _command in (infinitebench, pg19, ruler):
    app.command()(_command)


def _show(records: Records, as_json: bool) -> None:
    from minference.eval.results import item_scores, result_tables
    from minference.eval.statistics import scores

    if not as_json:
        tables = [table for _, table in result_tables(records.lines).values()]
        typer.echo("\n\n".join(tables) or f"{records.path} holds no result yet")
        return
    found = [
        dict(zip(("task", "length", "placement", "split"), cell, strict=True))
        | {"method": method}
        | asdict(score)
        | {"accuracy": score.accuracy}
        for cell, methods in scores(records.lines).items()
        for method, score in methods.items()
    ]
    found += item_scores(records.lines)
    typer.echo(json.dumps({"file": str(records.path), "scores": found}))


def _load(name: str, device: str | None) -> Subject:
    from minference.eval.runner import Subject
    from minference.integrations.transformers.load import load

    _check_shipped(name)
    return Subject(name, *load(name, device))


def _tokenizer(name: str) -> Any:  # noqa: ANN401
    from minference.integrations.transformers.load import load_tokenizer

    _check_shipped(name)
    return load_tokenizer(name)


def _token_limit(name: str) -> int | None:
    from minference.integrations.transformers.load import load_config
    from minference.model_config import token_limit

    _check_shipped(name)
    return token_limit(load_config(name))


def check_device(device: str | None) -> None:
    """Raises ValueError unless a tensor can be put there, which is tried."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device {device!r} cannot be used: {reason}; name cpu, or cuda where there is a GPU"
        ) from error


def _check_shipped(name: str) -> None:
    if name == DEFAULT_MODEL and not Path(name).is_dir():
        raise ValueError(
            f"the model {name!r} of the repository is not here; run this in its folder, or name a "
            "model: minference eval MODEL ..."
        )


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
    # an interrupted bar would leave the terminal without a cursor
    atexit.register(bar.stop)

    def show(done: int, total: int, what: str) -> None:
        bar.update(task, completed=done, total=total, description=what)
        if done == total:
            bar.stop()

    return show
