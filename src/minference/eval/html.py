"""One self-contained HTML page of an evaluation: tables, needle maps, recall, wrong answers.

Pictures are inlined, nothing is fetched, so that the file can be mailed or archived.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from minference.errors import require
from minference.eval.records import Record
from minference.eval.results import result_tables
from minference.eval.tables import BASELINE
from minference.json_files import write_text
from minference.viz.needle import needle_figure, needle_grids, needle_methods
from minference.viz.recall import recall_figure, recall_points

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WRONG_ANSWERS = 20
_DPI = 110
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1400px; margin: 2rem auto;
  padding: 0 1.2rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: left;
  white-space: nowrap; }
th { background: var(--soft); }
img { max-width: 100%; border-radius: 4px; background: white; }
code { font-size: .84rem; } pre { background: var(--soft); padding: .7rem;
  white-space: pre-wrap; overflow-wrap: anywhere; }
"""


def write_report(
    records: Iterable[Record], path: Path, *, title: str, pictures: Path | None = None
) -> list[Path]:
    """Writes the page, and its pictures as PNG files too if a folder is given.

    Returns:
        The files written, the page first.

    Raises:
        ValueError: records without a result.
        MissingDependencyError: matplotlib is not installed.
    """
    require("matplotlib", "viz")
    lines = list(records)
    drawn = dict(_figures(lines))
    images = {name: _png(figure) for name, (_, figure) in drawn.items()}
    captions = {name: caption for name, (caption, _) in drawn.items()}
    tables = result_tables(lines)
    if not tables:
        raise ValueError(
            "nothing to report: expected results of `minference eval`, got none; run it first"
        )
    body = [f"<h1>{html.escape(title)}</h1>", *_facts(lines)]
    for heading, (note, table) in tables.items():
        body += [f"<h2>{heading}</h2>", f"<p>{html.escape(note)}</p>", _html_table(table)]
    for name, data in images.items():
        body += [f"<h2>{html.escape(captions[name])}</h2>", _image(data, captions[name])]
    body += _wrong_answers(lines)
    write_text(path, _page(title, body))
    written = [path]
    if pictures is not None:
        pictures.mkdir(parents=True, exist_ok=True)
        for name, data in images.items():
            written.append(pictures / f"{name}.png")
            written[-1].write_bytes(data)
    return written


def _figures(lines: Sequence[Record]) -> Iterator[tuple[str, tuple[str, Figure]]]:
    """Name, caption and figure of each picture that the results allow."""
    methods = needle_methods(lines)
    for method in [name for name in methods if name != BASELINE] or methods:
        dense, sparse, difference = needle_grids(lines, method)
        title = f"Needle in a haystack: {method}"
        maps = {BASELINE: dense, method: sparse}
        figure = needle_figure(maps, None if method == BASELINE else difference, title=title)
        yield f"needle-{_slug(method)}", (title, figure)
    points = recall_points(lines)
    if points:
        title = "Recall against density by layer, means over all prompts"
        yield "recall", (title, recall_figure(points, title=title))


def _facts(lines: Sequence[Record]) -> list[str]:
    """Model, machine and versions of each run, and the commands that were typed."""
    runs = [record for record in lines if record["record"] == "run"]
    names = ("model", "device", "dtype", "minference", "torch", "python")
    seen = dict.fromkeys(tuple(str(run.get(name, "")) for name in names) for run in runs)
    rows = [f"| {' | '.join(row)} |" for row in seen]
    commands = dict.fromkeys(str(run["command"]) for run in runs if run.get("command"))
    found = []
    if rows:
        found.append(_html_table("\n".join([f"| {' | '.join(names)} |", "|---|", *rows])))
    if commands:
        found.append(f"<pre>{html.escape(chr(10).join(commands))}</pre>")
    return found


def _wrong_answers(lines: Sequence[Record]) -> list[str]:
    """The first wrong answers, expected beside read."""
    wrong = [r for r in lines if r["record"] == "question" and not r["correct"]]
    if not wrong:
        return []
    names = ("method", "task", "length", "seed", "index", "answer", "got")
    rows = "".join(_row("td", [repr(r.get(n))[:80] for n in names]) for r in wrong[:WRONG_ANSWERS])
    heading = f"<h2>Wrong answers ({len(wrong)}, {min(len(wrong), WRONG_ANSWERS)} shown)</h2>"
    return [heading, f'<div class="wide"><table>{_row("th", names)}{rows}</table></div>']


def _html_table(markdown: str) -> str:
    """A markdown table as HTML; text between backticks becomes code."""
    head, _, *rows = markdown.splitlines()
    cells = [[cell.strip() for cell in row.strip().strip("|").split("|")] for row in (head, *rows)]
    body = "".join(_row("td", row) for row in cells[1:])
    return f'<div class="wide"><table>{_row("th", cells[0])}{body}</table></div>'


def _row(tag: str, cells: Iterable[str]) -> str:
    inner = (re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(cell)) for cell in cells)
    return f"<tr>{''.join(f'<{tag}>{cell}</{tag}>' for cell in inner)}</tr>"


def _image(data: bytes, caption: str) -> str:
    encoded = base64.b64encode(data).decode()
    return f'<img alt="{html.escape(caption)}" src="data:image/png;base64,{encoded}">'


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")


def _page(title: str, body: Sequence[str]) -> str:
    head = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>"
    )
    return f"{head}\n<body>\n{chr(10).join(body)}\n</body></html>\n"
