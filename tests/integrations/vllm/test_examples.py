"""The examples, as they are, with the shipped model on the CPU."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.vllm
EXAMPLES = Path(__file__).parents[3] / "examples"


def run(*command: str, **env: str) -> str:
    """What a program prints; it must end well."""
    done = subprocess.run(
        command,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=360,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def test_the_offline_example_answers_dense_and_sparse(settings: dict[str, Any]) -> None:
    program = str(EXAMPLES / "vllm_offline.py")
    out = run(sys.executable, program, settings["model"], "--tokens", "5000", "--memory", "0.1")
    lines = dict(line.split(maxsplit=1) for line in out.splitlines() if " " in line)
    assert lines["dense"].split()[0] == lines["sparse"].split()[0] == lines["right"]
    assert 0.05 < float(lines["density"].strip("[]")) < 0.6


def test_the_server_example_answers_a_request_and_ends(settings: dict[str, Any]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out = run(
        *("bash", str(EXAMPLES / "vllm_server.sh"), settings["model"], "--dtype", "float32"),
        *("--max-model-len", "2048", "--kv-cache-memory-bytes", str(64 << 20), "--enforce-eager"),
        PORT=str(port),
        PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    )
    assert re.search(r'"object": ?"text_completion"', out), out[-2000:]
