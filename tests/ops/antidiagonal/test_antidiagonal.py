"""Key tiles by antidiagonal sums, against the paper's formulas written out for one head."""

import pytest
import torch

from minference.ops.antidiagonal import api
from minference.ops.antidiagonal.reference import antidiagonal_masses, covering_tiles
from minference.testing import layout_of, random_qkv


def chosen(lists, b: int, h: int, tiles: int) -> torch.Tensor:  # noqa: ANN001
    flags = torch.zeros(tiles, tiles, dtype=torch.bool)
    for t in range(tiles):
        entries = lists.row(b, h, t)
        assert torch.equal(entries % 8, torch.tensor([3, 7]).repeat(len(entries) // 2).int())
        flags[t, (entries // 8).long()] = True
    return flags


def test_one_score_is_the_mean_of_an_antidiagonal() -> None:
    q, k, _ = random_qkv(1, 1, 256)
    masses = antidiagonal_masses(q[0, 0], k[0, 0], stride=128, scale=0.1)
    antidiagonal = [[(0, 0)], [(1, 0), (1, 1)]]
    for tile, pairs in enumerate(antidiagonal):
        scores = torch.tensor(
            [
                sum(float(q[0, 0, 128 * r + 127 - i] @ k[0, 0, 128 * c + i]) for i in range(128))
                for r, c in pairs
            ]
        )
        expected = (scores * 0.1 / 128).softmax(dim=0)
        torch.testing.assert_close(masses[tile, : tile + 1], expected)


@pytest.mark.parametrize("stride", [8, 16, 64])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_tiles_are_those_of_the_paper(stride: int, softcap: float) -> None:
    q, k, _ = random_qkv(4, 2, 900, seed=2)
    q *= 3
    lists = api.antidiagonal_tiles(
        q, k, layout_of(q, k), stride=stride, threshold=0.8, scale=0.2, softcap=softcap
    )
    for h in range(4):
        masses = antidiagonal_masses(
            q[0, h], k[0, h // 2], stride=stride, scale=0.2, softcap=softcap
        )
        assert torch.equal(chosen(lists, 0, h, 8), covering_tiles(masses, 0.8))


def test_runs_of_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, _ = random_qkv(4, 2, 900, batch=2)
    whole = api.antidiagonal_tiles(q, k, layout_of(q, k), stride=16, threshold=0.5, scale=0.5)
    monkeypatch.setattr(api, "CHUNK", 1)
    parts = api.antidiagonal_tiles(q, k, layout_of(q, k), stride=16, threshold=0.5, scale=0.5)
    for b in range(2):
        for h in range(4):
            assert torch.equal(chosen(whole, b, h, 8), chosen(parts, b, h, 8))


def test_chunk_of_whole_tiles_gets_the_prompt_s_tiles() -> None:
    q, k, _ = random_qkv(4, 2, 1024)
    whole = api.antidiagonal_tiles(q, k, layout_of(q, k), stride=8, threshold=0.5, scale=0.5)
    q = q[:, :, 512:].contiguous()
    part = api.antidiagonal_tiles(q, k, layout_of(q, k), stride=8, threshold=0.5, scale=0.5)
    for h in range(4):
        for tile in range(4):
            assert torch.equal(part.row(0, h, tile), whole.row(0, h, 4 + tile))


def test_rows_before_the_chunk_count_as_zeros() -> None:
    q, k, _ = random_qkv(2, 1, 900, seed=2)
    begin = 700
    chunk = q[:, :, begin:].contiguous()
    lists = api.antidiagonal_tiles(
        chunk, k, layout_of(chunk, k), stride=16, threshold=0.5, scale=0.5
    )
    for h in range(2):
        masses = antidiagonal_masses(q[0, h], k[0, 0], stride=16, scale=0.5, begin=begin)
        expected = covering_tiles(masses, 0.5)
        for tile in range(5, 8):
            numbers = (lists.row(0, h, tile - 5) // 8).unique().long()
            assert torch.equal(numbers, expected[tile].nonzero()[:, 0])
