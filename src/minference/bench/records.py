"""Benchmark records: one JSON object a line, with everything that says what was measured where."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch


def _output(*command: str) -> str | None:
    """First line that a program prints, None where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None


def _triton_version() -> str | None:
    try:
        import triton
    except ModuleNotFoundError:
        return None
    return triton.__version__


def environment() -> dict[str, object]:
    """Hardware, versions, commit, time and command of this process.

    MINFERENCE_BENCH_COMMIT names the commit where the tree is no checkout.
    """
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    commit = os.environ.get("MINFERENCE_BENCH_COMMIT") or _output("git", "rev-parse", "HEAD")
    return {
        "gpu": gpu,
        "cpu": platform.machine(),
        "driver": _output(*query) if gpu else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": _triton_version(),
        "python": platform.python_version(),
        "commit": commit,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


class Recorder:
    """Appends records to a JSONL file as they come, each with the environment of the run."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.environment = environment()
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("a").close()  # tried before anything is measured

    def write(self, record: Mapping[str, object]) -> dict[str, object]:
        """Adds the environment to a record, stores it and returns it."""
        full = {**record, **self.environment}
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(full) + "\n")
        return full
