"""The prefill benchmark on a shape that a CPU does in a moment."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from minference.bench.cases import vs1
from minference.bench.prefill import PARTS, extrapolated, main, measure, planting
from minference.bench.shapes import SHAPES, shape_of
from minference.cli import app
from minference.head_patterns import default_patterns
from minference.methods import MInference
from minference.ops.estimate.api import last_query_lines
from minference.ops.estimate.reference import ROWS
from minference.patterns import VerticalSlash
from minference.testing import layout_of

pytest.importorskip("transformers")

TINY = ["--model", "tiny", "--dtype", "float32", "--impl", "torch", "--min-seq-len", "256"]


def test_prefill_splits_the_first_token_and_says_what_it_extrapolates(tmp_path: Path) -> None:
    out = tmp_path / "prefill.jsonl"
    sizes = ["--lengths", "512", "1024", "--dense-up-to", "512", "--out", str(out)]
    sizes += ["--runs", "dense", "sparse"]
    done = CliRunner().invoke(app, ["bench", "prefill", *TINY, *sizes])
    assert done.exit_code == 0, done.output
    records = [json.loads(line) for line in out.read_text().splitlines()]
    dense, sparse, guess, long = records
    assert [r["op"] for r in records] == ["dense_prefill", "sparse_prefill"] * 2
    for record in (dense, sparse, long):
        parts = [record[f"{p}_s"] for p in ("index", "attention", "linear", "kv", "rest")]
        assert sum(parts) == pytest.approx(record["first_token_s"])
        assert record["layers_recorded"] == 2
        assert record["attention_s"] > 0
        assert record["linear_s"] > 0
        assert record["kv_s"] > 0
        assert record["plant_s"] == 0
        assert record["decode_s"] > 0
    assert dense["density"] == 1
    assert guess["extrapolated_from"] == 512
    assert "decode_s" not in guess
    assert "EXTRAPOLATED" in done.stdout
    assert "4 x VerticalSlash(vertical=1000, slash=6096)" in done.stdout


@pytest.mark.parametrize("kv", ["device", "host"])
def test_a_planted_run_finds_the_planted_pattern(kv: str) -> None:
    shape = replace(shape_of("tiny"), dim=64)
    device = torch.device("cpu")
    plant = planting(shape, 2048, device, torch.float32)
    model = shape.build(2048 + 2, device, torch.float32)
    ids = torch.randint(shape.vocabulary, (1, 2048))
    budgets = default_patterns(2, 2, VerticalSlash(1000, 400))
    found = []

    def remember(q: torch.Tensor, k: torch.Tensor) -> None:
        plant(q, k)
        found.append((q, k))

    options = {"min_seq_len": 256, "impl": "torch", "kv": kv}
    record = measure(model, ids, MInference(patterns=budgets), decoded=1, plant=remember, **options)
    parts = [record[f"{part}_s"] for part in (*PARTS, "rest")]
    assert sum(parts) == pytest.approx(record["first_token_s"])
    assert record["plant_s"] > 0
    assert len(found) == 2
    q, k = found[0]
    layout = layout_of(q, k)
    masses = last_query_lines(q, k, layout.first, layout.stop, rows=ROWS).columns[0]
    planted = torch.zeros(2048, dtype=torch.bool)
    for own in vs1(2048, 2, 0).lines:
        planted[own.columns] = True
    assert bool((masses[:, planted].mean(dim=1) > 2 * masses[:, ~planted].mean(dim=1)).all())


def test_a_single_run_counts_compilation(tmp_path: Path) -> None:
    out = tmp_path / "prefill.jsonl"
    sizes = ["--lengths", "512", "--runs", "dense", "--once", "--out", str(out)]
    assert CliRunner().invoke(app, ["bench", "prefill", *TINY, *sizes]).exit_code == 0
    (record,) = (json.loads(line) for line in out.read_text().splitlines())
    assert record["first_run_s"] is None
    assert record["first_token_s"] > 0


def test_a_prompt_below_the_threshold_was_dense() -> None:
    model = shape_of("tiny").build(300, torch.device("cpu"), torch.float32)
    method = MInference(patterns=default_patterns(2, 2))
    record = measure(model, torch.randint(128, (1, 256)), method, decoded=1, min_seq_len=512)
    assert record["layers_recorded"] == 0
    assert record["density"] == 1


def test_only_long_prompts_run_once(tmp_path: Path) -> None:
    out = tmp_path / "prefill.jsonl"
    sizes = ["--lengths", "300", "512", "--runs", "sparse", "--decoded", "2", "--out", str(out)]
    assert (
        CliRunner().invoke(app, ["bench", "prefill", *TINY, *sizes, "--once", "512"]).exit_code == 0
    )
    short, long = (json.loads(line) for line in out.read_text().splitlines())
    assert short["first_run_s"] > 0
    assert long["first_run_s"] is None
    assert short["decoded"] == long["decoded"] == 2


@pytest.mark.parametrize("kv", ["host", "host_fp8"])
@pytest.mark.parametrize("name", ["qwen2.5-7b", "glm-4-9b"])
def test_other_families_take_the_long_path(name: str, kv: str) -> None:
    """The published shapes made small: the grouping of heads, the biases and the layers stay."""
    small = {"hidden": 128, "inner": 256, "dim": 32, "layers": 3, "vocabulary": 128}
    shape = replace(shape_of(name), **small, table=None)
    device = torch.device("cpu")
    model = shape.build(1024 + 17, device, torch.float32)
    ids = torch.randint(shape.vocabulary, (1, 1024))
    method = MInference(patterns=default_patterns(3, shape.heads))
    options = {"min_seq_len": 256, "impl": "torch", "kv": kv, "chunk_tokens": 100}
    record = measure(model, ids, method, decoded=2, **options)
    parts = [record[f"{part}_s"] for part in (*PARTS, "rest")]
    assert sum(parts) == pytest.approx(record["first_token_s"])
    assert record["layers_recorded"] == 3


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
    with pytest.raises(ValueError, match="decoded must be at least 0, got -1"):
        main(["--decoded", "-1"])
