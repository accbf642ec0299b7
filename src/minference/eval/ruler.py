"""RULER (arXiv 2404.06654) through lm-eval's own tasks: its prompts, settings and scores.

Only the data is built here, by lm-eval's own generators: as many samples as are asked for instead
of 500, and prose of this Python in place of the essays, so that nothing is downloaded.
"""

from __future__ import annotations

import json
import random
import re
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minference.errors import require, unknown_name
from minference.eval.facts import check_same, run_facts
from minference.eval.items import item_table
from minference.eval.records import Record, Records, key_of
from minference.eval.runner import Progress, Subject
from minference.eval.tasks.haystack import NOISE, prose
from minference.json_files import write_text
from minference.methods.spec import MethodSpec

KIND = "ruler"
_CHARS_A_TOKEN = 8
# units of noise or words that lm-eval's generators start from, and tokens they keep for an answer
_FEWEST = 10
_NEEDLE_ANSWER = 128
_PIECES = 400
_LONGEST_ANSWER = 120
_PUNKT_FILES = ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab")


@dataclass(frozen=True)
class Needles:
    """Parameters of a needle task: haystack "repeat", "essay" or "needle", kinds and counts."""

    haystack: str
    keys: str = "words"
    values: str = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1


NEEDLES = {
    "niah_single_1": Needles("repeat"),
    "niah_single_2": Needles("essay"),
    "niah_single_3": Needles("essay", values="uuids"),
    "niah_multikey_1": Needles("essay", num_keys=4),
    "niah_multikey_2": Needles("needle"),
    "niah_multikey_3": Needles("needle", keys="uuids", values="uuids"),
    "niah_multivalue": Needles("essay", num_values=4),
    "niah_multiquery": Needles("essay", num_queries=4),
}
TASKS = (*NEEDLES, "ruler_vt", "ruler_cwe", "ruler_fwe")
"""RULER without its two question-answering tasks, whose texts must be downloaded."""


def resolve_ruler(names: Iterable[str]) -> list[str]:
    """Task names, `ruler` and `niah` spelt out.

    Raises:
        ValueError: an unknown name; the message lists the valid ones.
    """
    groups = {"ruler": TASKS, "niah": tuple(NEEDLES)}
    found: dict[str, None] = {}
    for name in names:
        if name not in groups and name not in TASKS:
            raise unknown_name("RULER task", name, [*groups, *TASKS])
        found |= dict.fromkeys(groups.get(name, (name,)))
    return list(found)


def run_ruler(
    subject: Subject,
    specs: Sequence[MethodSpec],
    tasks: Sequence[str],
    lengths: Sequence[int],
    folder: Path,
    *,
    samples: int,
    command: str = "",
    progress: Progress | None = None,
) -> Records:
    """Runs what the folder does not hold yet; the documents lie there too, so that all agree.

    Raises:
        MissingDependencyError: lm-eval is not installed.
        ValueError: the folder holds results of another model or of another method of the same
            label, or a method refuses its options.
    """
    require("lm_eval", "lm-eval")
    records, facts = Records.open(folder), run_facts(subject, specs, command)
    check_same(records, facts)
    records.append([facts])
    done = records.done(KIND)
    todo = [(t, n, spec) for n in sorted(set(lengths)) for t in tasks for spec in specs]
    for number, (task, length, spec) in enumerate(todo):
        if progress:
            progress(number, len(todo), f"{task} {length} {spec.label}")
        base: Record = {"record": KIND, "task": task, "length": length, "method": spec.label}
        missing = [i for i in range(samples) if key_of(base | {"index": i}) not in done]
        if missing:
            documents = _documents(task, length, samples, subject, folder)
            own = [documents[i] for i in missing if i in documents]
            lines = _evaluate(subject, spec, task, own) if own else []
            records.append([base | line for line in lines])
    if progress:
        progress(len(todo), len(todo), "done")
    return records


def ruler_table(records: Iterable[Mapping[str, Any]]) -> str:
    """A row for each task, length and method; a score is the share of answers in the text."""
    return item_table(records, KIND, "score", "score")


