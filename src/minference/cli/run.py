"""`minference run`: a model answers from a long prompt, sparse and, if asked, dense beside it."""

from __future__ import annotations

import json
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minference.cli.progress import layer_progress
from minference.lengths import parse_length
from minference.methods.spec import build_method, parse_method

if TYPE_CHECKING:
    from minference.methods.base import Method
    from minference.viz.probe import Probe

app = typer.Typer(add_completion=False)


@app.command()
def run(
    model: str = typer.Argument(help="Hub id or path of a transformers model."),
    prompt: str | None = typer.Option(None, help="The prompt; stdin without it and --file."),
    file: Annotated[Path | None, typer.Option(help="File that holds the prompt.")] = None,
    demo_facts: bool = typer.Option(False, help="Hide facts in Python's documentation and ask."),
    tokens: str = typer.Option("16k", help="Length of the demo prompt, as 16384 or 16k."),
    seed: int = typer.Option(0, help="Facts, places and prose of the demo prompt."),
    method: str = typer.Option("minference", help="name:key=value,... of `minference ls`."),
    compare: bool = typer.Option(False, help="Run dense attention as well."),
    max_new_tokens: int = typer.Option(24, help="Length of an answer."),
    plot: Annotated[
        Path | None, typer.Option(help="PNG of a head's attention and the tiles computed.")
    ] = None,
    layer: int = typer.Option(0, help="Layer to plot."),
    head: int = typer.Option(0, help="Query head to plot."),
    as_json: bool = typer.Option(False, "--json", help="One JSON object on stdout."),
    quiet: bool = typer.Option(False, "--quiet", help="No progress lines."),
) -> None:
    """Prefill a long prompt sparsely, answer, and tell times and density."""
    if not as_json and not quiet:
        typer.echo(f"loading {model}", err=True)
    llm, tokenizer = load(model)
    expected = None
    if demo_facts:
        from minference.eval.tasks import make_sample

        sample = make_sample("multikey", parse_length(tokens), seed)
        text, expected = sample.text(0), sample.questions[0].answer
    else:
        text = prompt if prompt is not None else file.read_text() if file else sys.stdin.read()
    ids = tokenizer(text, return_tensors="pt").input_ids.to(llm.device)
    limit = getattr(llm.config, "max_position_embeddings", None)
    if limit is not None and ids.shape[1] + max_new_tokens > limit:
        raise ValueError(f"the prompt has {ids.shape[1]} tokens, the model takes {limit}; cut it")
    config = llm.config.get_text_config(decoder=True)
    chosen: Method = build_method(parse_method(method), llm.config)
    if plot is not None:
        chosen = probe(chosen, config, layer, head)
    task = Task(tokenizer, ids, max_new_tokens, quiet=as_json or quiet)
    result = {"method": method, **measure(llm, task, chosen, compare)}
    if plot is not None:
        result["plot"] = draw(chosen, plot)
    result |= {"model": model, "tokens": int(ids.shape[1]), "expected": expected, "seed": seed}
    typer.echo(json.dumps(result) if as_json else report(result))


def probe(method: Method, config: Any, layer: int, head: int) -> Probe:  # noqa: ANN401
    """The method, watched at the head to plot."""
    from minference.viz.probe import Probe

    for name, value, count in (
        ("layer", layer, config.num_hidden_layers),
        ("head", head, config.num_attention_heads),
    ):
        if not 0 <= value < count:
            raise ValueError(f"--{name} must be 0 to {count - 1} for this model, got {value}")
    return Probe(inner=method, layer=layer, head=head, min_seq_len=method.min_seq_len)


