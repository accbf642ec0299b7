"""What a run was: model, methods, machine and versions; a folder takes more results of the same."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

import minference
from minference.eval.records import Record, Records
from minference.log import get_logger
from minference.methods.spec import MethodSpec, build_method
from minference.search.progress import fingerprint

if TYPE_CHECKING:
    from minference.eval.runner import Subject

_DIGITS = 16


def content_hash(value: object) -> str:
    """A short hash of what a value is written as, which says all of a method or an example."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:_DIGITS]


def run_facts(subject: Subject, specs: Sequence[MethodSpec], command: str) -> Record:
    """The record of a run; each method is built, so that what it refuses is said before any work.

    Raises:
        ValueError: a method refuses its options.
    """
    device, config = subject.model.device, subject.model.config
    on_gpu = device.type == "cuda"
    return {
        "record": "run",
        "model": subject.name,
        "model_hash": fingerprint(subject.model)[:_DIGITS],
        "methods": [spec.label for spec in specs],
        "method_hashes": {s.label: content_hash(build_method(s, config)) for s in specs},
        "command": command,
        "device": torch.cuda.get_device_name(device) if on_gpu else f"cpu {platform.machine()}",
        "dtype": str(subject.model.dtype).removeprefix("torch."),
        "minference": minference.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def check_same_texts(records: Records, facts: Record) -> None:
    """Refuses a folder whose prompts hide their facts in other texts.

    Args:
        records: of the folder.
        facts: of this run, with the hash of its `texts`; earlier versions noted their Python alone.

    Raises:
        ValueError: other texts.
    """
    for run in records.of("run"):
        kind = "texts" if "texts" in run else "python"
        if run.get(kind, facts[kind]) != facts[kind]:
            raise ValueError(
                f"{records.path} holds answers to prompts with the texts of Python "
                f"{run.get('python')}, and those of this Python {facts['python']} are others; go "
                "on with that one, or name another folder with -o"
            )


def check_same_depths(records: Records, facts: Record) -> None:
    """Refuses a folder whose needles lie at other depths: its prompts are named alike.

    Args:
        records: of the folder.
        facts: of this run, with how many `depths` its needles have, 0 without such a task.

    Raises:
        ValueError: another number of depths.
    """
    others = {run.get("depths") for run in records.of("run")} - {None, 0, facts["depths"]}
    if facts["depths"] and others:
        raise ValueError(
            f"{records.path} holds answers about needles at {others.pop()} depths, and now there "
            f"are {facts['depths']}; ask with --depths as before, or name another folder with -o"
        )


def check_same(records: Records, facts: Record) -> None:
    """Refuses a folder with results of another model, or of a label that meant another method.

    Runs of earlier versions noted names alone; that is logged where their results are gone on with.

    Raises:
        ValueError: another model, or another method of the same label.
    """
    runs, model, hashes = list(records.of("run")), facts["model"], facts["method_hashes"]
    others = {run["model"] for run in runs} - {model}
    if others:
        raise ValueError(
            f"{records.path} holds results of {', '.join(sorted(others))}, not of {model!r}; give "
            "each model a folder of its own"
        )
    if any(run.get("model_hash", facts["model_hash"]) != facts["model_hash"] for run in runs):
        raise ValueError(
            f"{records.path} holds results of {model!r} with other weights, another configuration "
            "or dtype; name another folder with -o"
        )
    noted = [pair for run in runs for pair in run.get("method_hashes", {}).items()]
    changed = {label for label, own in noted if hashes.get(label, own) != own}
    if changed:
        raise ValueError(
            f"{records.path} holds results of {', '.join(sorted(changed))} with other patterns or "
            "options than the label stands for now; name another folder with -o"
        )
    unknown = hashes.keys() & {r.get("method") for r in records.lines} - dict(noted).keys()
    if unknown:
        get_logger(__name__).warning(
            "%s does not say with which weights, patterns and options %s ran; they are taken to be "
            "today's: if they are not, name another folder with -o",
            records.path,
            ", ".join(sorted(unknown)),
        )
