"""`minference viz`: pictures of what a model's heads do, and of what an evaluation found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minference.cli import subject as given
from minference.cli.outputs import PICTURES, check_picture
from minference.cli.progress import layer_progress
from minference.errors import unknown_name
from minference.head_patterns import HeadPatterns
from minference.lengths import parse_length

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from minference.eval.records import Record

app = typer.Typer(add_completion=False, no_args_is_help=True)
Out = Annotated[
    Path,
    typer.Option(
        "-o", "--out", callback=check_picture, help=f"Picture to write: {', '.join(PICTURES)}."
    ),
]
_WHERE = {
    "end": "at the end",
    "spread": "along the end",
    "cached": "one at a time behind the prompt",
}
Results = Annotated[Path, typer.Argument(help="Folder or JSONL file that `minference eval` wrote.")]


@app.callback()
def root() -> None:
    """Pictures of what a model's heads do, and of what an evaluation found."""


@app.command()
def attention(
    model: str = typer.Argument(help="Hub id or path of a transformers model."),
    prompt: given.Text = None,
    file: given.File = None,
    demo_facts: given.DemoFacts = False,
    tokens: given.Tokens = "4k",
    seed: given.Seed = 0,
    method: given.MethodText = "minference",
    layer: given.Layer = 0,
    head: given.Head = 0,
    rows: int = typer.Option(64, min=1, help="Rows of the prompt to measure kept mass on."),
    out: Out = Path("attention.png"),
    as_json: given.AsJson = False,
    quiet: given.Quiet = False,
) -> None:
    """Where a head looks in a prompt, the tiles that a method computes, and what they keep."""
    from minference.eval.side_by_side import encode
    from minference.methods.spec import build_method, parse_method
    from minference.viz.probe import Probe, watch

    text, spec = given.text(prompt, file, demo_facts), parse_method(method)
    quiet = quiet or as_json
    config = given.load_config(model)
    given.check_prompt(config, text, tokens)
    probe = Probe.of(config, layer, head)
    chosen = build_method(given.with_own_patterns(spec, model, quiet=quiet), config)
    subject = given.load_subject(model, quiet=quiet)
    ids = encode(subject, given.prompt_for(subject, text, tokens, seed).text)
    with layer_progress(subject.model, "prefill", quiet=quiet):
        handle = watch(subject.model, ids, chosen, probe, rows)
    probe.save(handle, out)
    records = handle.records
    result = {
        "picture": str(out),
        "model": model,
        "tokens": ids.shape[1],
        "method": method,
        "layer": layer,
        "head": head,
        "rows": min(rows, ids.shape[1]),
        "layers": [round(record["density"], 5) for record in records],
        "heads": handle.head_records,
    }
    typer.echo(json.dumps(result) if as_json else attention_report(result))


def attention_report(result: dict[str, Any]) -> str:
    """The heads of the drawn layer as lines for people."""
    layer, own = result["layer"], [r for r in result["heads"] if r["layer"] == result["layer"]]
    lines = [
        f"{result['model']}: {result['tokens']} tokens, {result['method']}, layer {layer}",
        f"  picture of head {result['head']}: {result['picture']}",
    ]
    if not own:
        return "\n".join([*lines, "  the layer was served densely: everything is computed"])
    lines.append(f"  {'head':>4} {'density':>8} {'kept mass':>10} {'worst row':>10} {'output':>8}")
    lines += [
        f"  {r['head']:4} {r['density']:8.4f} {r['recall']:10.4f} {r['recall_min']:10.4f} "
        f"{1 - r['output_error']:8.4f}"
        for r in own
    ]
    lines.append(
        f"  kept mass: share of the softmax on computed keys, mean and worst of {result['rows']} "
        "rows; output: the same with the values, 1 - |sparse - dense| / |dense|"
    )
    return "\n".join(lines)


@app.command()
def heads(
    source: str = typer.Argument(help="Supported model id, or a pattern file."),
    out: Out = Path("heads.png"),
    as_json: given.AsJson = False,
) -> None:
    """The pattern of every head, by layer and head."""
    from minference.viz.head_map import head_map_figure

    table = HeadPatterns.from_pretrained(source)
    figure = head_map_figure(table, title=source)
    _save(figure, out, as_json, {"layers": table.layers, "heads": table.heads})


