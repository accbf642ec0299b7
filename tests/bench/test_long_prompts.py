"""The shipped model through the long-prompt modes: the plain path's answers and logits."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
from benchmarks import long_prompts

NEEDLE = Path(__file__).parents[2] / "models" / "needle"


@pytest.mark.slow
@pytest.mark.skipif(
    not list(NEEDLE.glob("*.safetensors")), reason="models/needle holds no weights here"
)
def test_the_modes_give_the_plain_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "long.jsonl"
    sizes = ["--tokens", "1200", "--chunk-tokens", "400", "--seeds", "0", "--no-fuse"]
    sizes += ["--methods", "minference:min_seq_len=0", "--model", str(NEEDLE)]
    monkeypatch.setattr(sys, "argv", ["long_prompts.py", *sizes, "--out", str(out)])
    long_prompts.main()
    records = {r["mode"]: r for r in map(json.loads, out.read_text().splitlines())}
    assert list(records) == ["plain again", "chunks", "chunks, host", "chunks, host_fp8"]
    for mode, record in records.items():
        assert record["right"], mode
        assert record["same_tokens"], mode
        assert record["max_logit_difference"] < 1e-3, mode
        assert (record["max_logit_difference_decoded"] < 1e-3) == (mode != "chunks, host_fp8")
