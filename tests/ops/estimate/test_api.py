"""The last-query estimate against one softmax over the whole score matrix."""

import pytest
import torch

from minference.index import BLOCK, TILE
from minference.ops.estimate.api import last_query_lines, last_query_masses
from minference.ops.estimate.reference import distances_to_offsets
from minference.testing import layout_of, random_qkv


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize(("q_len", "kv_len"), [(300, 300), (64, 65), (10, 300), (1, 1), (129, 300)])
def test_lines_are_sums_of_the_softmax(q_len: int, kv_len: int, impl: str) -> None:
    q, k, _ = random_qkv(4, 2, q_len, kv_len)
    layout = layout_of(q, k)
    columns, slashes = last_query_lines(q, k, layout.first, layout.stop, impl=impl)
    rows = torch.arange(max(kv_len - 64, kv_len - q_len), kv_len)
    keys = k.repeat_interleave(2, 1)
    scores = q[:, :, -len(rows) :] @ keys.transpose(-1, -2) * q.shape[-1] ** -0.5
    distance = rows[:, None] - torch.arange(kv_len)
    weights = scores.masked_fill(distance < 0, -torch.inf).softmax(dim=-1)
    torch.testing.assert_close(columns, weights.sum(dim=2))
    expected = torch.zeros_like(slashes)
    for d in range(kv_len):
        expected[..., d] = (weights * (distance == d)).sum(dim=(2, 3))
    torch.testing.assert_close(slashes, expected)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_torch_matches_reference_when_padded(softcap: float) -> None:
    q, k, _ = random_qkv(4, 2, 150, 300, batch=3)
    layout = layout_of(q, k, left_padding=(0, 37, 290), right_padding=(0, 5, 0))
    args = (q, k, layout.first, layout.stop)
    expected = last_query_masses(*args, softcap=softcap, impl="reference")
    for got, want in zip(
        last_query_masses(*args, softcap=softcap, impl="torch"), expected, strict=True
    ):
        torch.testing.assert_close(got, want)


def test_an_unknown_implementation_is_refused() -> None:
    q, k, _ = random_qkv(2, 1, 100)
    layout = layout_of(q, k)
    with pytest.raises(ValueError, match="unknown impl 'foo'"):
        last_query_lines(q, k, layout.first, layout.stop, impl="foo")


def test_offset_masses_count_the_pairs_of_each_block() -> None:
    slashes = torch.rand(1, 1, 300)
    masses = distances_to_offsets(slashes)[0, 0]
    tile = 40
    expected = torch.zeros_like(masses, dtype=torch.float64)
    for s in range(300):
        for row in range(TILE):
            block = (tile * TILE + row - s) // BLOCK
            expected[2 * tile - block + 1] += slashes[0, 0, s].double() / TILE
    torch.testing.assert_close(masses.double(), expected, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(masses.sum(), slashes.sum())
