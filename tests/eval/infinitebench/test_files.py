"""Files of the published form: what is read, and what is said of a line that is none."""

import json
from pathlib import Path
from typing import Any

import pytest

from minference.eval.infinitebench.files import Example, read_examples, to_line

LINE = {"id": 3, "context": "c", "input": "i", "answer": ["a"], "options": []}


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return path


def test_the_name_of_a_file_is_its_task(tmp_path: Path) -> None:
    options = ["w", "x", "y", "z"]
    path = write(tmp_path / "code_debug.jsonl", LINE | {"answer": ["x"], "options": options})
    found = list(read_examples(path))
    assert found == [Example("code_debug", 3, "c", "i", ("x",), ("w", "x", "y", "z"))]
    assert next(read_examples(path, "passkey")).task == "passkey"


def test_older_lines_are_read_too(tmp_path: Path) -> None:
    old = {"content": "书", "input": "i", "answer": "a"}
    path = write(tmp_path / "passkey.jsonl", old, {**old, "answer": [[1, 2]]})
    first, second = read_examples(path)
    assert (first.id, first.context, first.answers, first.options) == (0, "书", ("a",), ())
    assert (second.id, second.answers) == (1, (1, 2))


def test_a_written_example_is_read_back(tmp_path: Path) -> None:
    example = Example("longbook_qa_chn", "b7", "书", "问", ("答", "二"), ())
    (tmp_path / "longbook_qa_chn.jsonl").write_text(to_line(example) + "\n")
    assert list(read_examples(tmp_path / "longbook_qa_chn.jsonl")) == [example]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"context"', "line 2 is not JSON"),
        ("[1]", "line 2 must be an object"),
        ('{"context": "c", "input": "i"}', "without answer"),
        ('{"context": "c", "input": "i", "answer": []}', "got an empty list"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "passkey.jsonl"
    path.write_text(json.dumps(LINE) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=message):
        list(read_examples(path))


def test_unknown_tasks_and_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no InfiniteBench file"):
        read_examples(tmp_path / "passkey.jsonl")
    with pytest.raises(ValueError, match="did you mean 'passkey'"):
        read_examples(write(tmp_path / "passkeys.jsonl", LINE))
