"""The head map: colours by how common a pattern is."""

import pytest

from minference.head_patterns import HeadPatterns
from minference.patterns import AShape, Dense, VerticalSlash
from minference.viz.head_map import SHOWN, head_map_figure, ranked_cells


def test_the_commonest_pattern_comes_first() -> None:
    table = HeadPatterns(((Dense(), AShape(1, 2)), (AShape(1, 2), AShape(1, 2))))
    cells, labels = ranked_cells(table)
    assert cells == [[1, 0], [0, 0]]
    assert labels == ["a_shape(sink=1, local=2), 3 heads", "dense(), 1 heads"]


def test_rare_patterns_share_the_last_colour() -> None:
    cells, labels = ranked_cells(HeadPatterns((tuple(VerticalSlash(n, 9) for n in range(25)),)))
    assert cells[0] == [*range(SHOWN), *[SHOWN] * 6]
    assert labels[-1] == "6 rarer patterns, 6 heads"


def test_the_figure_shows_layers_downwards() -> None:
    pytest.importorskip("matplotlib")
    table = HeadPatterns(((Dense(), AShape(1, 2)), (AShape(1, 2), AShape(1, 2))))
    shown = head_map_figure(table, title="t").axes[0].images[0].get_array()
    assert shown is not None
    assert shown.tolist() == [[1, 0], [0, 0]]
