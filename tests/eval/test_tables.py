"""The markdown table of results, on records written by hand."""

import pytest

from minference.eval.tables import markdown_table


@pytest.mark.parametrize(
    ("method", "density", "marked"),
    [("minference", 1.0, True), ("minference", 0.99, False), ("dense", 1.0, False)],
)
def test_a_method_that_computed_everything_is_marked(
    method: str, density: float, marked: bool
) -> None:
    base = {"task": "t", "length": 1, "placement": "end", "split": "dev"}
    base |= {"questions": 1, "method": method, "seed": 0}
    lines = [
        {"record": "question", **base, "index": 0, "correct": 1},
        {"record": "prefill", **base, "seconds": 1.0, "density": [density, density]},
    ]
    row = markdown_table(lines).splitlines()[-1]
    assert f"{density:.3f}" in row
    assert ("(dense)" in row) is marked
