"""`minference eval`: exact match of a model under several methods, and `minference eval report`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from minference.cli import eval_model as asked
from minference.cli.eval_datasets import infinitebench, pg19, ruler
from minference.cli.outputs import check_distinct, check_writable
from minference.cli.progress import prompt_progress
from minference.errors import unknown_name

if TYPE_CHECKING:
    from minference.eval.records import Records


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
    model: str = typer.Argument(
        asked.DEFAULT_MODEL, help="Hub id or path of a transformers model."
    ),
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
    from minference.eval.plan import ASKED, check_cells, make_cells, resolve_tasks
    from minference.eval.records import make_folder
    from minference.eval.runner import default_workers, measure_of, run_cells
    from minference.eval.tasks import PLACEMENTS
    from minference.lengths import parse_length
    from minference.methods.spec import parse_methods

    for kind, value, valid in (
        ("placement", placement, PLACEMENTS),
        ("split", split, ASKED),
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
    asked.check_device(device)
    make_folder(Path(output))
    limit = asked.token_limit(model)
    check_cells(cells, measure_of(asked.load_tokenizer(model)), limit)
    subject = asked.load_subject(model, device)
    records = run_cells(
        subject,
        specs,
        cells,
        Path(output),
        workers=default_workers(subject.model.device.type) if workers is None else workers,
        command=" ".join(["minference", *sys.argv[1:]]),
        progress=None if quiet or as_json else prompt_progress(),
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
    path = path / FILE_NAME if path.is_dir() else path
    check_distinct(path, output)
    records = Records.read(path)
    if output is None:
        _show(records, as_json)
        return
    from minference.eval.html import write_report

    title = f"Evaluation: {Path(folder).resolve().name}"
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