def make_documents(
    task: str,
    length: int,
    count: int,
    tokenizer: Any,  # noqa: ANN401
    sentences: Path,
) -> list[dict[str, Any]]:
    """Documents of a task from lm-eval's generators, the same for the same arguments.

    Args:
        task: one of `TASKS`.
        length: tokens of the longest document, its answer included.
        count: how many.
        tokenizer: counts the tokens.
        sentences: a folder for the sentence splitter's files.
    """
    _use_plain_sentences(sentences)
    import numpy as np

    before = random.getstate(), np.random.get_state()
    random.seed(f"{task}/{length}")
    np.random.seed(42)
    try:
        # the generators print
        with redirect_stdout(sys.stderr):
            if task in NEEDLES:
                return _needle_documents(NEEDLES[task], length, count, tokenizer)
            return _GENERATORS[task](length, count, tokenizer)
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


def _documents(
    task: str, length: int, count: int, subject: Subject, folder: Path
) -> dict[int, dict[str, Any]]:
    """Documents by their number, of which generators leave out some. Those that the folder keeps
    stay as they are, since answers to them may be there; more are drawn where more are asked for.
    """
    path = folder / "ruler" / f"{task}-{length}.json"
    kept: dict[str, Any] = {"asked": 0, "documents": []}
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
    found = kept["documents"]
    if kept["asked"] < count:
        known = {document["index"] for document in found}
        made = make_documents(task, length, count, subject.tokenizer, folder / "ruler" / "nltk")
        found = found + [document for document in made if document["index"] not in known]
        kept = {"asked": count, "documents": found}
        write_text(path, json.dumps(kept, ensure_ascii=False))
    return {document["index"]: document for document in found}


def _needle_documents(
    needles: Needles,
    length: int,
    count: int,
    tokenizer: Any,  # noqa: ANN401
) -> list[dict[str, Any]]:
    from lm_eval.tasks.ruler.niah_utils import TEMPLATE
    from lm_eval.tasks.ruler.prepare_niah import (
        generate_input_output,
        generate_samples,
        get_haystack,
    )

    kinds = {
        "template": TEMPLATE,
        "type_haystack": needles.haystack,
        "type_needle_k": needles.keys,
        "type_needle_v": needles.values,
        "num_needle_k": max(needles.num_keys, needles.num_queries),
        "num_needle_v": needles.num_values,
        "num_needle_q": needles.num_queries,
    }
    if needles.haystack == "essay":
        shortest, answers, _ = generate_input_output(1, ["."], **kinds)
        # other words and numbers may have more tokens
        around = len(tokenizer(shortest + " ".join(answers)).input_ids) * 5 // 4 + 32
        haystack: Any = _prose_pieces(length - _NEEDLE_ANSWER - around, tokenizer)
    else:
        haystack = get_haystack(needles.haystack)  # type: ignore[arg-type]
    return generate_samples(
        haystack, max_seq_length=length, num_samples=count, TOKENIZER=tokenizer, **kinds
    )


