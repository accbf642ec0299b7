"""FlexPrefill and XAttention on a GPU: the CPU's choice of tiles, attended to rightly."""

import pytest
import torch

from minference.bench.attention import GATE, gate_error
from minference.methods import FlexPrefill, Method, XAttention
from minference.ops.attention.api import sparse_attention
from minference.testing import Lines, context_for, layout_of, planted_qkv

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    "method",
    [
        XAttention(threshold=0.6),
        XAttention(stride=16),
        FlexPrefill(min_budget=0),
        FlexPrefill(gamma=0.6, tau=2.0, min_budget=0),
    ],
    ids=str,
)
def test_tiles_are_those_of_the_cpu(method: Method) -> None:
    lines = [Lines(torch.tensor([70 * h, 3000]), torch.arange(4)) for h in range(1, 5)]
    qkv = planted_qkv(lines, 4096, kv_heads=2, dim=128, dtype=torch.bfloat16)
    indices = []
    for device in ("cpu", "cuda"):
        q, k, v = (x.to(device) for x in qkv)
        index = method.build_index(q, k, context_for(layout_of(q, k), 4, dim=128))
        assert index is not None
        indices.append(index)
        if device == "cuda":
            out = sparse_attention(q, k, v, index)
            assert gate_error(q, k, v, out, index) <= GATE[torch.bfloat16]
    here, there = (index.head_density() for index in indices)
    # bfloat16 products round differently: a tile at the edge of the share may change sides
    torch.testing.assert_close(here, there, atol=0.02, rtol=0)
