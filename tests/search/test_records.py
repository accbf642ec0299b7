"""The records that docs/search.md quotes."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def test_a_search_of_an_8b_shape_was_short_and_small() -> None:
    lines = (RESULTS / "search_8b.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert {record["recall"] for record in records} == {None, 0.95}
    for record in records:
        assert (record["layers"], record["heads"], record["length"]) == (32, 32, 32_768)
        assert "H100" in record["gpu"]
        assert record["seconds"] < 600
        assert record["peak_bytes"] < 60e9
    page = (ROOT / "docs" / "search.md").read_text()
    assert "20 seconds" in page
    assert round(min(r["seconds"] for r in records)) == 20
    assert round(max(r["peak_bytes"] for r in records) / 1e9, 1) == 20.0
