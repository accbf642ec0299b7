"""`minference viz heads` and `minference inspect --diff`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from minference.cli import app
from minference.cli.inspect import difference
from minference.head_patterns import HeadPatterns
from minference.patterns import AShape, Dense

RUNNER = CliRunner()
OLD = HeadPatterns(((Dense(), AShape(64, 64)),))
NEW = HeadPatterns(((AShape(64, 64), AShape(64, 64)),))


def test_heads_writes_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "new" / "heads.png"
    source = "Qwen/Qwen2.5-7B-Instruct-1M"
    done = RUNNER.invoke(app, ["viz", "heads", source, "-o", str(picture), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {"picture": str(picture), "layers": 28, "heads": 28}
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_diff_names_heads_kinds_and_density(tmp_path: Path) -> None:
    files = [str(t.save(tmp_path / f"{n}.json")) for n, t in (("a", OLD), ("b", NEW))]
    args = ["inspect", "--diff", *files, "--length", "1k"]
    found = json.loads(RUNNER.invoke(app, [*args, "--json"]).stdout)
    dense, shape = Dense().to_dict(), AShape(64, 64).to_dict()
    assert found["changed"] == [{"layer": 0, "head": 0, "old": dense, "new": shape}]
    assert found["old"]["kinds"] == {"dense": 1, "a_shape": 1}
    # rows of 128 computed keys of 1024: 1/8 * (2 - 1/8)
    assert found["density_difference"] == pytest.approx((15 / 64 - 1) / 2)
    shown = RUNNER.invoke(app, args).stdout
    assert "1 of 2 heads differ" in shown
    assert "dense() -> a_shape(sink=64, local=64)" in shown


def test_a_table_does_not_differ_from_itself() -> None:
    found = difference(OLD, OLD, 1024)
    assert (found["changed"], found["density_difference"]) == ([], 0)


def test_bad_diffs_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"same layers and heads .* got \(1, 2\) and \(2, 2\)"):
        difference(OLD, HeadPatterns((*OLD.patterns, *OLD.patterns)), 1024)
    alone = RUNNER.invoke(app, ["inspect", "--diff", "one.json"])
    assert "two tables with --diff, got 1: one.json" in str(alone.exception)
