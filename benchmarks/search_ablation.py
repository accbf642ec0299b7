"""What search brings: searched tables beside tables of one kind and the uniform one, at the same
kernel cost, by kept mass and output score on held-out prompts.

python benchmarks/search_ablation.py --length 32k --tables out/tables \
  --out benchmarks/results/search_ablation.jsonl

A table of one kind is searched too: each head has the best candidate of that kind. Records hold the
difference of each table to the searched one of the same objective, with its standard error over the
held-out prompts, and the time of a layer where there is a GPU.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from minference.bench.records import Recorder
from minference.bench.timing import measure
from minference.eval.tasks import make_sample
from minference.integrations.transformers.load import load
from minference.json_files import write_text
from minference.lengths import length_argument
from minference.methods.base import Context
from minference.methods.minference import MInference
from minference.ops.attention.api import sparse_attention
from minference.patterns import BUDGET_LENGTH, AShape, BlockSparse, Pattern, VerticalSlash
from minference.search.card import model_card
from minference.search.cost import CostModel
from minference.search.found import Found, choose
from minference.search.progress import Scores
from minference.search.score import OBJECTIVES, Call, LayerScorer, score_layer
from minference.search.search import Settings, cost_of, observe_layers
from minference.search.space import TARGET, equalised

KINDS: dict[str, type] = {
    "a_shape": AShape,
    "vertical_slash": VerticalSlash,
    "block_sparse": BlockSparse,
}
UNIFORM = VerticalSlash(1000, 6096)


def main() -> None:
    """Searches on prompts of the development split, then scores every table on held-out ones."""
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("--model", default="models/needle")
    given.add_argument("--length", type=length_argument, default=8192)
    given.add_argument(
        "--tasks",
        nargs="+",
        default=["single", "multikey", "key_value", "multivalue", "needle_lines"],
    )
    given.add_argument("--samples", type=int, default=2, help="search prompts of each task")
    given.add_argument("--held-out", type=int, default=4, help="held-out prompts of each task")
    given.add_argument("--seed", type=int, default=0, help="first seed of the search prompts")
    given.add_argument("--space", default="wide")
    given.add_argument("--rows", type=int, default=64)
    given.add_argument("--share", type=float, default=0.04, help="of the keys that a row computes")
    given.add_argument("--cost", default="auto")
    given.add_argument("--tables", type=Path, default=None, help="folder to write the tables to")
    given.add_argument("--out", type=Path, default=None)
    options = given.parse_args()
    llm, tokenizer = load(options.model)

    def prompts(split: str, seed: int, count: int) -> list[Tensor]:
        return [
            tokenizer(
                make_sample(task, options.length, seed + n, split).text(0),  # type: ignore[arg-type]
                return_tensors="pt",
            ).input_ids
            for task in options.tasks
            for n in range(count)
        ]

    goal = AShape(TARGET.sink, round(options.share * BUDGET_LENGTH) - TARGET.sink)
    settings = Settings(space=options.space, rows=options.rows, cost=options.cost, target=goal)
    cost = cost_of(llm, settings)
    candidates = settings.candidates(cost, options.length)
    target = cost.row_cost(goal, BUDGET_LENGTH)
    (uniform,) = equalised([UNIFORM], target, cost, options.length)
    found = search_tables(
        llm,
        prompts("dev", options.seed, options.samples),
        (*candidates, uniform),
        settings,
        cost,
        options.model,
    )
    print(f"searched {len(found)} tables", flush=True)
    held_out = prompts("heldout", 0, options.held_out)
    scored = scores_of(llm, held_out, found, settings.rows)
    times = layer_times(llm, held_out[0], found)
    recorder = Recorder(options.out)
    for name, own in found.items():
        if options.tables is not None:
            own.patterns.save(options.tables / f"{name}.json")
            write_text(options.tables / f"{name}.md", model_card(own, f"{name}.json"))
        row_costs = [
            cost.row_cost(p.served(options.length), options.length) for row in own.rows for p in row
        ]
        record: dict[str, object] = {"op": "search_ablation", "table": name}
        for objective in OBJECTIVES:
            base = scored[f"searched_{objective}"][objective]
            difference = base - scored[name][objective]
            record[objective] = float(scored[name][objective].mean())
            record[f"{objective}_behind_searched"] = float(difference.mean())
            error = difference.std() / math.sqrt(len(difference))
            record[f"{objective}_standard_error"] = float(error)
        record |= {"row_cost": sum(row_costs) / len(row_costs), "layer_ms": times.get(name)}
        record |= {"density": own.density(options.length), "stability": own.stability.same}
        kinds = [p.kind for row in own.rows for p in row]
        record |= {"kinds": {kind: kinds.count(kind) for kind in sorted(set(kinds))}}
        record |= {"model": options.model, "length": options.length, "tasks": options.tasks}
        record["share"] = options.share
        record |= {"search_prompts": len(own.lengths), "held_out_prompts": len(held_out)}
        record |= {"space": options.space, "rows": options.rows, "cost": cost.describe()}
        recorder.write(record | {"search_seed": options.seed})
        print(
            f"{name:22} mass {record['mass']:.4f}, output {record['output']:.4f}, "
            f"density {record['density']:.4f}, layer {record['layer_ms']} ms"
        )


def search_tables(
    llm: object,
    prompts: Sequence[Tensor],
    candidates: Sequence[Pattern],
    settings: Settings,
    cost: CostModel,
    model: str,
) -> dict[str, Found]:
    """Tables by name, all chosen from one scoring; the last candidate is the uniform table's."""
    scores: dict[str, Scores] = {}
    for number, ids in enumerate(prompts):

        def score(context: Context, q: Tensor, k: Tensor, v: Tensor, number: int = number) -> None:
            own = score_layer(Call(q, k, v, context), candidates, rows=settings.rows)
            scores[f"{number}/{context.layer}"] = {n: x.tolist() for n, x in own.items()}

        observe_layers(llm, ids, score)  # type: ignore[arg-type]
    config = llm.config.get_text_config(decoder=True)  # type: ignore[attr-defined]
    lengths = tuple(ids.shape[1] for ids in prompts)

    def chosen(places: list[int], objective: str) -> Found:
        part = {
            key: {n: [rows[place] for place in places] for n, rows in own.items()}
            for key, own in scores.items()
        }
        return choose(
            [candidates[place] for place in places],
            part,
            objective=objective,
            space=settings.space,
            lengths=lengths,
            cost=cost,
            config=config,
            model_name=model,
        )

    last = len(candidates) - 1
    tables = {f"searched_{name}": chosen(list(range(last)), name) for name in OBJECTIVES}
    tables["uniform"] = chosen([last], "mass")
    for kind, cls in KINDS.items():
        places = [n for n in range(last) if isinstance(candidates[n], cls)]
        for objective in OBJECTIVES:
            tables[f"{kind}_{objective}"] = chosen(places, objective)
    return tables


