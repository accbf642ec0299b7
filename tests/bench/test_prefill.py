"""The prefill benchmark on a shape that a CPU does in a moment."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from minference.bench.prefill import extrapolated
from minference.bench.shapes import SHAPES, shape_of
from minference.cli import app

pytest.importorskip("transformers")

TINY = ["--model", "tiny", "--dtype", "float32", "--impl", "torch", "--min-seq-len", "256"]


def test_prefill_splits_the_first_token_and_says_what_it_extrapolates(tmp_path: Path) -> None:
    out = tmp_path / "prefill.jsonl"
    sizes = ["--lengths", "512", "1024", "--dense-up-to", "512", "--out", str(out)]
    done = CliRunner().invoke(app, ["bench", "prefill", *TINY, *sizes])
    assert done.exit_code == 0, done.output
    records = [json.loads(line) for line in out.read_text().splitlines()]
    dense, sparse, guess, long = records
    assert [r["op"] for r in records] == ["dense_prefill", "sparse_prefill"] * 2
    for record in (dense, sparse, long):
        parts = [record[f"{p}_s"] for p in ("index", "attention", "linear", "rest")]
        assert sum(parts) == pytest.approx(record["first_token_s"])
        assert record["layers_recorded"] == 2
        assert record["attention_s"] > 0
        assert record["linear_s"] > 0
        assert record["decode_s"] > 0
    assert dense["density"] == 1
    assert guess["extrapolated_from"] == 512
    assert "decode_s" not in guess
    assert "EXTRAPOLATED" in done.stdout


def test_extrapolation_squares_the_attention_alone() -> None:
    names = dict.fromkeys(("op", "impl", "model", "layers", "dtype", "kv", "fuse"), "x")
    measured = {**names, "length": 100, "first_token_s": 3.0, "attention_s": 1.0}
    assert extrapolated(measured, 400)["first_token_s"] == pytest.approx(16 + 8)


@pytest.mark.parametrize("name", [n for n, shape in SHAPES.items() if shape.table])
def test_shapes_fit_the_published_tables(name: str) -> None:
    shape = SHAPES[name]
    assert shape.patterns().shape == (shape.layers, shape.heads)
    assert shape_of(name, 2).patterns().shape == (2, shape.heads)
    assert shape.config(4096).head_dim == shape.dim


def test_unknown_shapes_and_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="must be one of"):
        shape_of("gpt-2")
    with pytest.raises(ValueError, match="must be 1 to 32"):
        shape_of("llama-3-8b", 33)
