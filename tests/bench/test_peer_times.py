"""The benchmark of the peers on the shipped model, at a size that a CPU does in seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
from benchmarks import eval_table, peer_times
from minference.bench.peers import read_times
from minference.methods import MInference
from minference.methods.spec import parse_methods
from minference.patterns import VerticalSlash

NEEDLE = Path(__file__).parents[2] / "models" / "needle"
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "peer_times.py"
RUN = ["--length", "1k", "--heads", "8", "--calls", "1"]
needs_model = pytest.mark.skipif(
    not list(NEEDLE.glob("*.safetensors")), reason="models/needle holds no weights here"
)


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["peer_times.py", *words])
    return peer_times.main()


@needs_model
def test_a_method_that_fails_costs_the_others_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "times.jsonl"
    methods = ["dense", "grouped:rows=8", "a_shape:sink=64,local=64"]
    assert call(monkeypatch, *RUN, "--methods", *methods, "--out", str(out)) == 1
    dense, failed, sparse = map(json.loads, out.read_text().splitlines())
    assert (dense["op"], dense["impl"]) == ("dense_attention", "sdpa-cpu")
    assert failed["refused"].startswith("ValueError: rows must be")
    assert sparse["gate"]
    assert sparse["options"] == {"min_seq_len": None, "sink": 64, "local": 64}
    assert (sparse["heads"], sparse["kv_heads"], sparse["dim"]) == (8, 2, 128)
    assert 0 < sparse["density"] < 0.6
    assert sparse["speedup"] == pytest.approx(dense["ms_p50"] / sparse["together_ms"], abs=1e-3)
    assert list(read_times([out])) == [(1024, methods[2])]
    printed = subprocess.run(
        [sys.executable, SCRIPT, "--table", out], check=True, capture_output=True, text=True
    )
    rows = printed.stdout.splitlines()
    assert len(rows) == 5
    assert all(row.count("|") == 9 for row in rows)
    assert "rows must be" in rows[3]


@needs_model
def test_early_layers_have_records_of_their_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "times.jsonl"
    run = [*RUN, "--methods", "grouped:samples=8,most=1,target=0", "--out", str(out)]
    for layer in ("0", "3"):
        assert call(monkeypatch, *run, "--layer", layer) == 0
    _, first, _, other = map(json.loads, out.read_text().splitlines())
    assert (first["op"], other["op"]) == ("early_layer", "peer")
    assert (first["layer"], other["layer"]) == (0, 3)
    assert first["density"] > other["density"]
    assert [time.density for time in read_times([out]).values()] == [other["density"]]


@needs_model
def test_nothing_is_started_when_the_time_is_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "times.jsonl"
    assert call(monkeypatch, *RUN, "--seconds", "0", "--out", str(out)) == 0
    assert [json.loads(line)["op"] for line in out.read_text().splitlines()] == ["dense_attention"]
    assert "out of time" in capsys.readouterr().out


@needs_model
def test_layers_stand_side_by_side_as_the_model_has_them() -> None:
    q, k, v = peer_times.widened(1024, 16)
    assert (q.shape, k.shape, v.shape) == ((1, 16, 1024, 128), *[(1, 4, 1024, 128)] * 2)
    alone = peer_times.widened(1024, 8)
    for wide, own in zip((q, k, v), alone, strict=True):
        torch.testing.assert_close(wide[:, : own.shape[1]], own)
    assert not torch.equal(q[:, :8], q[:, 8:])


@pytest.mark.parametrize("label", [spec.label for spec in parse_methods(eval_table.METHODS)])
def test_every_method_of_the_table_can_be_built(label: str) -> None:
    method = peer_times.method_of(label, 32)
    if isinstance(method, MInference):
        assert method.patterns.shape == (4, 32)
        assert method.patterns[0][0] == VerticalSlash(1000, 6096)
