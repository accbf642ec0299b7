"""`minference eval report -o`: the page and its pictures from a folder of results."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from minference.cli import eval as command

pytest.importorskip("matplotlib")


@pytest.fixture
def results(tmp_path: Path) -> Path:
    base = {"task": "niah", "length": 512, "placement": "end", "method": "dense", "seed": 0}
    found = {"index": 0, "depth": 0.0, "correct": 1, "answer": "7"}
    (tmp_path / "samples.jsonl").write_text(json.dumps({"record": "question", **base, **found}))
    return tmp_path


@pytest.mark.parametrize("as_json", [False, True])
def test_report_writes_a_page_and_pictures(results: Path, as_json: bool) -> None:
    page, folder = results / "report.html", results / "png"
    options = ["-o", str(page), "--pictures", str(folder), *(["--json"] if as_json else [])]
    done = CliRunner().invoke(command.app, ["report", str(results), *options])
    assert done.exit_code == 0, done.output
    files = [str(page), str(folder / "needle-dense.png")]
    told = "".join(f"wrote {name}\n" for name in files)
    assert done.stdout == (json.dumps({"files": files}) + "\n" if as_json else told)
    assert page.read_text().startswith("<!doctype html>")


def test_pictures_need_a_page(results: Path) -> None:
    done = CliRunner().invoke(command.app, ["report", str(results), "--pictures", "png"])
    assert isinstance(done.exception, ValueError)
    assert "-o report.html" in str(done.exception)
