"""What `make run` does, for several seeds: time to first token, dense and sparse, and the answers.

python benchmarks/first_token_cpu.py --out benchmarks/results/first_token_cpu.jsonl
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from minference.bench.records import Recorder
from minference.eval import side_by_side
from minference.eval.runner import Subject
from minference.integrations.transformers.load import load
from minference.lengths import length_argument
from minference.methods.spec import build_method, parse_method

NEW_TOKENS = 24


def main() -> None:
    """One record a seed, as it comes."""
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("--model", default="models/needle")
    given.add_argument("--tokens", type=length_argument, default=16384)
    given.add_argument("--method", default="minference:budget_length=262144")
    given.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    given.add_argument("--out", type=Path, default=None)
    options = given.parse_args()
    recorder = Recorder(options.out)
    subject = Subject(options.model, *load(options.model))
    method = build_method(parse_method(options.method), subject.model.config)
    for seed in options.seeds:
        prompt = side_by_side.hidden_fact(subject, options.tokens, seed)
        ids = side_by_side.encode(subject, prompt.text)
        dense_side = side_by_side.answer_densely(subject, ids, NEW_TOKENS)
        sparse_side, _ = side_by_side.answer_sparsely(subject, ids, NEW_TOKENS, method)
        result = {"op": "first_token", "model": options.model, "method": options.method}
        result |= {"seed": seed, "tokens": ids.shape[1], "expected": prompt.expected}
        result |= {"dense": dense_side.to_dict(), "sparse": sparse_side.to_dict()}
        result |= side_by_side.compare(dense_side, sparse_side)
        recorder.write({**result, "load_average": round(os.getloadavg()[0], 2)})
        dense, sparse = result["dense"], result["sparse"]
        print(
            f"seed {seed}: dense {dense['seconds']:.1f} s, sparse {sparse['seconds']:.1f} s, "
            f"{result['speedup']:.2f} times, density {sparse['density']:.3f}, "
            f"{'same' if result['same_answer'] else 'DIFFERENT'} answer, "
            f"{'right' if sparse['answer'] == result['expected'] else 'wrong'}"
        )


if __name__ == "__main__":
    main()
