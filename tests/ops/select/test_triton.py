"""Selection in Triton against the reference, bit for bit."""

import pytest
import torch

from minference.index import Ragged
from minference.ops.select import reference
from minference.ops.select import triton as kernel

# Triton's interpreter turns one-element arrays into loop bounds
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")


def assert_same(got: Ragged, expected: Ragged) -> None:
    assert torch.equal(got.count.cpu(), expected.count.cpu())
    for b in range(got.count.shape[0]):
        for h in range(got.count.shape[1]):
            assert got.row(b, h).tolist() == expected.row(b, h).tolist()


def scores_of(kind: str, length: int, device: torch.device) -> torch.Tensor:
    if kind == "ties":
        return torch.randint(-1, 4, (2, 3, length), device=device).float()
    scores = torch.rand((2, 3, length), device=device) ** 8 * 1e-3
    scores[..., length * 3 // 4 :] = -1
    scores[0, 0, :5] = torch.tensor([0.0, -0.0, 1e-42, 64.0, torch.inf], device=device)[:length]
    return scores


@pytest.mark.parametrize("kind", ["ties", "spread"])
@pytest.mark.parametrize("length", [5, 300, 5000])
@pytest.mark.parametrize("sink", [0, 4])
@pytest.mark.usefixtures("nan_poison")
def test_columns_match_the_reference(
    length: int, kind: str, sink: int, device: torch.device
) -> None:
    scores = scores_of(kind, length, device)
    budgets = (0, length // 9, length + 5)
    assert_same(
        kernel.select_columns(scores, budgets, sink),
        reference.select_columns(scores, budgets, sink),
    )


@pytest.mark.parametrize("kind", ["ties", "spread"])
@pytest.mark.parametrize("slots", [4, 34, 3000])
@pytest.mark.usefixtures("nan_poison")
def test_offsets_match_the_reference(slots: int, kind: str, device: torch.device) -> None:
    masses = scores_of("ties", slots, device).clamp(min=0)
    if kind == "spread":
        masses = torch.rand((2, 3, slots), device=device)
    budgets = (0, slots // 5, slots + 1)
    got, bits = kernel.select_offsets(masses, budgets, 100)
    expected, expected_bits = reference.select_offsets(masses, budgets, 100)
    assert_same(got, expected)
    assert torch.equal(bits, expected_bits)
