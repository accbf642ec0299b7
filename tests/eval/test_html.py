"""The HTML report: one file that holds tables, pictures and wrong answers of the records."""

import base64
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from minference.eval.html import write_report
from minference.eval.tables import markdown_table

BASE = {"task": "niah", "length": 2048, "placement": "end", "split": "heldout", "questions": 1}


def answer(method: str, seed: int, correct: int) -> dict[str, Any]:
    found = {"seed": seed, "index": 0, "depth": 0.5, "correct": correct, "answer": "<b>7</b>"}
    wrong = {} if correct else {"got": "<i>8\n"}
    return {"record": "question", **BASE, "method": method, **found, **wrong}


def prefill(method: str, density: float) -> dict[str, Any]:
    measured = {"seconds": 0.5, "density": [density, 1.0], "recall": [0.9, 1.0]}
    return {"record": "prefill", **BASE, "method": method, "seed": 0, **measured}


RECORDS = [
    {"record": "run", "model": "m&m", "device": "cpu", "command": "minference eval m --x '<'"},
    answer("dense", 0, 1),
    prefill("dense", 1.0),
    answer("a_shape:sink=8,local=64", 0, 0),
    prefill("a_shape:sink=8,local=64", 0.25),
]


class Page(HTMLParser):
    """Tags, attributes and cells of a page; complains of tags that are never closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.images: list[bytes] = []
        self.links: list[str] = []
        self.cells: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        found = dict(attrs)
        self.links += [v or "" for k, v in attrs if k in ("src", "href")]
        if tag == "img":
            self.images.append(base64.b64decode((found["src"] or "").split(",", 1)[1]))
        if tag in ("td", "th"):
            self.cells.append("")
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if {"td", "th"} & set(self.open):
            self.cells[-1] += data


def test_the_page_is_self_contained_and_holds_every_cell_of_the_table(tmp_path: Path) -> None:
    out = tmp_path / "new" / "report.html"
    assert write_report(RECORDS, out, title="T") == [out]
    page = Page(out.read_text())
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert [data[:8] for data in page.images] == [b"\x89PNG\r\n\x1a\n"] * 2
    for line in markdown_table(RECORDS).splitlines()[2:]:
        for cell in line.strip("| ").split(" | "):
            assert cell.strip().strip("`") in page.cells
    assert "minference eval m --x '<'" in page.text
    assert "m&m" in page.cells


def test_answers_of_a_model_cannot_become_markup(tmp_path: Path) -> None:
    write_report(RECORDS, tmp_path / "r.html", title="<T>")
    page = Page((tmp_path / "r.html").read_text())
    assert not {"b", "i", "t"} & set(page.seen)
    assert "'<b>7</b>'" in page.cells
    assert "Wrong answers (1, 1 shown)" in page.text


def test_pictures_come_as_files_too_if_asked(tmp_path: Path) -> None:
    folder = tmp_path / "png"
    written = write_report(RECORDS, tmp_path / "r.html", title="T", pictures=folder)
    names = ["needle-a-shape-sink-8-local-64.png", "recall.png"]
    assert [path.name for path in written[1:]] == names
    images = Page((tmp_path / "r.html").read_text()).images
    assert [path.read_bytes() for path in written[1:]] == images


def test_dense_alone_has_a_map_and_no_difference(tmp_path: Path) -> None:
    written = write_report(RECORDS[1:2], tmp_path / "r.html", title="T", pictures=tmp_path)
    assert [path.name for path in written[1:]] == ["needle-dense.png"]


def test_records_without_a_result_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to report"):
        write_report(RECORDS[:1], tmp_path / "r.html", title="T")
    assert not list(tmp_path.iterdir())
