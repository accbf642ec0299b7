"""The attention benchmark on small shapes: records, the gate, counts of pairs."""

import json
from pathlib import Path

import pytest
import torch

from minference.bench import attention as bench
from minference.bench.cases import table, vs1
from minference.head_patterns import HeadPatterns
from minference.patterns import AShape, VerticalSlash

LLAMA = "gradientai/Llama-3-8B-Instruct-262k"


def test_records_hold_times_and_the_environment(tmp_path: Path) -> None:
    out = tmp_path / "records.jsonl"
    options = ["--lengths", "512", "--heads", "2", "--kv-heads", "1", "--dim", "32", "--seeds", "0"]
    options += ["--impls", "auto", "hopper", "--dtype", "float32", "--out", str(out)]
    assert bench.main([*options, "--precision", "native", "fp8"]) == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    dense, sparse, fp8, refused, fp8_refused = records
    assert dense["op"] == "dense_attention"
    assert dense["ms_p50"] > 0
    assert sparse["gate"]
    assert sparse["impl"] == "torch"
    assert sparse["ms_p20"] <= sparse["ms_p50"] <= sparse["ms_p80"]
    assert 0 < sparse["density"] <= 1
    assert sparse["speedup_over"] == dense["impl"]
    assert sparse["speedup"] == pytest.approx(dense["ms_p50"] / sparse["together_ms"], abs=1e-3)
    assert sparse["torch"] == torch.__version__
    assert "refused" in refused
    assert (sparse["precision"], fp8["precision"]) == ("native", "fp8")
    assert sparse["gate_error"] < 1e-4 < fp8["gate_error"] < 6e-2
    assert 1e-4 < fp8["native_relative"] < 6e-2
    assert fp8["native_max_abs"] > 0
    assert "fp8" in bench.summary(fp8_refused)


def test_a_red_gate_has_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "sparse_attention", lambda q, *_, **__: torch.zeros_like(q))
    shape = bench.Shape(length=256, heads=2, kv_heads=1, dim=32, dtype=torch.float32)
    case = vs1(256, 2, 0)
    record = bench.sparse_record(case, shape, shape.tensors(torch.device("cpu")), "torch")
    assert not record["gate"]
    assert "ms_p50" not in record
    assert bench.with_speedup(record, {"sdpa-cpu": 1.0}) == record
    assert "WRONG" in bench.summary(record)


def test_a_table_gives_the_budgets_of_its_heads() -> None:
    case = table(LLAMA, 5, 20_000, 0)
    assert len(case.lines) == 32
    assert all(len(own.columns) == v for own, v in zip(case.lines, case.verticals, strict=True))


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (["--impls", "tritn"], ValueError, "unknown impl 'tritn': did you mean 'triton'"),
        (["--cases", "vs2"], ValueError, "case must be vs1, scattered or TABLE@LAYER"),
        (["--cases", f"{LLAMA}@99"], ValueError, "has layers 0 to 31, got 99"),
        (["--dense", "fa9"], ValueError, "unknown dense kernel 'fa9'"),
        (["--heads", "0"], ValueError, "must be at least 1, .* got 512, 0, 8, 128"),
        (["--heads", "12"], ValueError, "heads a multiple of kv_heads, got 512, 12, 8, 128"),
        (["--out", "."], OSError, "directory"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_measured(
    wrong: list[str], error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "measure", None)
    with pytest.raises(error, match=message):
        bench.main(["--lengths", "512", *wrong])


def test_a_layer_with_heads_of_another_kind_is_not_planted(tmp_path: Path) -> None:
    table = HeadPatterns(((VerticalSlash(30, 60), AShape(64, 64)),)).save(tmp_path / "t.json")
    with pytest.raises(ValueError, match="vertical-slash heads alone to be planted, got AShape"):
        bench.check_names([f"{table}@0"], [], None, torch.device("cpu"))
