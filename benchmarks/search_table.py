"""Writes the tables of docs/search.md from the records of search_ablation.py, between two markers.

python benchmarks/search_table.py benchmarks/results/search_ablation.jsonl \
  --answers benchmarks/results/search_eval.jsonl --write docs/search.md

`--answers` holds what `eval_table.py` packed, its methods named table@share.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minference.eval.records import Records
from minference.eval.statistics import answers_by_cell, paired_difference
from minference.json_files import read_json_lines

Right = dict[tuple[Any, int], bool]
MARK = "<!-- ablation -->"
OBJECTIVES = ("output", "mass")


def main() -> None:
    """Prints the tables, or puts them into a page."""
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("records", type=Path)
    given.add_argument("--answers", type=Path, default=None)
    given.add_argument("--write", type=Path, default=None)
    options = given.parse_args()
    asked = answers_of(options.answers) if options.answers else {}
    told = tables(read_json_lines(options.records), asked)
    if not told:
        raise SystemExit(f"{options.records} holds no record of search_ablation.py")
    if options.write is None:
        print(told)
        return
    before, _, after = options.write.read_text(encoding="utf-8").split(MARK)
    page = f"{before}{MARK}\n{told}\n{MARK}{after}"
    options.write.write_text(page, encoding="utf-8")


def answers_of(path: Path) -> dict[str, Right]:
    """Which questions of all tasks each method answered."""
    found: dict[str, Right] = {}
    for (task, *_), methods in answers_by_cell(Records.read(path).lines).items():
        for method, answers in methods.items():
            own = found.setdefault(method, {})
            own |= {((task, prompt), place): right for (prompt, place), right in answers.items()}
    return found


def tables(records: Sequence[Mapping[str, Any]], answers: Mapping[str, Right]) -> str:
    """A table a share of the keys."""
    shares = dict.fromkeys(record["share"] for record in records)
    return "\n\n".join(
        table([r for r in records if r["share"] == share], answers) for share in shares
    )


def table(records: Sequence[Mapping[str, Any]], answers: Mapping[str, Right]) -> str:
    """A caption and a row a table."""
    first = records[0]
    where = first["gpu"] or f"CPU {first['cpu']}"
    rows = [
        f"{first['model'].split('/')[-1]}, {first['length']} tokens, {', '.join(first['tasks'])}, "
        f"{first['share']:.0%} of the keys: "
        f"{first['search_prompts']} prompts to search on, {first['held_out_prompts']} held out, "
        f"space {first['space']}; {where}, {first['date'][:10]}, commit {first['commit'][:7]}.",
        "",
        "| table | chosen by | output score | behind searched | kept mass | behind searched "
        "| answers | behind searched | cost | kernel | predicted density | kinds |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    searched = answers.get(f"searched_output@{first['share']}", {})
    for record in records:
        kind, _, objective = record["table"].rpartition("_")
        name, by = (kind, objective) if objective in OBJECTIVES else (record["table"], "")
        cells = [name.replace("_", "-"), by]
        for own in OBJECTIVES:
            cells.append(f"{record[own]:.4f}")
            behind, error = record[f"{own}_behind_searched"], record[f"{own}_standard_error"]
            cells.append(f"{behind:+.4f} ± {error:.4f}")
        cells += _answers(answers.get(f"{record['table']}@{record['share']}", {}), searched)
        kinds = ", ".join(f"{count} {kind}" for kind, count in record["kinds"].items())
        taken = "-" if record["layer_ms"] is None else f"{record['layer_ms']:.2f} ms"
        cells += [f"{record['row_cost']:.0f}", taken, f"{record['density']:.3f}", kinds]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _answers(own: Right, searched: Right) -> tuple[str, str]:
    behind = paired_difference(searched, own)
    if behind is None:
        return "-", "-"
    right = sum(own.values()) / len(own)
    return f"{right:.3f}", f"{behind.mean:+.3f} ({behind.low:+.3f} to {behind.high:+.3f})"


if __name__ == "__main__":
    main()
