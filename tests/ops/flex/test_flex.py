"""FlexPrefill's key tiles, against the paper's algorithms written out for one head."""

import pytest
import torch

from minference.ops.flex import api
from minference.ops.flex.reference import divergence, flex_tiles
from minference.testing import layout_of, random_qkv


def structured(length: int = 900) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys whose tiles differ, so that means of tiles tell something; heads of different kinds."""
    q, k, _ = random_qkv(4, 2, length, seed=2)
    tiles = torch.randn(1, 2, -(-length // 128), 1, 32)
    k += tiles.expand(-1, -1, -1, 128, -1).flatten(2, 3)[:, :, :length]
    return q * torch.tensor([0.3, 1.2, 0.25, 2.0]).view(1, 4, 1, 1), k


def flags_of(lists, b: int, h: int, tiles: int) -> torch.Tensor:  # noqa: ANN001
    flags = torch.zeros(tiles, tiles, dtype=torch.bool)
    for t in range(tiles):
        flags[t, (lists.row(b, h, t) // 8).long()] = True
    return flags


@pytest.mark.parametrize("tau", [0.0, 0.25, 2.0])
@pytest.mark.parametrize("gamma", [0.3, 0.7])
@pytest.mark.parametrize(("least", "softcap"), [(1, 0.0), (3, 0.0), (1, 1.5)])
def test_tiles_are_those_of_the_paper(tau: float, gamma: float, least: int, softcap: float) -> None:
    q, k = structured()
    options = {"gamma": gamma, "tau": tau, "least": least, "scale": 32**-0.5, "softcap": softcap}
    lists = api.flex_tiles(q, k, layout_of(q, k), **options)
    kinds = []
    for h in range(4):
        expected, aware = flex_tiles(q[0, h], k[0, h // 2], **options)
        kinds.append(aware)
        assert torch.equal(flags_of(lists, 0, h, 8), expected)
    assert set(kinds) == {0.0: {False}, 0.25: {False, True}, 2.0: {True}}[tau]


def test_divergence_is_zero_for_equals_and_bounded() -> None:
    p, q = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    assert float(divergence(p, p)) == 0
    assert float(divergence(p, q)) == pytest.approx(0.6931**0.5, abs=1e-3)


def test_runs_of_heads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = structured()
    options = {"gamma": 0.5, "tau": 0.25, "least": 1, "scale": 32**-0.5}
    whole = api.flex_tiles(q, k, layout_of(q, k), **options)
    monkeypatch.setattr(api, "CHUNK", 1)
    parts = api.flex_tiles(q, k, layout_of(q, k), **options)
    for h in range(4):
        assert torch.equal(flags_of(whole, 0, h, 8), flags_of(parts, 0, h, 8))
