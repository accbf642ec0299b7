"""Writes the table of docs/search.md from the records of search_ablation.py, between two markers.

python benchmarks/search_table.py benchmarks/results/search_ablation.jsonl --write docs/search.md
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MARK = "<!-- ablation -->"
OBJECTIVES = ("output", "mass")


def main() -> None:
    """Prints the table, or puts it into a page."""
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("records", type=Path)
    given.add_argument("--write", type=Path, default=None)
    options = given.parse_args()
    lines = options.records.read_text(encoding="utf-8").splitlines()
    told = table([json.loads(line) for line in lines])
    if options.write is None:
        print(told)
        return
    before, _, after = options.write.read_text(encoding="utf-8").split(MARK)
    page = f"{before}{MARK}\n{told}\n{MARK}{after}"
    options.write.write_text(page, encoding="utf-8")


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """A caption, a row a table, and whether the searched one is ahead by its own objective."""
    first = records[0]
    where = first["gpu"] or f"CPU {first['cpu']}"
    rows = [
        f"{first['model'].split('/')[-1]}, {first['length']} tokens, {', '.join(first['tasks'])}: "
        f"{first['search_prompts']} prompts to search on, {first['held_out_prompts']} held out, "
        f"space {first['space']}; {where}, {first['date'][:10]}, commit {first['commit'][:7]}.",
        "",
        "| table | chosen by | output score | behind searched | kept mass | behind searched "
        "| cost | density | kinds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        kind, _, objective = record["table"].rpartition("_")
        name, by = (kind, objective) if objective in OBJECTIVES else (record["table"], "")
        cells = [name.replace("_", "-"), by]
        for own in OBJECTIVES:
            cells.append(f"{record[own]:.4f}")
            behind, error = record[f"{own}_behind_searched"], record[f"{own}_standard_error"]
            cells.append(f"{behind:+.4f} ± {error:.4f}")
        kinds = ", ".join(f"{count} {kind}" for kind, count in record["kinds"].items())
        cells += [f"{record['row_cost']:.0f}", f"{record['density']:.3f}", kinds]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
