"""The fast density against the index's own count."""

import pytest
import torch

from minference.eval.density import Recorder, head_density
from minference.head_patterns import default_patterns
from minference.methods import AShape, Dense, Dilated1, MInference, TriShape
from minference.methods.base import Method
from minference.patterns import BlockSparse, VerticalSlash
from minference.testing import context_for, layout_of, random_qkv

METHODS = [
    AShape(sink=70, local=100),
    TriShape(sink=70, local=100, last=30),
    Dilated1(),
    MInference(patterns=default_patterns(1, 4, VerticalSlash(40, 60))),
    MInference(patterns=default_patterns(1, 4, BlockSparse(3))),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: repr(method)[:20])
@pytest.mark.parametrize(("rows", "length"), [(700, 700), (129, 700), (1, 65)])
def test_head_density_counts_what_the_index_counts(method: Method, rows: int, length: int) -> None:
    q, k, _ = random_qkv(4, 2, length)
    q = q[:, :, -rows:]
    index = method.build_index(q, k, context_for(layout_of(q, k, left_padding=(3,)), 4))
    assert index is not None
    assert torch.allclose(head_density(index), index.head_density())


def test_a_dense_method_is_caught() -> None:
    q, k, _ = random_qkv(4, 2, 300)
    recorder = Recorder.around(Dense())
    recorder.build_index(q, k, context_for(layout_of(q, k), 4))
    assert recorder.densities(2) == [1.0, 1.0]
