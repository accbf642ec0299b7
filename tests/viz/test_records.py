"""Plots of benchmark records: what is drawn, and the break-even length."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from minference.cli import app
from minference.viz.records import PARTS, _draw_parts, break_even, curves, plot, read


def write(path: Path, *records: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def record(op: str, length: int, ms: float, **more: object) -> dict[str, object]:
    return {"op": op, "impl": "x", "length": length, "ms_p50": ms, "tflops": 1.0, **more}


def test_break_even_is_the_length_from_which_sparse_is_never_slower() -> None:
    dense = {1: 1.0, 2: 2.0, 4: 4.0, 8: 8.0}
    assert break_even(dense, {1: 0.5, 2: 3.0, 4: 4.0, 8: 5.0}) == 4
    assert break_even(dense, {8: 9.0}) is None


def test_red_gates_and_refusals_are_not_drawn(tmp_path: Path) -> None:
    good = record("sparse_attention", 512, 2.0, gate=True, together_ms=3.0, case="vs1-seed0")
    red = record("sparse_attention", 512, 1.0, gate=False, case="vs1-seed1")
    file = write(tmp_path / "r.jsonl", good, red, {"op": "dense_attention", "refused": "no"})
    assert curves(read(file)) == {"x, vs1": {512: 3.0}}


def test_what_was_extrapolated_is_a_curve_of_its_own() -> None:
    rows = [record("dense_prefill", 512, 2.0), record("sparse_prefill", 512, 1.0)]
    rows.append(record("dense_prefill", 1024, 5.0, extrapolated_from=512))
    names = ["x, dense prefill", "x, sparse prefill", "x, dense prefill, extrapolated"]
    assert list(curves(rows)) == names


def test_a_file_of_red_gates_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "r.jsonl", record("sparse_attention", 512, 1.0, gate=False))
    with pytest.raises(ValueError, match="gate is not red"):
        read(file)


def test_the_command_draws_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [record("dense_attention", n, n / 2) for n in (512, 1024)]
    rows += [record("sparse_attention", n, 300.0, gate=True, case="vs1") for n in (512, 1024)]
    picture = tmp_path / "plot.png"
    file = write(tmp_path / "r.jsonl", *rows)
    done = CliRunner().invoke(app, ["bench", "plot", str(file), "-o", str(picture)])
    assert done.exit_code == 0, done.output
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_another_kind_of_picture_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = write(tmp_path / "r.jsonl", record("dense_attention", 512, 1.0))
    done = CliRunner().invoke(app, ["bench", "plot", str(file), "-o", str(tmp_path / "r.txt")])
    assert "unknown kind of picture '.txt'" in str(done.exception)


def test_whole_models_are_drawn_by_part_from_several_files(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    def first_token(op: str, length: int, **parts: float) -> dict[str, object]:
        named = {f"{part}_s": parts.get(part, 0.0) for part in PARTS}
        total = sum(parts.values())
        return record(op, length, 1e3 * total, first_token_s=total, **named)

    rows = [first_token("dense_prefill", 2048, linear=1.0, attention=3.0)]
    more = [first_token("sparse_prefill", 2048, linear=1.0, index=0.5, kv=0.5)]
    guess = record("dense_prefill", 4096, 9e3, extrapolated_from=2048)
    axes = Figure().subplots()
    _draw_parts(axes, rows + more)
    width = {(bar.get_y(), bar.get_x()): bar.get_width() for bar in axes.patches}
    assert sorted(set(width.values())) == [0, 25, 50, 75]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["2,048 dense", "2,048 sparse"]
    files = [write(tmp_path / "a.jsonl", *rows, guess), write(tmp_path / "b.jsonl", *more)]
    picture = tmp_path / "plot.svg"
    done = CliRunner().invoke(app, ["bench", "plot", *map(str, files), "-o", str(picture)])
    assert done.exit_code == 0, done.output
    assert "<svg" in picture.read_text()


def test_models_and_devices_have_curves_of_their_own(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [record("sparse_prefill", 512, 1.0, model="a", gpu="NVIDIA H200")]
    rows.append(record("sparse_prefill", 512, 3.0, model="b", gpu="NVIDIA H100 80GB HBM3"))
    assert list(curves(rows)) == ["a, sparse prefill", "b, sparse prefill"]
    picture = tmp_path / "plot.svg"
    plot([write(tmp_path / "r.jsonl", *rows)], picture)
    for name in ("a on H200, sparse prefill", "b on H100, sparse prefill"):
        assert f"<!-- {name} -->" in picture.read_text()
