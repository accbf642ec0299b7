"""FlexPrefill keeps the contract of a method and takes its options."""

import pytest

from minference.methods import FlexPrefill, get_method
from minference.testing import check_method, context_for, layout_of, random_qkv


@pytest.mark.parametrize("tau", [0.0, 0.1, 2.0])
def test_flexprefill_keeps_the_contract(tau: float) -> None:
    check_method(FlexPrefill(gamma=0.5, tau=tau, min_budget=0), length=1000)


def test_default_budget_covers_short_prompts() -> None:
    check_method(FlexPrefill())
    q, k, _ = random_qkv(4, 2, 1000)
    index = FlexPrefill().build_index(q, k, context_for(layout_of(q, k), 4))
    assert index.density() == 1.0


def test_less_gamma_computes_less() -> None:
    q, k, _ = random_qkv(4, 2, 2000)
    context = context_for(layout_of(q, k), 4)
    densities = [
        FlexPrefill(gamma=gamma, min_budget=0).build_index(q, k, context).density()
        for gamma in (0.2, 0.5, 0.9)
    ]
    assert densities == sorted(densities)
    assert densities[0] < densities[2]


def test_its_name_finds_it() -> None:
    assert get_method("flexprefill") is FlexPrefill


@pytest.mark.parametrize("options", [{"gamma": 0.0}, {"tau": -1.0}, {"min_budget": -1}])
def test_bad_options_are_named(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        FlexPrefill(**options)  # type: ignore[arg-type]
