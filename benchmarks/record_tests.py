"""Run tests on this machine and record how they ended, with GPU, versions and commit.

python benchmarks/record_tests.py OUT.jsonl [pytest arguments]
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from importlib.metadata import version
from pathlib import Path

from minference.bench.records import Recorder

FAULTS = ("failure", "error")


def main() -> int:
    """Returns pytest's exit code."""
    out, *arguments = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        # pytest-benchmark, where it is installed, warns when tests run in parallel
        command = [sys.executable, "-m", "pytest", f"--junitxml={report}", "-p", "no:benchmark"]
        command += arguments
        code = subprocess.run(command, check=False).returncode
        cases = list(ElementTree.parse(report).iter("testcase"))
    skipped = [case for case in cases if case.find("skipped") is not None]
    failed = [case for case in cases if any(case.find(kind) is not None for kind in FAULTS)]
    Recorder(Path(out)).write(
        {
            "op": "tests",
            "transformers": version("transformers"),
            "passed": len(cases) - len(skipped) - len(failed),
            "skipped": len(skipped),
            "failed": [f"{case.get('classname')}::{case.get('name')}" for case in failed],
            "files": sorted({case.get("classname", "") for case in cases}),
        }
    )
    return code


if __name__ == "__main__":
    sys.exit(main())
