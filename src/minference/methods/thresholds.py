"""From which length and work on a method is worth its index, by device. Floor 3."""

import math

from minference.lengths import causal_pairs
from minference.methods.base import Method

CPU_TOKENS = 4096
"""On two cores the shipped model's first token came 1.1 to 1.5 times sooner just above it:
benchmarks/results/cpu_threshold.jsonl."""
CUDA_TOKENS = 16384
CUDA_TOKENS_PER_KEY = 1.8
"""On an H100, index and kernel of a layer beat FA3 from 16K tokens on where the budgets can buy at
most 80 % of the causal area, which is when the context has 1.8 times the keys of a row:
benchmarks/results/break_even_h100.jsonl, random values, so that nothing helps."""
COUNTED_DIM = 128
"""With wider heads an index takes longer, as dense attention does: at 16K tokens 16 heads of 256
have the work of 32 of 128, and `grouped` was slower (benchmarks/results/small_calls_h100.jsonl)."""


def min_seq_len(method: Method, device_type: str) -> int:
    """Context length below which the dense kernel serves: the method's own, else the device's."""
    if method.min_seq_len is not None:
        return method.min_seq_len
    if device_type != "cuda":
        return max(CPU_TOKENS, method.cpu_tokens)
    bought = math.ceil(CUDA_TOKENS_PER_KEY * (method.keys_per_row() or 0))
    return max(CUDA_TOKENS, bought)


def min_work(method: Method, device_type: str) -> int:
    """Work of a call, as `work` counts it, below which the dense kernel serves: what an index costs
    however few heads and queries there are. 0 on a CPU, and where the method has a length."""
    return 0 if method.min_seq_len is not None or device_type != "cuda" else method.cuda_work


def work(queries: int, context: int, heads: int, dim: int) -> float:
    """Pairs of a query and a key that it sees, times the query heads of all batch rows, times their
    dimension, of which `COUNTED_DIM` counts. Dense attention takes four operations for each."""
    return causal_pairs(queries, context) * heads * min(dim, COUNTED_DIM)


def most_share(keys: float, tokens: int) -> float:
    """Share of the causal area at most, where a row attends to at most `keys` keys on average."""
    return 1 - (1 - min(1.0, keys / tokens)) ** 2
