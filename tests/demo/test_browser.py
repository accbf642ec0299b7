"""The page in Chromium: fill in the form, press the button, read what is shown.

Needs gradio, playwright and a Chromium of the system; `make test-demo` installs the first two.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import minference

pytest.importorskip("gradio", reason="needs gradio; `make test-demo` installs it")
playwright = pytest.importorskip(
    "playwright.sync_api", reason="needs playwright; `make test-demo` installs it"
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium"),
]
ROOT = Path(__file__).parents[2]
SLOW = 240_000  # milliseconds for two prefills on a busy machine


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The demo of the shipped model, as a user starts it; it must leave nothing behind."""
    folder = tmp_path_factory.mktemp("temporary")
    command = [sys.executable, "-m", "minference", "demo", "models/needle", "--json"]
    source = str(Path(minference.__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
    env["TMPDIR"] = str(folder)
    server = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    line = server.stdout.readline()
    yield json.loads(line)["url"]
    server.send_signal(signal.SIGINT)
    server.stdout.close()
    assert server.wait(30) == 0
    assert [path.name for path in folder.rglob("*") if path.suffix in (".png", ".txt")] == []


@pytest.fixture(scope="module")
def page(address: str) -> Iterator[Any]:
    """The page, and `page.foreign`: what it asked of other machines."""
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1360, "height": 1000})
        page.foreign, page.errors = [], []
        own = (address, "data:", "blob:")
        page.on("request", lambda r: r.url.startswith(own) or page.foreign.append(r.url))
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.goto(address)
        page.wait_for_selector("#go")
        yield page
        browser.close()


def value(page: Any, side: str, label: str) -> str:
    return page.inner_text(f"#{side} [data-value='{label}']")


def choose_tokens(page: Any, tokens: str) -> None:
    page.fill("#tokens input", tokens)
    page.press("#tokens input", "Enter")


def keep_picture(page: Any, name: str) -> None:
    """A screenshot for people, where DEMO_SCREENSHOTS names a folder."""
    folder = os.environ.get("DEMO_SCREENSHOTS")
    if folder:
        page.screenshot(path=str(Path(folder) / f"{name}.png"), full_page=True)


def test_a_hidden_fact_is_found_by_both_sides(page: Any) -> None:
    choose_tokens(page, "4200")
    page.fill("#method textarea, #method input", "minference")
    page.click("#go")
    page.wait_for_selector("#picture img", timeout=SLOW)
    keep_picture(page, "fact")
    answers = {value(page, side, "answer") for side in ("dense", "sparse")}
    assert len(answers) == 1
    (answer,) = answers
    assert f"(hidden: {answer})" in page.inner_text("#question")
    assert "right: dense and sparse" in page.inner_text("#status")
    assert value(page, "dense", "density") == "1.000"
    assert 0 < float(value(page, "sparse", "density")) < 0.6
    for side in ("dense", "sparse"):
        assert float(value(page, side, "first token after").removesuffix(" s")) > 0
    page.wait_for_function("document.querySelector('#picture img').naturalWidth > 500")


@pytest.mark.parametrize(
    ("tokens", "method", "message"),
    [
        ("8k", "a_shap", "unknown method 'a_shap': did you mean 'a_shape'?"),
        ("many", "minference", "a length must look like 16384, 16k or 1m, got 'many'"),
        ("1m", "minference", "the model takes 262144; shorten the prompt"),
    ],
)
def test_bad_input_is_one_sentence(page: Any, tokens: str, method: str, message: str) -> None:
    choose_tokens(page, tokens)
    page.fill("#method textarea, #method input", method)
    page.click("#go")
    page.wait_for_function(
        "wanted => document.querySelector('#status .failed')?.innerText.includes(wanted)",
        arg=message,
        timeout=SLOW,
    )
    keep_picture(page, "error")


def test_own_text_is_text_and_no_markup(page: Any, tmp_path: Path) -> None:
    page.get_by_label("My own text").check()
    text = (
        "def f(x):\n    return x\n" * 20 + "<img src=x onerror='document.title=1'> ${1+1}\ndef f("
    )
    page.fill("#text textarea", text)
    page.fill("#method textarea, #method input", "a_shape:min_seq_len=0")
    page.click("#go")
    page.wait_for_selector("#picture img", timeout=SLOW)
    keep_picture(page, "own")
    assert "<img src=x onerror='document.title=1'> ${1+1}" in page.inner_text("#question")
    assert page.title() == "minference"


def test_a_taken_port_is_one_sentence(address: str) -> None:
    port = address.rstrip("/").rpartition(":")[2]
    command = [sys.executable, "-m", "minference", "demo", "models/needle", "--port", port]
    env = {**os.environ, "PYTHONPATH": str(Path(minference.__file__).parents[1])}
    done = subprocess.run(
        [*command, "--quiet"], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    told = done.stderr.strip().splitlines()[-1]
    assert told.startswith(f"error: 127.0.0.1 cannot be listened on, port {port}")


def test_nothing_was_asked_of_other_machines(page: Any) -> None:
    assert page.foreign == []
    assert page.errors == []
