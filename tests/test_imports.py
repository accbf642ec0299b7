"""`import minference` is quick and bare, and every public name resolves."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

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


def available(name: str) -> bool:
    module = minference._EXPORTS.get(name, "minference")
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


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
    names = [
        name
        for name in minference.__all__
        if name not in ("MInference", "attach") and available(name)
    ]
    out = run(
        "import minference\n"
        f"for name in {names!r}: getattr(minference, name)\n"
        "import torch\n"
        "print(torch.cuda.is_initialized(), minference.get_support_models()[0])"
    )
    assert out.split() == ["False", minference.get_support_models()[0]]


def test_all_names_each_export_once() -> None:
    assert minference.__all__ == sorted(minference.__all__)
    assert set(minference.__all__) == {*minference._EXPORTS, "__version__"}
    assert set(minference.__all__) <= set(dir(minference))


@pytest.mark.parametrize("name", minference.__all__)
def test_a_public_name_resolves(name: str) -> None:
    if not available(name):
        pytest.skip(f"{minference._EXPORTS[name]} has not landed yet")
    assert getattr(minference, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'atach'"):
        minference.atach  # noqa: B018
