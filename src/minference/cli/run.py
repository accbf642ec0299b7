"""`minference run`: a model answers from a long prompt, sparse and, if asked, dense beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from minference.cli import subject as given
from minference.cli.outputs import check_picture
from minference.cli.progress import layer_progress

app = typer.Typer(add_completion=False)
NOTHING_LEFT_OUT = (
    "nothing was left out: too little work for the method here (min_seq_len=0 serves any prompt), "
    "or budgets that cover it"
)


@app.command()
def run(
    model: str = typer.Argument(help="Hub id or path of a transformers model."),
    prompt: given.Text = None,
    file: given.File = None,
    demo_facts: given.DemoFacts = False,
    tokens: given.Tokens = "16k",
    seed: given.Seed = 0,
    method: Annotated[
        str | None,
        typer.Option(help="One of `minference ls`; without it grouped on a GPU, else minference."),
    ] = None,
    compare: bool = typer.Option(False, help="Run dense attention as well."),
    max_new_tokens: int = typer.Option(24, min=1, help="Length of an answer."),
    plot: Annotated[
        Path | None, typer.Option(help="PNG of a head's attention and the tiles computed.")
    ] = None,
    layer: given.Layer = 0,
    head: given.Head = 0,
    as_json: given.AsJson = False,
    quiet: given.Quiet = False,
) -> None:
    """Prefill a long prompt sparsely, answer, and tell times and density."""
    from minference.eval import side_by_side
    from minference.methods.spec import build_method, parse_method
    from minference.viz.probe import Probe

    if plot is not None:
        check_picture(plot)
    text = given.text(prompt, file, demo_facts)
    method = given.default_method() if method is None else method
    spec = parse_method(method)
    quiet = quiet or as_json
    config = given.load_config(model)
    given.check_prompt(config, text, tokens)
    spec = given.with_own_patterns(spec, model, quiet=quiet)
    chosen = build_method(spec, config)
    probe = Probe.of(config, layer, head) if plot else None
    subject = given.load_subject(model, quiet=quiet)
    asked = given.prompt_for(subject, text, tokens, seed)
    ids = side_by_side.encode(subject, asked.text, room=max_new_tokens)
    result: dict[str, Any] = {"method": method}
    dense = None
    if compare:
        with layer_progress(subject.model, "dense", quiet=quiet):
            dense = side_by_side.answer_densely(subject, ids, max_new_tokens)
        result["dense"] = dense.to_dict()
    with layer_progress(subject.model, "sparse", quiet=quiet):
        sparse, handle = side_by_side.answer_sparsely(subject, ids, max_new_tokens, chosen, probe)
    result["sparse"] = sparse.to_dict()
    if dense is not None:
        result |= side_by_side.compare(dense, sparse)
    if plot is not None and probe is not None:
        result["plot"] = str(plot) if probe.seen else None
    result |= {"model": model, "tokens": ids.shape[1], "expected": asked.expected, "seed": seed}
    result["patterns"] = dict(spec.options).get("patterns")
    typer.echo(json.dumps(result) if as_json else report(result))
    if plot is not None and probe is not None:
        probe.save(handle, plot)  # after the answers, which no error shall lose


def report(result: dict[str, Any]) -> str:
    """The result as lines for people."""
    lines = [f"{result['model']}: {result['tokens']} tokens, {result['method']}"]
    for name in ("dense", "sparse"):
        if name in result:
            own = result[name]
            density = f", density {own['density']:.3f}" if "density" in own else ""
            lines.append(f"  {name:6} first token {own['seconds']:.2f} s{density}")
            lines.append(f"         answer {own['answer']!r}")
            if own.get("density") == 1:
                lines.append(f"         {NOTHING_LEFT_OUT}")
    if result["expected"] is not None:
        lines.append(f"  expected       {result['expected']!r}")
    if "speedup" in result:
        lines.append(
            f"  first token {result['speedup']:.2f} times sooner, same answer: "
            f"{'yes' if result['same_answer'] else 'NO'}, largest difference of the first logits "
            f"{result['max_logit_difference']:.3g}"
        )
    if result.get("plot"):
        lines.append(f"  picture        {result['plot']}")
    return "\n".join(lines)
