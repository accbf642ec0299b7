"""RULER through lm-eval: documents of the asked length, the same for every method, and scores."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from minference.errors import MissingDependencyError
from minference.eval import ruler
from minference.eval.ruler import (
    KIND,
    NEEDLES,
    TASKS,
    make_documents,
    resolve_ruler,
    ruler_table,
    run_ruler,
)
from minference.eval.runner import Subject
from minference.methods.spec import parse_methods
from minference.testing import tiny_model

ROOT = Path(__file__).parents[2]
SPECS = parse_methods("dense,a_shape:sink=8,local=64")


def lm_eval_or_skip() -> Any:
    return pytest.importorskip("lm_eval", reason="needs the extra lm-eval (650 MB)")


@pytest.fixture
def bytes_subject() -> Subject:
    """A random model with the shipped tokenizer of bytes, which lm-eval can use."""
    transformers = pytest.importorskip("transformers")
    model = tiny_model("qwen3")
    model.set_attn_implementation("sdpa")
    return Subject(
        "tiny", model, transformers.AutoTokenizer.from_pretrained(ROOT / "models/needle")
    )


def test_groups_are_spelt_out() -> None:
    assert resolve_ruler(["niah_single_2", "niah"])[0] == "niah_single_2"
    assert len(resolve_ruler(["niah_single_2", "niah"])) == len(NEEDLES)
    assert resolve_ruler(["ruler"]) == list(TASKS)
    with pytest.raises(ValueError, match="did you mean 'ruler_vt'"):
        resolve_ruler(["ruler_v"])


def test_without_lm_eval_the_error_names_the_extra(
    tmp_path: Path, subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'minference\[lm-eval\]'"):
        run_ruler(subject, SPECS, ["niah_single_1"], [1024], tmp_path, samples=1)


def test_documents_that_were_answered_stay(
    tmp_path: Path, subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where another Python draws others, and a generator leaves one out."""
    drawn: list[int] = []

    def draw(task: str, length: int, count: int, *_: object) -> list[dict[str, Any]]:
        drawn.append(count)
        return [{"index": i, "input": f"{count}/{i}"} for i in range(count) if i != 1]

    monkeypatch.setattr(ruler, "make_documents", draw)
    for count, asked in ((3, [3]), (3, [3]), (2, [3]), (5, [3, 5]), (5, [3, 5])):
        found = ruler._documents("ruler_vt", 1024, count, subject, tmp_path)
        assert drawn == asked
    assert {i: document["input"] for i, document in found.items()} == {
        0: "3/0",
        2: "3/2",
        3: "5/3",
        4: "5/4",
    }


def test_the_entry_point_names_the_model() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    assert declared["lm_eval.models"] == {"minference": "minference.eval.lm_harness:SparseLM"}


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.filterwarnings("default")
def test_documents_fill_the_length_and_hold_their_answers(
    task: str, bytes_subject: Subject, tmp_path: Path
) -> None:
    lm_eval_or_skip()
    length = 8192
    found = make_documents(task, length, 2, bytes_subject.tokenizer, tmp_path)
    assert found == make_documents(task, length, 2, bytes_subject.tokenizer, tmp_path)
    assert found[0]["input"] != found[1]["input"]
    # lm-eval's steps of 25 lines are a quarter of this length in bytes
    full = 0.9 if task in NEEDLES and NEEDLES[task].haystack == "essay" else 0.5
    for document in found:
        assert full * length < len(document["input"]) < length
        assert all(answer in document["input"] for answer in document["outputs"])


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("task", ["ruler_vt", "ruler_cwe"])
def test_a_length_that_cannot_hold_a_task_is_refused(
    task: str, bytes_subject: Subject, tmp_path: Path
) -> None:
    lm_eval_or_skip()
    with pytest.raises(ValueError, match=f"'{task}' needs at least .* asked for 1024"):
        make_documents(task, 1024, 1, bytes_subject.tokenizer, tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_run_scores_every_method_on_the_same_documents_and_goes_on(
    bytes_subject: Subject, tmp_path: Path
) -> None:
    lm_eval_or_skip()
    tasks = ["niah_single_1"]
    run_ruler(bytes_subject, SPECS[:1], tasks, [1024], tmp_path, samples=1)
    records = run_ruler(bytes_subject, SPECS, tasks, [1024], tmp_path, samples=2)
    own = list(records.of(KIND))
    kept = json.loads((tmp_path / "ruler" / "niah_single_1-1024.json").read_text())["documents"]
    assert sorted((r["method"], r["index"]) for r in own) == sorted(
        (spec.label, index) for spec in SPECS for index in range(2)
    )
    assert all(r["answer"] == kept[r["index"]]["outputs"] for r in own)
    assert all(r["score"] == float(r["answer"][0] in r["got"]) for r in own)
    density = {r["method"]: r["density"][0] for r in own}
    assert density["dense"] == 1.0
    assert density[SPECS[1].label] < 0.6
    assert len(ruler_table(records.lines).splitlines()) == 4


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_dense_method_answers_as_hf_does(bytes_subject: Subject) -> None:
    lm_eval_or_skip()
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from minference.eval.lm_harness import SparseLM

    model, tokenizer = bytes_subject.model, bytes_subject.tokenizer
    request = Instance("generate_until", {}, ("abcabc" * 50, {"until": [], "max_gen_toks": 9}), 0)
    plain = HFLM(model, tokenizer=tokenizer, batch_size=1)
    expected = plain.generate_until([request]), plain.loglikelihood([_pair()])
    lm = SparseLM(model, method="dense", tokenizer=tokenizer, batch_size=1)
    with lm.handle:
        assert lm.generate_until([request]) == expected[0]
        assert lm.loglikelihood([_pair()])[0][0] == pytest.approx(expected[1][0][0], rel=1e-5)
    assert lm.densities == [1.0, 1.0]
    sparse = SparseLM(model, method="a_shape:sink=8;local=64", tokenizer=tokenizer, batch_size=1)
    with sparse.handle:
        sparse.generate_until([request])
    info = sparse.get_model_info()
    assert info["minference_method"] == "a_shape:sink=8,local=64"
    assert info["minference_density"] < 1


def _pair() -> Any:
    from lm_eval.api.instance import Instance

    return Instance("loglikelihood", {}, ("abcabc" * 40, " d"), 0)
