"""The records that docs/search.md quotes."""

import json
from pathlib import Path

from minference.head_patterns import HeadPatterns

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


def test_the_shipped_table_fits_the_model_and_says_where_it_comes_from() -> None:
    config = json.loads((ROOT / "models/needle/config.json").read_text())
    table = HeadPatterns.from_file(ROOT / "models/needle/patterns.json")
    assert table.shape == (config["num_hidden_layers"], config["num_attention_heads"])
    about = table.provenance
    assert about.model == "models/needle"
    assert about.basis is not None
    assert about.basis.startswith("minference search")
    assert about.objective in ("mass", "output")
    assert about.tokens is not None
    assert about.tokens >= 4000


def test_the_page_shows_the_records() -> None:
    lines = (RESULTS / "search_ablation.jsonl").read_text().splitlines()
    page = (ROOT / "docs" / "search.md").read_text()
    names = []
    for record in map(json.loads, lines):
        names.append(record["table"])
        assert f"| {record['output']:.4f} | " in page
        assert f"| {record['mass']:.4f} | " in page
    assert {"searched_output", "searched_mass", "uniform", "a_shape_mass"} <= set(names)