def draw(method: Method, path: Path) -> str:
    """Draws what the probe saw into a PNG; returns the file's name.

    Raises:
        ValueError: the head was served densely from the start, so that nothing was seen.
    """
    from minference.viz.attention_map import attention_figure, computed_cells, pooled_attention
    from minference.viz.probe import Probe

    assert isinstance(method, Probe)
    if not method.seen:
        raise ValueError(
            "nothing to plot: the prompt is shorter than the sparse method's threshold; use a "
            "longer prompt or --method name:min_seq_len=0"
        )
    seen = method.seen[0]
    weights = pooled_attention(seen.q, seen.k, scale=seen.scale, softcap=seen.softcap)
    computed = computed_cells(seen.index, method.head * seen.index.heads // seen.heads)
    title = f"layer {method.layer}, head {method.head}: {method.inner.name}"
    path.parent.mkdir(parents=True, exist_ok=True)
    attention_figure(weights, computed, length=len(seen.k), title=title).savefig(path, dpi=110)
    return str(path)


@dataclass(frozen=True)
class Task:
    """A prompt to answer: its tokens [1, L], and how long the answer may be."""

    tokenizer: Any
    ids: Any
    max_new_tokens: int
    quiet: bool


def measure(llm: Any, task: Task, method: Method, compare: bool) -> dict[str, Any]:  # noqa: ANN401
    """Answers, seconds to the first token and density, by attention; agreement of the logits."""
    import minference

    llm.set_attn_implementation("sdpa")
    result: dict[str, Any] = {}
    logits = {}
    for name in ("dense", "sparse") if compare else ("sparse",):
        handle = minference.attach(llm, method, record=True) if name == "sparse" else None
        scope: AbstractContextManager[Any] = handle or nullcontext()
        with scope, layer_progress(llm, name, quiet=task.quiet):
            own, logits[name] = _answer(llm, task)
        if handle is not None:
            own["layers"] = [round(r["density"], 4) for r in handle.records] or [1.0]
            own["density"] = sum(own["layers"]) / len(own["layers"])
        result[name] = own
    if compare:
        result["speedup"] = result["dense"]["seconds"] / result["sparse"]["seconds"]
        result["same_answer"] = result["dense"]["answer"] == result["sparse"]["answer"]
        result["max_logit_difference"] = float((logits["dense"] - logits["sparse"]).abs().max())
    return result


def report(result: dict[str, Any]) -> str:
    """The result as lines for people."""
    lines = [f"{result['model']}: {result['tokens']} tokens, {result['method']}"]
    for name in ("dense", "sparse"):
        if name in result:
            own = result[name]
            density = f", density {own['density']:.3f}" if "density" in own else ""
            lines.append(f"  {name:6} first token {own['seconds']:.2f} s{density}")
            lines.append(f"         answer {own['answer']!r}")
    if result["expected"] is not None:
        lines.append(f"  expected       {result['expected']!r}")
    if "speedup" in result:
        lines.append(
            f"  first token {result['speedup']:.2f} times sooner, same answer: "
            f"{'yes' if result['same_answer'] else 'NO'}, largest difference of the first logits "
            f"{result['max_logit_difference']:.3g}"
        )
    if "plot" in result:
        lines.append(f"  picture        {result['plot']}")
    return "\n".join(lines)


def load(name: str) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    llm: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    return llm.to(device).eval(), AutoTokenizer.from_pretrained(name)


def _answer(llm: Any, task: Task) -> tuple[dict[str, Any], Any]:  # noqa: ANN401
    import torch

    stops = llm.generation_config.eos_token_id
    stops = {stops} if isinstance(stops, int) else set(stops or ())
    with torch.inference_mode():
        begin = time.perf_counter()
        out = llm(task.ids, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1].argmax(dim=-1, keepdim=True)
        answer = [int(token)]
        seconds = time.perf_counter() - begin
        logits, cache = out.logits[:, -1].float(), out.past_key_values
        while len(answer) < task.max_new_tokens and answer[-1] not in stops:
            token = llm(token, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1, True)
            answer.append(int(token))
    text = task.tokenizer.decode(answer, skip_special_tokens=True)
    return {"seconds": seconds, "answer": text.split("\n")[0].strip()}, logits
