"""The lists of vertical-slash heads in Triton against sorting, bit for bit."""

import pytest
import torch

from minference.index import Ragged, device_ints
from minference.ops.estimate.triton import LineSums
from minference.ops.lines import triton as kernel
from minference.ops.lines.api import best_lines
from minference.ops.select import lists
from minference.testing import layout_of, random_qkv

# Triton's interpreter turns one-element arrays into loop bounds
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")

HEADS = (2, 0)
"""Heads to choose for, out of three."""


def assert_same(got: Ragged, expected: Ragged) -> None:
    assert torch.equal(got.count.cpu(), expected.count.cpu())
    for b in range(got.count.shape[0]):
        for h in range(got.count.shape[1]):
            assert got.row(b, h).tolist() == expected.row(b, h).tolist()


def sums_of(columns: torch.Tensor, real: list[int], group: int) -> LineSums:
    """What the estimate would leave for these column sums, with offset parts of its own making."""
    batch, heads, n = columns.shape
    tiles = -(-n // 64) + 1
    tops = columns.new_full((batch, heads, tiles, 64 // group), -1.0)
    parts = torch.rand((batch, heads, 4, tiles), device=columns.device)
    for b, length in enumerate(real):
        columns[b, :, length:] = -1
        behind = -(-(n - length) // 64)
        for t in range(behind + -(-length // 64)):
            begin = length - 64 * (t - behind + 1)
            padded = torch.nn.functional.pad(columns[b], (64, 64 * tiles), value=-1)
            own = padded[:, begin + 64 : begin + 128]
            tops[b, :, t] = own.unflatten(-1, (-1, group)).amax(dim=-1)
    return LineSums(columns, tops, parts)


def masses_of(sums: LineSums, real: list[int]) -> torch.Tensor:
    """Offset masses, tile by tile: tile m adds to the offsets m - 2 to m + 1."""
    batch, heads, n = sums.columns.shape
    masses = torch.zeros(batch, heads, lists.offset_slots(n) + 3, device=sums.columns.device)
    for b, length in enumerate(real):
        for m in reversed(range(-(-length // 64))):
            for part in range(4):
                if m - 1 + part >= 0:
                    masses[b, :, m - 1 + part] += sums.parts[b, :, part, m]
    return masses[..., : lists.offset_slots(n)]


def chosen(
    sums: LineSums, first: torch.Tensor, stop: torch.Tensor, budgets: tuple[int, ...], sink: int
) -> tuple[Ragged, Ragged, torch.Tensor]:
    """The kernel's choice for `HEADS`, as many offsets as columns."""
    n = sums.columns.shape[2]
    limits = [min(max(budget, sink), n) for budget in budgets]
    slots, local = lists.offset_slots(n), lists.local_offsets(90)
    most = [min(max(budget, local), slots) for budget in budgets]
    numbers = (limits[0], 0, most[0], limits[1], limits[0], most[1], sum(limits))
    device = first.device
    given = (device_ints(HEADS, device), device_ints(numbers, device), sum(limits))
    return kernel.best_lines(sums, first, stop, *given, sink, local)


@pytest.mark.parametrize("kind", ["ties", "spread"])
@pytest.mark.parametrize(("length", "group"), [(5, 4), (300, 4), (2500, 16)])
@pytest.mark.usefixtures("nan_poison")
def test_lists_match_sorting(length: int, group: int, kind: str, device: torch.device) -> None:
    columns = torch.randint(0, 4, (2, 3, length), device=device).float()
    if kind == "spread":
        columns = torch.rand((2, 3, length), device=device) ** 8 * 1e-3
        columns[0, 0, :5] = torch.tensor([0.0, 1e-42, 64.0, torch.inf, 1e-9], device=device)
    real = [length, max(1, length * 3 // 4)]
    sums = sums_of(columns, real, group)
    if kind == "ties":
        sums.parts.copy_(torch.randint(0, 3, sums.parts.shape))
    first = torch.tensor([0, length - real[1]], dtype=torch.int32, device=device)
    stop = torch.full_like(first, length)
    for budgets, sink in (((length // 9, length + 5), 4), ((0, 7), 0)):
        got, offsets, bits = chosen(sums, first, stop, budgets, sink)
        assert_same(got, lists.select_columns(columns[:, HEADS], budgets, sink))
        masses = masses_of(sums, real)[:, HEADS]
        expected, expected_bits = lists.select_offsets(masses, budgets, 90)
        assert_same(offsets, expected)
        assert torch.equal(bits, expected_bits)


@pytest.mark.usefixtures("nan_poison")
def test_lines_of_a_prompt_match_the_reference(device: torch.device) -> None:
    q, k, _ = random_qkv(4, 2, 150, 300, batch=2, device=device)
    layout = layout_of(q, k, left_padding=(0, 37), right_padding=(0, 5))
    call = (q, k, layout.first, layout.stop, (9, 40, 0), (3, 2, 0))
    got, expected = (best_lines(*call, heads=(0, 3, 1), impl=x) for x in ("triton", "reference"))
    assert_same(got.columns, expected.columns)
    assert_same(got.offsets, expected.offsets)
    assert torch.equal(got.offset_bits, expected.offset_bits)


@pytest.mark.parametrize(
    ("budgets", "message"),
    [((1,), "each of the 2 heads"), ((1, -2), "at least 0, got -2"), ((1, 2.5), "got 2.5")],
)
def test_bad_budgets_are_named(budgets: tuple, message: str) -> None:
    q, k, _ = random_qkv(2, 1, 60)
    layout = layout_of(q, k)
    with pytest.raises(ValueError, match=message):
        best_lines(q, k, layout.first, layout.stop, (1, 2), budgets)
