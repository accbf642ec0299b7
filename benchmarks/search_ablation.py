"""What search brings: the searched table beside tables of one kind and the uniform one, all at the
same cost, by kept mass and output score on held-out prompts.

python benchmarks/search_ablation.py --out benchmarks/results/search_ablation.jsonl
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from minference.bench.records import Recorder
from minference.cli.subject import load
from minference.eval.tasks import make_sample
from minference.lengths import parse_length
from minference.methods.base import Context
from minference.patterns import AShape, BlockSparse, Pattern, VerticalSlash
from minference.search.score import OBJECTIVES, Call, LayerScorer
from minference.search.search import Settings, observe_layers, search
from minference.search.space import BASIS, TARGET, equalised

SEARCH_SEED, HELD_OUT_SEED = 1000, 0
Rows = list[list[Pattern]]


def main() -> None:
    """Searches on its own seeds, then scores every table on the others."""
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("--model", default="models/needle")
    given.add_argument("--length", type=parse_length, default=8192)
    given.add_argument("--tasks", nargs="+", default=["key_value", "multikey"])
    given.add_argument("--space", default="wide")
    given.add_argument("--rows", type=int, default=64)
    given.add_argument("--out", type=Path, default=None)
    options = given.parse_args()
    llm, tokenizer = load(options.model)

    def prompts(seed: int) -> list[Tensor]:
        texts = [make_sample(task, options.length, seed).text(0) for task in options.tasks]
        return [tokenizer(text, return_tensors="pt").input_ids for text in texts]

    settings = Settings(space=options.space, rows=options.rows)
    found = search(llm, prompts(SEARCH_SEED), settings)
    cost = settings.cost.row_cost(TARGET, BASIS)
    (uniform,) = equalised([VerticalSlash(1000, 6096)], cost, settings.cost)
    layers, heads = found.patterns.shape
    tables: dict[str, list[Rows]] = {
        "searched": [[list(row) for row in found.patterns.patterns]],
        "uniform": [[[uniform] * heads for _ in range(layers)]],
    }
    for name, kind in (
        ("a_shape", AShape),
        ("vertical_slash", VerticalSlash),
        ("block_sparse", BlockSparse),
    ):
        tables[name] = [
            [[one] * heads for _ in range(layers)]
            for one in settings.candidates()
            if isinstance(one, kind)
        ]
    recorder = Recorder(options.out)
    # of the tables of one kind the best on the held-out prompts counts, in their favour
    for name, members in tables.items():
        best = dict.fromkeys(OBJECTIVES, 0.0)
        for rows in members:
            for objective, value in mean_scores(
                llm, prompts(HELD_OUT_SEED), rows, settings
            ).items():
                best[objective] = max(best[objective], value)
        density = found.density(settings.cost, options.length)
        record = {"op": "search_ablation", "table": name, "members": len(members), **best}
        record |= {"model": options.model, "length": options.length, "tasks": options.tasks}
        record |= {"space": options.space, "row_cost_at_basis": cost, "search_density": density}
        recorder.write(record | {"search_seed": SEARCH_SEED, "held_out_seed": HELD_OUT_SEED})
        print(f"{name:15} kept mass {best['mass']:.4f}, output score {best['output']:.4f}")


def mean_scores(
    llm: object, prompts: list[Tensor], rows: Rows, settings: Settings
) -> dict[str, float]:
    """Mean over prompts, layers and heads, by objective."""
    sums: dict[str, list[Tensor]] = {objective: [] for objective in OBJECTIVES}

    def score(context: Context, q: Tensor, k: Tensor, v: Tensor) -> None:
        scorer = LayerScorer(Call(q, k, v, context), settings.rows)
        for objective, values in scorer.scores(rows[context.layer]).items():
            sums[objective].append(values)

    for ids in prompts:
        observe_layers(llm, ids, score)  # type: ignore[arg-type]
    return {objective: float(torch.cat(values).mean()) for objective, values in sums.items()}


if __name__ == "__main__":
    main()
