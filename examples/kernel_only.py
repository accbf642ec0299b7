"""Sparse attention on bare tensors, no model: the three published kernel functions, then an index
of one's own.

python examples/kernel_only.py
python examples/kernel_only.py --length 131072 --heads 32 --kv-heads 8 --dim 128   # on a GPU
"""

from __future__ import annotations

import argparse

import torch
from torch.nn.functional import scaled_dot_product_attention

import minference
from minference.ops.build import a_shape_index
from minference.testing import default_device, layout_of, planted_qkv, random_lines


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Returns each call's relative error against dense attention."""
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("--length", type=int, default=4096)
    given.add_argument("--heads", type=int, default=4)
    given.add_argument("--kv-heads", type=int, default=2)
    given.add_argument("--dim", type=int, default=64)
    sizes = given.parse_args(arguments)

    device = default_device()
    lines = [
        random_lines(sizes.length, columns=20, clusters=2, width=32, band=64, seed=h)
        for h in range(sizes.heads)
    ]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v = planted_qkv(
        lines, sizes.length, kv_heads=sizes.kv_heads, dim=sizes.dim, device=device, dtype=dtype
    )
    dense = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    budget = sizes.length // 16
    outputs = {
        "vertical-slash": minference.vertical_slash_sparse_attention(q, k, v, budget, budget),
        "block-sparse": minference.block_sparse_attention(q, k, v, topk=max(1, budget // 64)),
        "A-shape": minference.streaming_forward(q, k, v, 64, budget),
    }
    index = a_shape_index(layout_of(q, k), (64,) * sizes.heads, (budget,) * sizes.heads)
    print(index.describe())
    own = minference.sparse_attention(q, k, v, index)
    assert torch.equal(own, outputs["A-shape"])

    errors = {name: float((out - dense).norm() / dense.norm()) for name, out in outputs.items()}
    for name, error in errors.items():
        print(f"{name:15} differs from dense attention by {error:.4f}")
    return errors


if __name__ == "__main__":
    main()
