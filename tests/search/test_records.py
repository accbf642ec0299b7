"""The records that docs/search.md quotes."""

import json
from pathlib import Path

from minference.head_patterns import HeadPatterns

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def test_a_search_of_an_8b_shape_was_short_and_small() -> None:
    lines = (RESULTS / "search_8b.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    runs = {("H100" in r["gpu"], r["recall"]): round(r["seconds"]) for r in records}
    assert runs == {(True, None): 20, (True, 0.95): 26, (False, None): 10, (False, 0.95): 14}
    for record in records:
        assert (record["layers"], record["heads"], record["length"]) == (32, 32, 32_768)
        assert record["seconds"] < 600
        assert round(record["peak_bytes"] / 1e9, 1) == 20.0
    page = (ROOT / "docs" / "search.md").read_text()
    assert "20 seconds and 20.0 GB, 26 seconds" in page
    assert "10 and 14 seconds and 20.0 GB" in page


def test_the_shipped_model_is_searched_in_minutes() -> None:
    record = json.loads((RESULTS / "search_8k_cpu.jsonl").read_text())
    assert (record["length"], record["threads"]) == (8192, 2)
    assert record["processor_seconds"] < 300
    assert (
        f"{record['processor_seconds']:.0f} s of processor"
        in (ROOT / "docs" / "search.md").read_text()
    )


def test_every_planted_kind_was_found() -> None:
    lines = (RESULTS / "search_planted.jsonl").read_text().splitlines()
    found: dict[str, list[float]] = {}
    for record in map(json.loads, lines):
        assert record["heads"] >= 50
        if record["planted"] == "none":
            assert record["least_mass"] >= record["recall"]
        else:
            assert record["found"] == record["heads"]
        found.setdefault(record["planted"], []).append(record["noise"])
    assert set(found) == {"a_shape", "vertical_slash", "block_sparse", "none"}
    assert all(len(set(noises)) == 3 for noises in found.values())


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
        for objective in ("output", "mass"):
            if record["table"] not in ("searched_output", "searched_mass"):
                # ahead by its own objective, at both costs
                ahead = record[f"{objective}_behind_searched"]
                assert ahead > 2 * record[f"{objective}_standard_error"]
    assert {"searched_output", "searched_mass", "uniform", "a_shape_mass"} <= set(names)
