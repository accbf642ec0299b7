"""XAttention keeps the contract of a method and takes its options."""

import pytest

from minference.methods import XAttention, get_method
from minference.testing import check_method, context_for, layout_of, random_qkv


@pytest.mark.parametrize("stride", [8, 16, 128])
def test_xattention_keeps_the_contract(stride: int) -> None:
    check_method(XAttention(stride=stride, threshold=0.5), length=1000)


def test_a_planted_passage_is_found_by_every_later_tile() -> None:
    q, k, _ = random_qkv(2, 1, 3000)
    q[..., 0] = k[:, :, 700:740, 0] = 8.0
    index = XAttention(threshold=0.5).build_index(q, k, context_for(layout_of(q, k), 2))
    mask = index.to_dense_mask()[0]
    assert bool(mask[:, 740:, 700:740].all())
    # its block, the first and the tile's own, of 24
    assert index.density() < 0.25


def test_its_name_finds_it() -> None:
    assert get_method("xattention") is XAttention


@pytest.mark.parametrize("options", [{"stride": 24}, {"stride": 0}, {"threshold": 1.1}])
def test_bad_options_are_named(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        XAttention(**options)  # type: ignore[arg-type]
