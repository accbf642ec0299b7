"""`minference search`: a pattern for every head of a model, found on prompts."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minference.cli.outputs import check_distinct, check_writable
from minference.cli.progress import bar
from minference.lengths import parse_length

if TYPE_CHECKING:
    from minference.search.found import Found

app = typer.Typer(add_completion=False)
HEAD_MAP, RECALL = "head_map.png", "recall.png"


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
    space: str = typer.Option("wide", help="wide, paper or published."),
    objective: str = typer.Option("output", help="output (with the values) or mass."),
    recall: float | None = typer.Option(None, help="Grow budgets until heads keep that mass."),
    rows: int = typer.Option(64, help="Rows of each prompt to compare."),
    cost: str = typer.Option("auto", help="fitted to this device's times, counted, or auto."),
    name: str | None = typer.Option(None, help="Id of the weights, for the file; else MODEL."),
    card: Annotated[Path | None, typer.Option(help="Model card to write, in markdown.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Folder for a head map and a plot.")] = None,
    as_json: bool = typer.Option(False, "--json", help="One JSON object on stdout."),
    quiet: bool = typer.Option(False, "--quiet", help="No progress bar."),
) -> None:
    """Choose each head's pattern by how well it serves, at equal cost; resumes when run again."""
    from minference.search.card import report, summary
    from minference.search.checks import check_config, check_lengths
    from minference.search.search import Settings
    from minference.search.search import search as find

    settings = Settings(space=space, objective=objective, rows=rows, recall=recall, cost=cost)
    check_distinct(out, card, *(text or ()))
    for path in (out, card, plots and plots / HEAD_MAP):
        if path is not None:
            check_writable(path)
    texts = [_read(path) for path in text or ()]
    config, tokenizer = describe(model)
    check_config(config)
    own_config = config.get_text_config(decoder=True)
    if not texts:
        sizes = [parse_length(x) for x in lengths.split(",")]
        check_lengths(sizes, own_config)  # before they are written
        texts = _generated(tasks.split(","), sizes, samples, seed, tokenizer)
    prompts = [tokenizer(own, return_tensors="pt").input_ids for own in texts]
    check_lengths([ids.shape[1] for ids in prompts], own_config)
    llm = load(model)
    passes = len(prompts) * own_config.num_hidden_layers
    with bar("search, layer", passes, quiet=quiet or as_json) as advance:
        found = find(
            llm,
            prompts,
            settings,
            model_name=name or model,
            state=out.with_name(f".{out.name}.partial"),
            on_layer=lambda number, layer: advance(),
            on_found=lambda found: found.patterns.save(out),
        )
    written = write_extras(found, out, card, plots)
    result = summary(found) | {"file": str(out), **written}
    told = "".join(f"\n  {kind}: {path}" for kind, path in written.items())
    typer.echo(json.dumps(result) if as_json else f"{out}: {report(found)}{told}")


def describe(model: str) -> tuple[Any, Any]:
    """The configuration and the tokenizer of a model, without its weights.

    Raises:
        ValueError: there is no such model.
    """
    from minference.integrations.transformers.load import load_config, load_tokenizer

    return load_config(model), load_tokenizer(model)


def load(model: str) -> Any:  # noqa: ANN401
    """The model with its weights, where it will run."""
    from minference.integrations.transformers.load import load as load_now

    return load_now(model)[0]


def write_extras(found: Found, out: Path, card: Path | None, plots: Path | None) -> dict[str, str]:
    """Writes the plots and the card that were asked for; their paths by name."""
    from minference.json_files import write_text
    from minference.search.card import model_card

    written: dict[str, str] = {}
    if plots is not None:
        from minference.search.plots import head_map, recall
        from minference.viz.pictures import save_figure

        for key, draw, file in (("head_map", head_map, HEAD_MAP), ("recall", recall, RECALL)):
            save_figure(draw(found), plots / file)
            written[key] = str(plots / file)
    if card is not None:
        pictures = tuple(os.path.relpath(path, card.parent) for path in written.values())
        write_text(card, model_card(found, out.name, pictures))
        written["card"] = str(card)
    return written


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--text {str(path)!r} cannot be read as text: {error}") from error


def _generated(
    tasks: list[str],
    lengths: list[int],
    samples: int,
    seed: int,
    tokenizer: Any,  # noqa: ANN401
) -> list[str]:
    """Prompts of the split to tune on, their lengths in the model's tokens."""
    from minference.eval.runner import Subject
    from minference.eval.tasks import make_sample

    measure = Subject("", None, tokenizer).measure()
    return [
        make_sample(task, length, seed + number, "dev", measure=measure).text(0)
        for task in tasks
        for length in lengths
        for number in range(samples)
    ]
