"""Which of the peers' times are shown."""

import json
from pathlib import Path

import pytest

from minference.bench.peers import MethodTime, read_times

RED = {"op": "peer", "method": "a", "length": 1024, "gate": False, "density": 0.5, "gpu": None}
GREEN = RED | {"gate": True, "together_ms": 4.0, "speedup": 2.0, "speedup_over": "fa3"}


def test_the_last_green_record_of_a_length_and_method_counts(tmp_path: Path) -> None:
    files = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    lines = [
        {"op": "dense_attention", "impl": "fa3", "length": 1024, "ms_p50": 8.0},
        GREEN | {"together_ms": 9.0},
        GREEN,
        RED,
        {"op": "peer", "method": "b", "length": 1024, "refused": "RuntimeError: no"},
    ]
    files[0].write_text("".join(json.dumps(line) + "\n" for line in lines))
    files[1].write_text(json.dumps(GREEN | {"length": 2048, "gpu": "H200"}) + "\n")
    assert read_times(files) == {
        (1024, "a"): MethodTime(4.0, 2.0, "fa3", 0.5, None),
        (2048, "a"): MethodTime(4.0, 2.0, "fa3", 0.5, "H200"),
    }


def test_a_file_without_a_time_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "red.jsonl"
    path.write_text(json.dumps(RED) + "\n")
    with pytest.raises(ValueError, match=r"red\.jsonl must hold times of"):
        read_times([path])
