"""`minference search`: a pattern for every head of a model, found on prompts."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minference.cli.progress import bar
from minference.cli.subject import load
from minference.lengths import parse_length

if TYPE_CHECKING:
    from minference.search.search import Found, Settings

app = typer.Typer(add_completion=False)
DENSITY_AT = (16_384, 131_072, 1_048_576)


@app.command()
def search(
    model: Annotated[str, typer.Argument(help="Hub id or path of a transformers model.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Pattern file to write.")],
    text: Annotated[
        list[Path] | None, typer.Option(help="A prompt to search on; may be given again.")
    ] = None,
    tasks: str = typer.Option(
        "key_value,multikey", help="Generated prompts where no text is given."
    ),
    lengths: str = typer.Option("8k", help="Lengths of the generated prompts, as 8k,16k."),
    samples: int = typer.Option(1, help="Generated prompts of each task and length."),
    seed: int = typer.Option(0, help="First seed of the generated prompts."),
    space: str = typer.Option("paper", help="paper, published or wide."),
    objective: str = typer.Option("output", help="output (with the values) or mass."),
    recall: float | None = typer.Option(None, help="Grow budgets until heads keep that mass."),
    rows: int = typer.Option(64, help="Rows of each prompt to compare."),
    name: str | None = typer.Option(None, help="Id of the weights, for the file; else MODEL."),
    as_json: bool = typer.Option(False, "--json", help="One JSON object on stdout."),
    quiet: bool = typer.Option(False, "--quiet", help="No progress bar."),
) -> None:
    """Choose each head's pattern by how well it serves, at equal cost; resumes when run again."""
    from minference.search.search import Settings
    from minference.search.search import search as find

    settings = Settings(space=space, objective=objective, rows=rows, recall=recall)
    check_writable(out)
    texts = [path.read_text(encoding="utf-8") for path in text or ()] or _generated(
        tasks.split(","), [parse_length(x) for x in lengths.split(",")], samples, seed
    )
    llm, tokenizer = load(model)
    prompts = [tokenizer(own, return_tensors="pt").input_ids for own in texts]
    layers = llm.config.get_text_config(decoder=True).num_hidden_layers
    with bar("search, layer", len(prompts) * layers, quiet=quiet or as_json) as advance:
        found = find(
            llm,
            prompts,
            settings,
            model_name=name or model,
            state=out.with_name(f".{out.name}.partial"),
            on_layer=lambda number, layer: advance(),
        )
    found.patterns.save(out)
    result = summary(found, settings) | {"file": str(out)}
    typer.echo(json.dumps(result) if as_json else report(result))


def check_writable(path: Path) -> None:
    """Raises ValueError unless a file can be written there."""
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"{str(path)!r} cannot be written; name a file in a folder of your own")


def summary(found: Found, settings: Settings) -> dict[str, Any]:
    """What was found, as JSON-ready values."""
    flat = sorted(score for row in found.scores for score in row)
    counts = {str(pattern): n for pattern, n in found.patterns.counts().most_common()}
    return {
        "heads": counts,
        "objective": "mass" if settings.recall else settings.objective,
        "score_mean": sum(flat) / len(flat),
        "score_least": flat[0],
        "stability": found.stability,
        "lengths": found.lengths,
        "density": {n: found.density(settings.cost, n) for n in DENSITY_AT},
    }


def report(result: dict[str, Any]) -> str:
    """The result as lines for people."""
    lines = [f"{result['file']}: searched on prompts of {list(result['lengths'])} tokens"]
    lines += [f"  {count:4} heads  {pattern}" for pattern, count in result["heads"].items()]
    lines.append(
        f"  {result['objective']} score {result['score_mean']:.3f} on average, "
        f"{result['score_least']:.3f} for the worst head; {result['stability']:.0%} of choices "
        "agree between prompts"
    )
    told = ", ".join(f"{d:.3f} at {n // 1024}K" for n, d in result["density"].items())
    lines.append(f"  predicted density {told}")
    return "\n".join(lines)


def _generated(tasks: list[str], lengths: list[int], samples: int, seed: int) -> list[str]:
    from minference.eval.tasks import make_sample

    return [
        make_sample(task, length, seed + number).text(0)
        for task in tasks
        for length in lengths
        for number in range(samples)
    ]
