"""Results packed for the repository: nothing that the tables need is lost."""

import json
from pathlib import Path

import pytest

from minference.eval.packed import pack, unpack
from minference.eval.records import FILE_NAME, Record, Records
from minference.eval.tables import markdown_table


def lines_of(task: str, method: str, correct: dict[tuple[int, int], int]) -> list[Record]:
    base = {"task": task, "length": 4096, "placement": "end", "split": "heldout", "questions": 3}
    base |= {"method": method}
    lines: list[Record] = []
    for seed in sorted({seed for seed, _ in correct}):
        layers = {"density": [1.0, 0.5], "recall": [1.0, 0.9], "recall_min": [1.0, 0.2]}
        measured = {"tokens": 4090 + seed, "seconds": 1.5, **layers, "output_error": [0.0, 0.25]}
        lines.append({"record": "prefill", **base, "seed": seed, **measured})
    for (seed, index), right in correct.items():
        asked = {"seed": seed, "index": index, "correct": right, "depth": seed / 4}
        lines.append({"record": "question", **base, **asked})
    return lines


LINES = [
    {"record": "run", "model": "m", "command": "c"},
    *lines_of("niah", "dense", {(seed, 0): 1 for seed in range(4)}),
    *lines_of("niah", "a_shape:local=64", {(seed, 0): seed % 2 for seed in range(4)}),
    *lines_of("multikey", "dense", {(2, 0): 1, (2, 2): 0, (4, 1): 1}),
]


def test_unpacked_lines_give_the_same_table() -> None:
    packed = pack(LINES)
    assert [line["record"] for line in packed] == ["run", "cell", "cell", "cell"]
    again = [record for line in packed[1:] for record in unpack(line)]
    assert markdown_table(again) == markdown_table(LINES)


def test_questions_keep_their_places() -> None:
    *_, last = pack(LINES)
    assert (last["seeds"], last["correct"]) == ([2, 5], "1-0 --- -1-")
    found = {(r["seed"], r["index"]): r["correct"] for r in unpack(last) if "index" in r}
    assert found == {(2, 0): 1, (2, 2): 0, (4, 1): 1}


def test_needles_keep_their_depths() -> None:
    first = pack(LINES)[1]
    assert [r["depth"] for r in unpack(first) if "index" in r] == [0.0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize("packed", [True, False])
def test_records_reads_both_forms(packed: bool, tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    path.write_text("".join(json.dumps(r) + "\n" for r in (pack(LINES) if packed else LINES)))
    assert len(list(Records.read(path).of("question"))) == 11
