"""Every python block of the documentation runs as it stands, and what it refers to is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINKED = [*PAGES, ROOT / "DESIGN.md", ROOT / "CONTRIBUTING.md"]
BLOCKS = [
    pytest.param(code, id=f"{page.name}-{number}")
    for page in PAGES
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


@pytest.mark.parametrize("code", BLOCKS)
def test_a_python_block_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "<documentation>", "exec"), {"__name__": "__main__"})


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^( *)```.*?^\1```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Names of a page's headings, as mkdocs makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", x).strip().lower()) for x in plain}


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.name)
def test_a_link_leads_somewhere(page: Path) -> None:
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        name, _, anchor = target.partition("#")
        to = page.parent / name if name else page
        if "://" not in target and not (to.exists() and (not anchor or anchor in anchors(to))):
            dead.append(target)
    assert dead == []


def test_the_map_names_what_is_there() -> None:
    (block,) = re.findall(r"```\n(src/minference/\n.*?)```", PAGES[0].read_text(), re.DOTALL)
    folders, named = [ROOT], []
    # a line that goes on with the one before it begins under its words
    for indent, name in re.findall(r"^((?:  ){0,2})(\S+)", block, re.MULTILINE):
        del folders[len(indent) // 2 + 1 :]
        folders.append(folders[-1] / name)
        named.append(folders[-1])
    assert ROOT / "src/minference/ops/estimate" in named
    missing = [x for x in named if not x.exists()]
    assert missing == []