def scores_of(
    llm: object, prompts: Sequence[Tensor], found: dict[str, Found], rows: int
) -> dict[str, dict[str, Tensor]]:
    """Mean over layers and heads of each prompt, by table and objective."""
    taken = {name: {objective: [] for objective in OBJECTIVES} for name in found}
    for ids in prompts:
        sums = {name: {objective: [] for objective in OBJECTIVES} for name in found}

        def score(context: Context, q: Tensor, k: Tensor, v: Tensor, sums: dict = sums) -> None:
            scorer = LayerScorer(Call(q, k, v, context), rows)
            for name, own in found.items():
                for objective, values in scorer.scores(own.patterns[context.layer]).items():
                    sums[name][objective].append(values)

        observe_layers(llm, ids, score)  # type: ignore[arg-type]
        for name, own in sums.items():
            for objective, values in own.items():
                taken[name][objective].append(float(torch.cat(values).mean()))
    return {
        name: {objective: torch.tensor(values) for objective, values in own.items()}
        for name, own in taken.items()
    }


def layer_times(llm: object, ids: Tensor, found: dict[str, Found]) -> dict[str, float]:
    """Milliseconds of a layer's attention kernel, mean of the layers; nothing on the CPU."""
    if llm.device.type != "cuda":  # type: ignore[attr-defined]
        return {}
    taken: dict[str, list[float]] = {name: [] for name in found}

    def time(context: Context, q: Tensor, k: Tensor, v: Tensor) -> None:
        for name, own in found.items():
            method = MInference(patterns=own.patterns, budget_length=BUDGET_LENGTH)
            index = method.build_index(q, k, context)
            if index is not None:

                def attend(index=index) -> Tensor:  # noqa: ANN001
                    return sparse_attention(q, k, v, index, scale=context.scale)

                taken[name].append(measure(attend, q.device, calls=5).ms_p50)

    observe_layers(llm, ids, time)  # type: ignore[arg-type]
    return {name: sum(values) / len(values) for name, values in taken.items()}


if __name__ == "__main__":
    main()
