"""The model card's table from the committed scores: `python -m training.table SCORES.jsonl`."""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path

from minference.eval.statistics import wilson
from minference.json_files import read_json_lines

Key = tuple[str, int, int]


def read_scores(path: Path) -> tuple[dict[Key, list[int]], dict[int, float]]:
    """Exact matches by (task, length, questions a prompt), and bits per byte by length."""
    cells: dict[Key, list[int]] = defaultdict(list)
    bits: dict[int, float] = {}
    for row in read_json_lines(path):
        if row["record"] == "question":
            cells[row["task"], row["length"], row["questions"]].append(row["exact"])
        elif row["record"] == "text":
            bits[row["length"]] = row["bits"]
    return dict(cells), bits


def markdown(path: Path) -> str:
    """One row for each task and number of questions, one column for each length."""
    cells, bits = read_scores(path)
    lengths = sorted({length for _, length, _ in cells})
    rows = list(dict.fromkeys((task, questions) for task, _, questions in sorted(cells)))
    lines = [
        "| task | questions a prompt | " + " | ".join(f"{n:,} tokens" for n in lengths) + " |",
        "|---|---|" + "---|" * len(lengths),
    ]
    for task, questions in rows:
        found = [_cell(cells.get((task, length, questions))) for length in lengths]
        lines.append(f"| {task} | {questions} | " + " | ".join(found) + " |")
    text = ", ".join(f"{value:.3f} in windows of {length:,}" for length, value in bits.items())
    return "\n".join([*lines, "", f"Bits per byte of held-out text: {text}."])


def _cell(found: list[int] | None) -> str:
    if not found:
        return ""
    low, high = wilson(sum(found), len(found))
    return f"{sum(found) / len(found):.3f} [{low:.3f}, {high:.3f}] of {len(found)}"


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Print the table of a file of dense scores.")
    parser.add_argument("scores", type=Path)
    sys.stdout.write(markdown(parser.parse_args().scores) + "\n")


if __name__ == "__main__":
    main()