def _prose_pieces(tokens: int, tokenizer: Any) -> list[str]:  # noqa: ANN401
    """Prose of at most so many tokens, in few pieces, since the generator takes steps of 500."""
    text = prose(random.Random(0), "heldout", _CHARS_A_TOKEN * max(tokens, 1))
    words = re.sub(r"\s+", " ", text).split(" ")
    fits = bisect_right(
        range(len(words)), tokens, key=lambda n: len(tokenizer(" ".join(words[:n])).input_ids)
    )
    words = words[: max(fits - 1, 1)]
    size = -(-len(words) // _PIECES)
    return [" ".join(words[at : at + size]) for at in range(0, len(words), size)]


def _tracking(length: int, count: int, tokenizer: Any) -> list[dict[str, Any]]:  # noqa: ANN401
    from lm_eval.tasks.ruler.vt_utils import generate_input_output, sys_vartrack_w_noise_random

    draw = sys_vartrack_w_noise_random
    # 500 tokens of a tokenizer over subwords; the generator never ends where its least is too long
    room = max(500, len(tokenizer(NOISE * 20).input_ids))
    solved = draw(tokenizer=tokenizer, num_samples=1, max_seq_length=room, incremental=5)[0]
    least = generate_input_output(_FEWEST, 1, 4)[0] + solved["input"]
    _check_fits("ruler_vt", least, length, tokenizer)
    return draw(tokenizer=tokenizer, num_samples=count, max_seq_length=length, icl_example=solved)


def _common_words(length: int, count: int, tokenizer: Any) -> list[dict[str, Any]]:  # noqa: ANN401
    from lm_eval.tasks.ruler import cwe_utils

    cwe_utils.RNG.seed(42)
    least = "\n".join(cwe_utils.generate_input_output(_FEWEST, length)[:2])
    _check_fits("ruler_cwe", least, length, tokenizer)
    return cwe_utils.sys_word_pair_random(
        num_samples=count, max_seq_length=length, tokenizer=tokenizer
    )


def _check_fits(task: str, least: str, length: int, tokenizer: Any) -> None:  # noqa: ANN401
    """Refuses lengths at which lm-eval's generator would search for ever."""
    tokens = len(tokenizer(least).input_ids) * 21 // 20 + _LONGEST_ANSWER
    if tokens > length:
        raise ValueError(
            f"task {task!r} needs at least {tokens} tokens with this tokenizer, asked for {length}"
        )


def _frequent_words(length: int, count: int, tokenizer: Any) -> list[dict[str, Any]]:  # noqa: ANN401
    from lm_eval.tasks.ruler.fwe_utils import sys_kwext

    return sys_kwext(tokenizer=tokenizer, max_seq_length=length, num_samples=count)


_GENERATORS: dict[str, Callable[[int, int, Any], list[dict[str, Any]]]] = {
    "ruler_vt": _tracking,
    "ruler_cwe": _common_words,
    "ruler_fwe": _frequent_words,
}


def _use_plain_sentences(folder: Path) -> None:
    """A sentence splitter without learnt abbreviations, where NLTK has none installed."""
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        target = folder / "tokenizers" / "punkt_tab" / "english"
        target.mkdir(parents=True, exist_ok=True)
        for name in _PUNKT_FILES:
            (target / name).touch()
        nltk.data.path.append(str(folder.resolve()))


def _evaluate(
    subject: Subject, spec: MethodSpec, task: str, documents: Sequence[Mapping[str, Any]]
) -> list[Record]:
    """lm-eval's answers and scores of some documents."""
    import datasets
    import lm_eval
    from lm_eval import tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    from minference.eval.lm_harness import SparseLM

    folder = Path(tasks.__file__).parent / "ruler"
    lengths = sorted({str(document["max_length"]) for document in documents})
    config = load_yaml(folder / f"{task.removeprefix('ruler_')}.yaml")
    config.pop("tag", None)
    metric = config["metric_list"][0]
    config["metric_list"] = [metric | {"metric": length} for length in lengths]
    config["custom_dataset"] = lambda **_: {"test": datasets.Dataset.from_list(list(documents))}
    lm = SparseLM(subject.model, method=spec.label, tokenizer=subject.tokenizer, batch_size=1)
    with lm.handle:
        results = lm_eval.simple_evaluate(
            lm,
            tasks=[config],
            task_manager=tasks.TaskManager(include_defaults=False),
            bootstrap_iters=0,
            log_samples=True,
        )
    assert results is not None
    density = sum(lm.densities) / len(lm.densities)
    return [_line(sample, density) for sample in results["samples"][task]]


def _line(sample: Mapping[str, Any], density: float) -> Record:
    document = sample["doc"]
    return {
        "index": document["index"],
        "score": sample[str(document["max_length"])],
        "answer": list(document["outputs"]),
        "got": str(sample["filtered_resps"][0])[:400],
        "tokens": document["length"],
        "density": [round(density, 5)],
    }
