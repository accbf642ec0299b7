"""The architecture, enforced on the source: imports go down the floors, and files stay small."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "minference"
FILES = sorted(PACKAGE.rglob("*.py"))

FLOOR_OF = {
    "index": 1,
    "index_check": 1,
    "index_samples": 1,
    "index_tiles": 1,
    "ops": 2,
    "functional": 3,
    "methods": 3,
    "integrations": 4,
    "testing": 4,
    "search": 5,
    "eval": 5,
    "bench": 5,
    "viz": 5,
    "cli": 6,
    "__main__": 7,
    "demo": 6,
}
FLOOR_0 = {
    "__init__",
    "env",
    "errors",
    "head_patterns",
    "json_files",
    "lengths",
    "model_config",
    "log",
    "patterns",
    "provenance",
    "upstream_json",
}
# where an optional package may be imported at all
OPTIONAL = {
    "triton": ("ops", "bench", "testing"),
    "cuda": ("ops",),
    "transformers": ("integrations", "eval", "search", "bench", "cli", "demo", "testing"),
    "accelerate": ("integrations", "cli"),
    "vllm": ("integrations",),
    "matplotlib": ("viz",),
    "gradio": ("demo",),
    "typer": ("cli",),
    "rich": ("cli",),
    "lm_eval": ("eval",),
    "datasets": ("eval",),
    "numpy": ("bench", "eval", "viz", "testing", "demo"),
    "psutil": ("bench", "cli", "integrations"),
    "safetensors": ("eval", "testing", "integrations", "cli", "search"),
    "tokenizers": ("eval", "testing", "cli"),
    "huggingface_hub": ("integrations", "search", "cli"),
}
OPTIMISED = [
    path
    for path in FILES
    if "ops" in path.parts and any(word in str(path) for word in ("torch_cpu", "triton", "hopper"))
]
KERNEL_FILES = ("triton", "hopper", "cuda")


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def floor_of(part: str) -> int:
    return 0 if part in FLOOR_0 else FLOOR_OF[part]


def imports_of(path: Path) -> Iterator[tuple[str, int]]:
    """Absolute names that a file imports for real (not for type checkers alone), with lines."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
        for statement in block.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: imports are absolute here"
            module = node.module or ""
            if module == "minference":
                yield from ((f"minference.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield module, node.lineno


def test_every_part_has_a_floor() -> None:
    assert {part_of(path) for path in FILES} <= FLOOR_OF.keys() | FLOOR_0


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_the_floors(path: Path) -> None:
    part = part_of(path)
    wrong = []
    for name, line in imports_of(path):
        if not name.startswith("minference."):
            continue
        target = name.split(".")[1]
        target = target if target in FLOOR_OF else "__init__" if target not in FLOOR_0 else target
        if target != part and floor_of(target) > floor_of(part):
            wrong.append(f"line {line}: floor {floor_of(part)} imports {name}")
    assert wrong == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_optional_packages_stay_where_they_belong(path: Path) -> None:
    part = part_of(path)
    wrong = [
        f"line {line}: {part} imports {name}"
        for name, line in imports_of(path)
        if part not in OPTIONAL.get(name.split(".")[0], (part,))
    ]
    assert wrong == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_floor_0_needs_the_standard_library_alone(path: Path) -> None:
    if floor_of(part_of(path)) > 0:
        return
    outside = {name.split(".")[0] for name, _ in imports_of(path)} & {"torch", "jaxtyping"}
    assert outside == set()


def functions_of(path: Path) -> set[str]:
    return {n.name for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)}


@pytest.mark.parametrize("path", OPTIMISED, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_an_optimised_op_never_calls_its_oracle(path: Path) -> None:
    """Types and shared formulas may come from the reference; what it is the oracle of may not."""
    wrong = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("minference.ops"):
            names = {alias.name for alias in node.names}
            own = functions_of(path) if (node.module or "").endswith(".reference") else set()
            if "reference" in names or names & own:
                wrong.append(f"line {node.lineno}: {sorted(names)} of {node.module}")
    assert wrong == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_stays_within_its_cap(path: Path) -> None:
    cap = 500 if any(word in str(path.relative_to(PACKAGE)) for word in KERNEL_FILES) else 400
    assert len(path.read_text(encoding="utf-8").splitlines()) <= cap


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_print_outside_the_command_line(path: Path) -> None:
    if part_of(path) in ("cli", "demo"):
        return
    calls = [
        node.lineno
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]
    assert calls == []
