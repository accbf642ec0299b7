"""What `make run` does, for several seeds: time to first token, dense and sparse, and the answers.

python benchmarks/first_token_cpu.py --out benchmarks/results/first_token_cpu.jsonl
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from minference.bench.records import Recorder
from minference.cli.run import Task, load, measure
from minference.eval.tasks import make_sample
from minference.lengths import parse_length
from minference.methods.spec import build_method, parse_method


def main() -> None:
    """One record a seed, as it comes."""
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("--model", default="models/needle")
    given.add_argument("--tokens", type=parse_length, default=16384)
    given.add_argument("--method", default="minference:budget_length=262144")
    given.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    given.add_argument("--out", type=Path, default=None)
    options = given.parse_args()
    recorder = Recorder(options.out)
    llm, tokenizer = load(options.model)
    method = build_method(parse_method(options.method), llm.config)
    for seed in options.seeds:
        sample = make_sample("multikey", options.tokens, seed)
        ids = tokenizer(sample.text(0), return_tensors="pt").input_ids
        task = Task(tokenizer, ids, max_new_tokens=24, quiet=True)
        result = {"op": "first_token", "model": options.model, "method": options.method}
        result |= {"seed": seed, "tokens": ids.shape[1], "expected": sample.questions[0].answer}
        result |= measure(llm, task, method, compare=True)
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
