"""The benchmark command on a length that a CPU does in a moment."""

import json
import shlex
from pathlib import Path

from typer.testing import CliRunner

from minference.cli import app


def test_bench_attention_checks_before_it_times(tmp_path: Path) -> None:
    out = tmp_path / "records.jsonl"
    sizes = shlex.split("--lengths 512 --heads 2 --kv-heads 1 --dim 32 --dtype float32 --seeds 0")
    done = CliRunner().invoke(
        app, ["bench", "attention", *sizes, "--impls", "torch", "--out", str(out)]
    )
    assert done.exit_code == 0, done.output
    records = [json.loads(line) for line in out.read_text().splitlines()]
    *dense_records, sparse = records
    dense = dense_records[0]  # a GPU has several
    assert dense["op"] == "dense_attention"
    assert sparse["gate"]
    assert sparse["ms_p50"] > 0
    assert sparse["torch"]
    assert "keys a row" in done.stdout
