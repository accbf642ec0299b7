"""`import minference` is quick and bare, and every public name resolves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import get_args

import pytest

import minference

SRC = Path(minference.__file__).parents[1]
BLOCKED = ("triton", "transformers", "vllm", "matplotlib", "typer", "accelerate", "numpy.testing")
PRELUDE = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED!r}:
            raise ModuleNotFoundError(f"blocked: {{name}}", name=name)
sys.meta_path.insert(0, Block())
"""


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:minference", "-c", PRELUDE + code],
        env={**os.environ, "PYTHONPATH": str(SRC)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_nothing_heavy() -> None:
    out = run(
        "import minference\n"
        "heavy = ('torch', 'triton', 'transformers', 'vllm', 'jaxtyping', 'numpy')\n"
        "print(sorted(set(heavy) & set(sys.modules)))"
    )
    assert out.strip() == "[]"


def test_results_are_read_without_transformers() -> None:
    run("import minference.eval.results")


def test_the_core_needs_torch_alone_and_leaves_cuda_be() -> None:
    names = sorted({*minference.__all__} - {"MInference", "attach"})
    out = run(
        "import minference\n"
        f"for name in {names!r}: getattr(minference, name)\n"
        "import torch\n"
        "print(torch.cuda.is_initialized(), minference.get_support_models()[0])"
    )
    assert out.split() == ["False", minference.get_support_models()[0]]


@pytest.mark.parametrize("name", ["MInference", "attach"])
def test_what_needs_transformers_says_so(name: str) -> None:
    out = run(
        "import minference\n"
        f"try: from minference import {name}\n"
        "except minference.MissingDependencyError as error: print(error)"
    )
    told = "transformers is needed here and is not installed: pip install 'minference[hf]'"
    assert out.splitlines() == [told]


def test_the_command_says_what_it_needs() -> None:
    out = run(
        "import runpy\n"
        "sys.stderr = sys.stdout\n"
        "try: runpy.run_module('minference', run_name='__main__')\n"
        "except SystemExit as stopped: print(stopped.code)"
    )
    told = "error: typer is needed here and is not installed: pip install 'minference[cli]'"
    assert out.splitlines() == [told, "2"]


def test_all_names_each_export_once() -> None:
    assert minference.__all__ == sorted(minference.__all__)
    assert set(minference.__all__) == {*minference._EXPORTS, "__version__"}
    assert set(minference.__all__) <= set(dir(minference))


@pytest.mark.parametrize("name", sorted(minference._EXPORTS.keys() - {"Pattern"}))
def test_a_public_name_is_what_its_module_calls_so(name: str) -> None:
    value = getattr(minference, name)
    if isinstance(value, ModuleType):
        assert value.__name__ == f"minference.{name}"
    else:
        assert value.__name__ == name
        assert value.__module__.startswith(minference._EXPORTS[name])


def test_a_pattern_is_one_of_the_public_kinds() -> None:
    kinds = ("AShape", "BlockSparse", "Dense", "TriShape", "VerticalSlash")
    assert {kind.__name__ for kind in get_args(minference.Pattern)} == set(kinds)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'atach'"):
        minference.atach  # noqa: B018
