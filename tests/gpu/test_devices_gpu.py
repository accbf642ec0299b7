"""Tensors of another GPU than torch's current one, as layers of a model on several have them."""

import pytest
import torch

from minference.head_patterns import default_patterns
from minference.methods import Grouped, MInference
from minference.methods.base import Method
from minference.ops.attention.api import sparse_attention
from minference.testing import context_for, layout_of, random_qkv

pytestmark = pytest.mark.multi_gpu


METHODS = {"grouped": Grouped(), "minference": MInference(patterns=default_patterns(1, 8))}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_another_gpu_computes_the_same(method: Method) -> None:
    outputs = []
    for number in (0, 1):
        device = torch.device("cuda", number)
        made = random_qkv(8, 2, 20_000, dim=128, dtype=torch.bfloat16)
        q, k, v = (x.to(device) for x in made)
        index = method.build_index(q, k, context_for(layout_of(q, k), 8, dim=128))
        impls = ("auto", "triton")
        outputs += [sparse_attention(q, k, v, index, impl=impl).cpu() for impl in impls]
    assert torch.cuda.current_device() == 0
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[3])
