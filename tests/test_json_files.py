"""Files of JSON lines: what is read, and the one error where there is none."""

from pathlib import Path

import pytest

from minference.json_files import read_json_lines


def test_empty_lines_count_for_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}')
    assert read_json_lines(path) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("wrong", [b"# a page", b"[1]", b"7", b"\xff", b'{"a": '])
def test_another_line_is_named(tmp_path: Path, wrong: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n' + wrong)
    with pytest.raises(ValueError, match=r"a\.jsonl must hold one JSON object a line.*line 2"):
        read_json_lines(path)
