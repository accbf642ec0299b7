"""`minference eval report -o`: the page and its pictures from a folder of results."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from minference.cli import eval as command

pytest.importorskip("matplotlib")


@pytest.fixture
def results(tmp_path: Path) -> Path:
    base = {"task": "niah", "length": 512, "placement": "end", "split": "dev"}
    base |= {"questions": 1, "method": "dense", "seed": 0}
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


def test_the_page_does_not_replace_the_results(results: Path) -> None:
    file = results / "samples.jsonl"
    before = file.read_text()
    for source in (results, file):
        done = CliRunner().invoke(command.app, ["report", str(source), "-o", str(file)])
        assert "is named twice" in str(done.exception)
    assert file.read_text() == before


def test_pictures_need_a_page(results: Path) -> None:
    done = CliRunner().invoke(command.app, ["report", str(results), "--pictures", "png"])
    assert isinstance(done.exception, ValueError)
    assert "-o report.html" in str(done.exception)


@pytest.mark.parametrize("text", ["# A page\n\nof text\n", "", "\x00\n"])
def test_a_file_without_results_is_one_error(
    text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "page.md").write_text(text)
    done = CliRunner().invoke(command.app, ["report", str(tmp_path / "page.md")])
    assert isinstance(done.exception, ValueError)
    assert "page.md' must hold results of `minference eval`, got none" in str(done.exception)
    assert caplog.text == ""


def test_places_that_cannot_be_written_are_refused_beforehand(results: Path) -> None:
    for options in (["-o", str(results)], ["-o", str(results / "a"), "--pictures", __file__]):
        done = CliRunner().invoke(command.app, ["report", str(results), *options])
        assert isinstance(done.exception, ValueError)
        assert "cannot be written" in str(done.exception)
    assert not (results / "a").exists()
