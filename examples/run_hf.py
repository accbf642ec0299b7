"""The published call: a transformers pipeline answers from a long prompt, prefilled sparsely.

python examples/run_hf.py                       # the shipped model, 4K tokens, on any machine
python examples/run_hf.py MODEL --tokens 131072
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from transformers import pipeline

from minference import MInference
from minference.eval.runner import measure_of
from minference.eval.tasks import make_sample

SHIPPED = Path(__file__).parents[1] / "models" / "needle"


def main(arguments: list[str] | None = None) -> str:
    """Asks for one of the facts hidden in the prompt, and returns the answer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default=str(SHIPPED))
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    pipe = pipeline("text-generation", model=options.model)
    measure = measure_of(pipe.tokenizer)
    sample = make_sample("multikey", options.tokens, options.seed, measure=measure)
    prompt, expected = sample.text(0), sample.questions[0].answer

    # published budgets are meant for 128K tokens: in proportion for less, and from 2K tokens on
    patch = MInference("minference", options.model, min_seq_len=2048, budget_length=131_072)
    pipe.model = patch(pipe.model)

    begin = time.perf_counter()
    out = pipe(prompt, max_new_tokens=12, return_full_text=False)
    answer = out[0]["generated_text"].strip()
    print(f"{options.tokens} tokens, {time.perf_counter() - begin:.1f} s")
    print(f"answer {answer!r}, expected {expected!r}")
    pipe.model.minference.detach()
    return answer


if __name__ == "__main__":
    main()
