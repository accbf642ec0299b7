"""Engines for the tests that run vLLM's real client on the CPU with the shipped model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
NEEDLE = ROOT / "models" / "needle"
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}
SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_num_seqs": 4,
    "max_model_len": 18_432,
    "max_num_batched_tokens": 1024,
    "kv_cache_memory_bytes": 384 << 20,
}
# programs that the tests start in processes of their own
PRELUDE = """
import json, os, sys
from vllm import LLM, SamplingParams
def ids(llm, prompts, tokens=12):
    greedy = SamplingParams(temperature=0, max_tokens=tokens)
    return [list(o.outputs[0].token_ids) for o in llm.generate(prompts, greedy, use_tqdm=False)]
"""

if find_spec("vllm"):
    os.environ.update(ENVIRONMENT)


@pytest.fixture(scope="session")
def settings() -> dict[str, Any]:
    """Arguments of every engine: the shipped model in chunks of 1024 tokens."""
    if not NEEDLE.is_dir():
        pytest.skip("models/needle is not there")
    return {"model": str(NEEDLE), **SETTINGS}


@pytest.fixture(scope="session")
def prompts() -> list[str]:
    """Three prompts that need several chunks, share steps with decodes, and differ in length."""
    from minference.eval.tasks import make_sample

    return [make_sample("single", length, 3).text(0) for length in (2900, 700, 1600)]


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Callable[..., tuple[int, Any, str]]]:
    """Runs a script in a process of its own: exit status, the JSON of its last line, its log."""

    def run(
        script: str, values: dict[str, Any], *, seconds: int = 380, **env: str
    ) -> tuple[int, Any, str]:
        path = tmp_path / "program.py"
        given = "\n".join(f"{name} = {value!r}" for name, value in values.items())
        body = textwrap.indent(f"{given}\n{textwrap.dedent(script)}", "    ")
        path.write_text(f"{PRELUDE}\ndef main():\n{body}\nif __name__ == '__main__':\n    main()\n")
        done = subprocess.run(
            [sys.executable, str(path)],
            env={**os.environ, **ENVIRONMENT, **env},
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        result = json.loads(lines[-1].removeprefix("RESULT ")) if lines else None
        return done.returncode, result, done.stdout + done.stderr

    return run
