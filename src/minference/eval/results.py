"""Every kind of result in a folder, as tables and as plain data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from minference.eval import pg19, ruler
from minference.eval.infinitebench import run as infinitebench
from minference.eval.items import summaries
from minference.eval.records import Record
from minference.eval.tables import markdown_table

_SCORES = (
    "Exact match: greedy decoding gives exactly the answer's tokens; 95 % Wilson intervals. "
    "To dense: paired difference on the same questions, 95 % bootstrap interval over prompts. "
    "Density: share of the causal area that was computed."
)
_ITEMS = (
    "Means with 95 % bootstrap intervals over items; to dense: difference on the same items. "
    "Density: share of the causal area that was computed."
)
_KINDS = {
    ruler.KIND: ("RULER", "score", ruler.ruler_table),
    infinitebench.KIND: ("InfiniteBench", "score", infinitebench.score_table),
    pg19.KIND: ("Perplexity of books", "bits_per_byte", pg19.perplexity_table),
}


def result_tables(records: Iterable[Record]) -> dict[str, tuple[str, str]]:
    """Note and markdown table by heading, of each kind of result that there is."""
    lines = list(records)
    kinds = {record["record"] for record in lines}
    found = {"Scores": (_SCORES, markdown_table(lines))} if "question" in kinds else {}
    for kind, (heading, _, table) in _KINDS.items():
        if kind in kinds:
            found[heading] = _ITEMS, table(lines)
    return found


def item_scores(records: Iterable[Record]) -> list[dict[str, Any]]:
    """The rows of the tables but for the generated tasks' as plain data."""
    lines = list(records)
    return [
        {"kind": kind, "measure": value, **asdict(found)}
        for kind, (_, value, _) in _KINDS.items()
        for found in summaries(lines, kind, value)
    ]