@app.command()
def needle(
    results: Results,
    method: Annotated[str | None, typer.Option(help="As named in the results.")] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Method to compare with; dense without it.")
    ] = None,
    task: str = typer.Option("niah", help="Task whose questions have a depth."),
    out: Out = Path("needle.png"),
    as_json: given.AsJson = False,
) -> None:
    """Exact match by length and depth, beside the dense model, and the difference."""
    from minference.eval.tables import BASELINE
    from minference.viz.needle import needle_figure, needle_grids, needle_methods

    records = _records(results)
    methods = needle_methods(records, task)
    if baseline is not None and baseline not in methods:
        raise unknown_name("method", baseline, methods)
    baseline = baseline or BASELINE
    others = [name for name in methods if name != baseline]
    chosen = method or (others[0] if others else baseline)
    first, second, difference = needle_grids(records, chosen, baseline=baseline, task=task)
    maps = {baseline: first, chosen: second}
    figure = needle_figure(maps, None if chosen == baseline else difference, title=task)
    drawn = {"task": task, "method": chosen, "baseline": baseline}
    _save(figure, out, as_json, drawn | {"questions": int(second.count.sum())})


@app.command()
def recall(
    results: Results,
    out: Out = Path("recall.png"),
    as_json: given.AsJson = False,
) -> None:
    """Attention mass kept against density, by layer, of every method of an evaluation."""
    from minference.viz.recall import recall_figure, recall_points

    points = recall_points(_records(results))
    figure = recall_figure(points, title=str(results))
    _save(figure, out, as_json, {"points": len(points)})


@app.command()
def tradeoff(
    results: Results,
    times: Annotated[
        list[Path], typer.Argument(help="JSONL files of benchmarks/peer_times.py.", exists=True)
    ],
    answered: str = typer.Option("32k", help="Lengths of the prompts that were answered."),
    timed: str = typer.Option("32k,128k", help="Lengths of the times, a panel each."),
    placement: str = typer.Option(
        "spread", help="Where the questions were: end, cached or spread."
    ),
    split: str = typer.Option("heldout", help="Whose questions: heldout or dev."),
    out: Out = Path("accuracy_speed.png"),
    as_json: given.AsJson = False,
) -> None:
    """Accuracy lost against the speed-up over the best dense kernel, a point a method."""
    from minference.bench.peers import read_times
    from minference.eval.plan import ASKED
    from minference.eval.tasks import PLACEMENTS
    from minference.viz.accuracy_speed import accuracy_figure, accuracy_panel

    for kind, name, valid in (("placement", placement, PLACEMENTS), ("split", split, ASKED)):
        if name not in valid:
            raise unknown_name(kind, name, valid)
    shown, spent = ([parse_length(x) for x in text.split(",")] for text in (answered, timed))
    if len(shown) not in (1, len(spent)):
        raise ValueError(
            f"--answered must name one length or one for each of --timed, got {answered!r} and "
            f"{timed!r}"
        )
    records, found = _records(results), read_times(times)
    panels = [
        accuracy_panel(records, found, one, other, placement=placement, split=split)
        for one, other in zip(shown * (len(spent) // len(shown)), spent, strict=True)
    ]
    gpus = sorted({time.gpu or "CPU" for time in found.values()})
    title = f"questions {_WHERE[placement]}; times on {', '.join(gpus)}"
    figure = accuracy_figure(panels, title=title)
    drawn = [
        {"answered": panel.answered, "timed": panel.timed, "points": len(panel.points)}
        for panel in panels
    ]
    _save(figure, out, as_json, {"panels": drawn})


def _records(path: Path) -> list[Record]:
    from minference.eval.records import FILE_NAME, Records

    return Records.read(path / FILE_NAME if path.is_dir() else path).lines


def _save(figure: Figure, out: Path, as_json: bool, drawn: dict[str, Any]) -> None:
    from minference.viz.pictures import save_figure

    save_figure(figure, out)
    typer.echo(json.dumps({"picture": str(out), **drawn}) if as_json else f"wrote {out}")
