"""Perplexity of a folder of texts: the numbers against the model's own loss, and going on."""

import json
import logging
import math
from pathlib import Path

import pytest
import torch

from minference.eval.items import run_items
from minference.eval.pg19 import KIND, perplexity_table, read_book, read_books
from minference.eval.records import FILE_NAME
from minference.eval.runner import Subject
from minference.methods import AShape, Dense
from minference.methods.spec import parse_methods

SPECS = parse_methods("dense,a_shape:sink=8,local=64")


@pytest.fixture
def books(tmp_path: Path) -> Path:
    folder = tmp_path / "books"
    (folder / "test").mkdir(parents=True)
    for name, size in (("test/2", 700), ("test/1", 400), ("3", 150)):
        text = "".join(chr(97 + (i * i + len(name)) % 26) for i in range(size))
        (folder / f"{name}.txt").write_text(text)
    return folder


def test_books_are_cut_to_the_lengths_that_they_fill(
    books: Path, subject: Subject, caplog: pytest.LogCaptureFixture
) -> None:
    found = read_books(books, subject, [600, 200, 300])
    assert [(item.length, item.index) for item in found] == [
        (200, "test/1.txt"),
        (200, "test/2.txt"),
        (300, "test/1.txt"),
        (300, "test/2.txt"),
        (600, "test/2.txt"),
    ]
    assert all(len(item.content) == item.length for item in found)
    assert found[0].content[0] == subject.tokenizer.bos_token_id
    assert [i.index for i in read_books(books, subject, [100, 300], books=1)] == [
        "3.txt",
        "test/1.txt",
    ]
    with caplog.at_level(logging.WARNING, logger="minference"):
        read_books(books, subject, [100, 9000])
    assert "no book fills 9000 tokens" in caplog.text


def test_bad_folders_say_what_is_wrong(books: Path, subject: Subject, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no \*\.txt file"):
        read_books(tmp_path / "none", subject, [100])
    with pytest.raises(ValueError, match="fills 800 tokens, the longest has 701"):
        read_books(books, subject, [800])
    with pytest.raises(ValueError, match="at least 2 tokens"):
        read_books(books, subject, [1])
    with pytest.raises(ValueError, match="books must be at least 1, got 0"):
        read_books(books, subject, [100], books=0)
    (books / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt' must be text in UTF-8"):
        read_books(books, subject, [100])


def test_perplexity_is_the_models_own_loss(books: Path, subject: Subject) -> None:
    item = read_books(books, subject, [200])[0]
    got = read_book(subject, Dense(), item)
    ids = torch.tensor(item.content)[None]
    with torch.no_grad():
        expected = float(subject.model(ids, labels=ids).loss)
    assert got["nats"] == pytest.approx(expected, abs=1e-5)
    # a byte is a token here, so bits a byte are bits a token
    assert got["bits_per_byte"] == pytest.approx(expected / math.log(2), abs=1e-5)
    assert (got["scored"], got["tokens"]) == (199, 200)


def test_long_books_are_scored_at_places_spread_over_them(
    books: Path, subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    item = read_books(books, subject, [300])[0]
    monkeypatch.setattr("minference.eval.pg19.SCORED", 5)
    got = read_book(subject, Dense(), item)
    ids = torch.tensor(item.content)
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(
            subject.model(ids[None]).logits[0, :-1], ids[1:], reduction="none"
        )
    places = [0, 74, 149, 224, 298]
    assert got["scored"] == 5
    assert got["nats"] == pytest.approx(float(losses[places].mean()), abs=1e-5)


def test_a_sparse_method_reads_less_and_says_so(books: Path, subject: Subject) -> None:
    item = read_books(books, subject, [600])[0]
    sparse = read_book(subject, AShape(sink=8, local=64, min_seq_len=0), item)
    dense = read_book(subject, Dense(), item)
    assert max(sparse["density"]) < 0.6
    assert dense["density"] == [1.0] * 4
    assert sparse["nats"] != dense["nats"]


def test_a_run_goes_on_and_sums_up(books: Path, subject: Subject, tmp_path: Path) -> None:
    items = read_books(books, subject, [200, 300])
    folder = tmp_path / "out"
    half = run_items(subject, SPECS, items[:1], folder, read_book, kind=KIND)
    assert len(list(half.of(KIND))) == 2
    records = run_items(subject, SPECS, items, folder, read_book, kind=KIND)
    assert len(list(records.of(KIND))) == 8
    table = perplexity_table(records.lines).splitlines()
    assert len(table) == 6
    found = [r for r in records.of(KIND) if (r["length"], r["method"]) == (300, "dense")]
    mean = sum(r["nats"] for r in found) / 2
    assert table[4].startswith(f"| pg19 | 300 | 2 | `dense` | {math.exp(mean):.3f} |")
    byte = [sum(r["bits_per_byte"] for r in records.of(KIND) if _is(r, s.label)) / 2 for s in SPECS]
    assert f" {byte[1] - byte[0]:+.3f} (" in table[5]


def test_a_changed_book_is_not_taken_for_the_old_one(
    books: Path, subject: Subject, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    run_items(subject, SPECS, read_books(books, subject, [200]), folder, read_book, kind=KIND)
    kept = (folder / FILE_NAME).read_text()
    (books / "test/1.txt").write_text("z" * 400)
    changed = read_books(books, subject, [200])
    with pytest.raises(ValueError, match=r"item 'test/1\.txt' of pg19 at 200 tokens with other"):
        run_items(subject, SPECS, changed, folder, read_book, kind=KIND)
    assert (folder / FILE_NAME).read_text() == kept


def test_results_without_a_hash_of_their_item_are_gone_on_with(
    books: Path, subject: Subject, tmp_path: Path
) -> None:
    items, path = read_books(books, subject, [200]), tmp_path / "out" / FILE_NAME
    records = run_items(subject, SPECS, items, path.parent, read_book, kind=KIND)
    old = [{k: r[k] for k in r if k != "content"} for r in records.lines]
    path.write_text("".join(json.dumps(r) + "\n" for r in old))
    again = run_items(subject, SPECS, items, path.parent, read_book, kind=KIND)
    assert len(list(again.of(KIND))) == len(list(records.of(KIND)))


def _is(record: dict[str, object], method: str) -> bool:
    return record["length"] == 300 and record["method"] == method
