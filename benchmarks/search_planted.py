"""Whether search finds the kind that was planted: heads of each kind at several noise levels, and
heads that are none of them grown to a recall.

python benchmarks/search_planted.py --length 16k --heads 50 \
  --out benchmarks/results/search_planted.jsonl
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from minference.bench.records import Recorder
from minference.lengths import length_argument
from minference.patterns import BUDGET_LENGTH, AShape, BlockSparse, Dense, VerticalSlash
from minference.search.cost import CostModel
from minference.search.grow import grow_to_recall
from minference.search.planted import PLANTS, Qkv, even_heads
from minference.search.score import Call, score_layer
from minference.search.space import equalised
from minference.testing import context_for, default_device, layout_of

SPACE = (AShape(64, 4096), VerticalSlash(2000, 1000), BlockSparse(80))


def main() -> None:
    """One record a kind and noise level, and one a noise level for the heads of no kind."""
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("--length", type=length_argument, default=4096)
    given.add_argument("--heads", type=int, default=50, help="of each kind and noise level")
    given.add_argument("--at-once", type=int, default=10, help="heads of a layer")
    given.add_argument("--noise", type=float, nargs="+", default=[0.1, 0.3, 0.6])
    given.add_argument("--share", type=float, default=1 / 8, help="of the keys that a row computes")
    given.add_argument("--recall", type=float, default=0.9)
    given.add_argument("--rows", type=int, default=48)
    given.add_argument("--seed", type=int, default=100)
    given.add_argument("--out", type=Path, default=None)
    options = given.parse_args()
    device, recorder = default_device(), Recorder(options.out)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    cost, length = CostModel(), options.length
    reach = int(options.share * length)
    candidates = equalised(SPACE, options.share * BUDGET_LENGTH, cost, length)
    own = {"length": length, "rows": options.rows, "row_cost": reach, "dtype": str(dtype)}
    own["candidates"] = [str(p.served(length)) for p in candidates]

    def call_of(qkv: Qkv) -> Call:
        q, k, v = (x.to(device, dtype) for x in qkv)
        layout = layout_of(q[:, :1, :, :1], k[:, :1, :, :1])
        return Call(q, k, v, context_for(layout, q.shape[1], dim=q.shape[-1]))

    layers = -(-options.heads // options.at_once)
    for noise in options.noise:
        for kind, plant in PLANTS.items():
            found: dict[str, list[str]] = {}
            margins: dict[str, list[float]] = {}
            for layer in range(layers):
                seed = options.seed + 1000 * layer
                call = call_of(plant(options.at_once, length, reach, noise, seed))
                for name, scores in score_layer(call, candidates, rows=options.rows).items():
                    best = scores.argmax(dim=0).tolist()
                    found.setdefault(name, []).extend(candidates[c].kind for c in best)
                    top = scores.sort(dim=0, descending=True).values
                    margins.setdefault(name, []).extend((top[0] - top[1]).tolist())
            for name, kinds in found.items():
                record = {"op": "search_planted", "planted": kind, "noise": noise, **own}
                record |= {"objective": name, "heads": len(kinds), "found": kinds.count(kind)}
                record |= {"least_margin": min(margins[name]), "seed": options.seed}
                recorder.write(record)
                print(f"{kind} at noise {noise}, {name}: {kinds.count(kind)} of {len(kinds)}")
        masses, dense = [], 0
        for layer in range(layers):
            call = call_of(even_heads(options.at_once, length, reach, noise, options.seed + layer))
            start = [candidates[h % len(candidates)] for h in range(options.at_once)]
            grown, mass = grow_to_recall(call, start, options.recall, cost, rows=options.rows)
            masses += mass
            dense += grown.count(Dense())
        record = {"op": "search_planted", "planted": "none", "noise": noise, **own}
        record |= {"heads": len(masses), "recall": options.recall, "least_mass": min(masses)}
        recorder.write(record | {"dense": dense, "seed": options.seed})
        print(f"none at noise {noise}: least mass {min(masses):.3f}, {dense} heads dense")


if __name__ == "__main__":
    main()
