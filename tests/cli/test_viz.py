"""`minference viz` and `minference inspect --diff`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from minference.cli import app
from minference.cli.inspect import difference
from minference.head_patterns import HeadPatterns
from minference.ops.build import a_shape_index
from minference.patterns import AShape, Dense
from minference.testing import layout_of, random_qkv

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


def test_attention_draws_a_head_and_tells_of_all(tiny_folder: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "new" / "head.png"
    prompt = ["--demo-facts", "--tokens", "1k", "--seed", "2", "--layer", "1", "--head", "2"]
    method = ["--method", "a_shape:sink=64,local=64", "--rows", "8"]
    options = [tiny_folder, *prompt, *method, "-o", str(picture)]
    done = RUNNER.invoke(app, ["viz", "attention", *options, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert found["tokens"] <= 1025  # with <bos>
    assert [(r["layer"], r["head"]) for r in found["heads"]] == [
        (layer, head) for layer in range(4) for head in range(4)
    ]
    assert all(0 < r["recall_min"] <= r["recall"] <= 1 for r in found["heads"])
    assert found["layers"][1] == pytest.approx(found["heads"][4]["density"], abs=1e-4)
    shown = RUNNER.invoke(app, ["viz", "attention", *options]).stdout
    row = next(line.split() for line in shown.splitlines() if line.split()[:1] == ["2"])
    own = found["heads"][6]
    assert float(row[2]) == pytest.approx(own["recall"], abs=1e-4)
    assert float(row[4]) == pytest.approx(1 - own["output_error"], abs=1e-4)


def test_attention_of_dense_layers(tiny_folder: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    options = ["--prompt", "a word " * 30, "--method", "dense", "-o", str(tmp_path / "a.png")]
    shown = RUNNER.invoke(app, ["viz", "attention", tiny_folder, *options])
    assert "everything is computed" in shown.stdout, shown.output
    wrong = RUNNER.invoke(app, ["viz", "attention", tiny_folder, *options, "--head", "9"])
    assert "head must be 0 to 3 for this model, got 9" in str(wrong.exception)


def test_a_layer_that_is_not_there_is_named_before_loading(tiny_folder: str) -> None:
    pytest.importorskip("matplotlib")
    words = ["viz", "attention", tiny_folder, "--prompt", "a", "--layer", "99"]
    done = RUNNER.invoke(app, words)
    assert "layer must be 0 to 3 for this model, got 99" in str(done.exception)
    assert "loading" not in done.stderr


def results(folder: Path) -> str:
    """Four answers and two prefills as `minference eval` writes them."""
    base = {"task": "niah", "length": 4096, "placement": "end", "split": "dev", "questions": 1}
    lines: list[dict[str, object]] = [
        {"record": "question", **base, "seed": seed, "index": 0, "method": method}
        | {"depth": depth, "correct": int(method == "dense" or depth == 0)}
        for method in ("dense", "a_shape")
        for seed, depth in enumerate((0.0, 0.5))
    ]
    lines += [
        {"record": "prefill", **base, "seed": 0, "method": method, "density": [1.0, own]}
        | {"recall": [1.0, kept]}
        for method, own, kept in (("dense", 1.0, 1.0), ("a_shape", 0.2, 0.7))
    ]
    path = folder / "samples.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("needle", {"task": "niah", "method": "a_shape", "baseline": "dense", "questions": 2}),
        ("recall", {"points": 4}),
    ],
)
def test_results_are_drawn(tmp_path: Path, what: str, told: dict[str, object]) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "new" / f"{what}.svg"
    source = results(tmp_path)
    for path in (source, str(tmp_path)):
        done = RUNNER.invoke(app, ["viz", what, path, "-o", str(picture), "--json"])
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout) == {"picture": str(picture), **told}
    assert "<svg" in picture.read_text()


def test_answers_and_times_are_drawn_together(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    time = {"op": "peer", "method": "a_shape", "length": 4096, "together_ms": 1.0, "gpu": "H200"}
    times = tmp_path / "times.jsonl"
    times.write_text(
        json.dumps(time | {"speedup": 2.0, "speedup_over": "fa3", "density": 0.1}) + "\n"
    )
    picture = tmp_path / "new" / "both.svg"
    words = ["viz", "tradeoff", results(tmp_path), str(times), "--answered", "4k", "--timed", "4k"]
    done = RUNNER.invoke(
        app, [*words, "--placement", "end", "--split", "dev", "-o", str(picture), "--json"]
    )
    assert done.exit_code == 0, done.output
    panel = {"answered": 4096, "timed": 4096, "points": 1}
    assert json.loads(done.stdout) == {"picture": str(picture), "panels": [panel]}
    assert "<svg" in picture.read_text()
    for option, near in (("--placement", "cached, end, spread"), ("--split", "dev, heldout")):
        bad = RUNNER.invoke(app, [*words, option, "front"])
        assert f"valid names are {near}" in str(bad.exception)
    wrong = RUNNER.invoke(app, words)
    assert "no method has both answers and a time" in str(wrong.exception)
    uneven = RUNNER.invoke(app, [*words, "--answered", "4k,8k"])
    assert "one length or one for each of --timed" in str(uneven.exception)


def test_results_without_the_wanted_are_errors(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    source = results(tmp_path)
    wrong = RUNNER.invoke(app, ["viz", "needle", source, "--method", "grouped"])
    assert "method 'grouped'" in str(wrong.exception)
    against = RUNNER.invoke(app, ["viz", "needle", source, "--baseline", "foo"])
    assert "unknown method 'foo': valid names are a_shape, dense" in str(against.exception)
    blank = RUNNER.invoke(app, ["viz", "needle", source, "-o", str(tmp_path / "needle")])
    assert "valid names are .pdf, .png, .svg" in str(blank.exception)
    gone = RUNNER.invoke(app, ["viz", "recall", str(tmp_path / "none.jsonl")])
    assert "no results at" in str(gone.exception)


def test_diff_names_heads_kinds_and_density(tmp_path: Path) -> None:
    files = [str(t.save(tmp_path / f"{n}.json")) for n, t in (("a", OLD), ("b", NEW))]
    args = ["inspect", "--diff", *files, "--length", "1k"]
    found = json.loads(RUNNER.invoke(app, [*args, "--json"]).stdout)
    dense, shape = Dense().to_dict(), AShape(64, 64).to_dict()
    assert found["changed"] == [{"layer": 0, "head": 0, "old": dense, "new": shape}]
    assert found["old"]["kinds"] == {"dense": 1, "a_shape": 1}
    q, k, _ = random_qkv(1, 1, 1024)
    real = a_shape_index(layout_of(q, k), (64,), (64,)).density()
    assert found["density_difference"] == pytest.approx((real - 1) / 2, rel=0.05)
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
