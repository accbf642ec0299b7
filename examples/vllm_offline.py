"""Serve long prompts of a `vllm.LLM` sparsely, and compare with its own attention.

python examples/vllm_offline.py models/needle --tokens 16384
python examples/vllm_offline.py Qwen/Qwen2.5-7B-Instruct-1M --tokens 131072 --tp 2
"""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from minference.eval.tasks import make_sample
from minference.integrations.vllm import attach_llm

if TYPE_CHECKING:
    from vllm import LLM


def answer(llm: LLM, prompt: str) -> tuple[str, float]:
    """The greedy answer, and the seconds it took."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=24)
    start = time.perf_counter()
    result = llm.generate([prompt], params, use_tqdm=False)[0]
    return result.outputs[0].text, time.perf_counter() - start


def main() -> None:
    """Asks one question about a long text, dense and sparse."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--memory", type=float, default=0.5, help="share of the memory to take")
    args = parser.parse_args()

    from vllm import LLM

    llm = LLM(
        args.model,
        max_num_seqs=1,
        enforce_eager=True,
        max_model_len=args.tokens + 1024,
        tensor_parallel_size=args.tp,
        gpu_memory_utilization=args.memory,
    )
    encode = llm.get_tokenizer().encode
    sample = make_sample("single", args.tokens, 0, measure=lambda text: len(encode(text)))
    print("dense ", *answer(llm, sample.text(0)))
    # patterns are meant for some length; shorter prompts get budgets in proportion
    with attach_llm(llm, "minference", min_seq_len=4096, budget_length=131_072) as handle:
        print("sparse", *answer(llm, sample.text(0)))
        print("density", [worker["density"] for worker in handle.stats()])
    print("right  ", sample.questions[0].answer)


if __name__ == "__main__":
    main()
