"""A folder takes more results only of what its results were of: the same model, methods, items."""

import json
import logging
from pathlib import Path

import pytest
import torch

from minference.eval.facts import (
    check_same,
    check_same_depths,
    check_same_texts,
    content_hash,
    run_facts,
)
from minference.eval.records import FILE_NAME, Records
from minference.eval.runner import Subject
from minference.head_patterns import default_patterns
from minference.methods.spec import parse_methods
from minference.patterns import AShape, Dense

SPECS = parse_methods("dense,a_shape:sink=8,local=64")


def begin(folder: Path, facts: dict[str, object]) -> Records:
    records = Records.open(folder)
    records.append([facts])
    return Records.open(folder)


def test_the_same_run_goes_on_with_more_or_fewer_methods(tmp_path: Path, subject: Subject) -> None:
    records = begin(tmp_path, run_facts(subject, SPECS, ""))
    for specs in (SPECS, SPECS[:1], parse_methods("dense,grouped")):
        check_same(records, run_facts(subject, specs, "another command"))


def test_other_weights_are_refused(tmp_path: Path, subject: Subject) -> None:
    records = begin(tmp_path, run_facts(subject, SPECS, ""))
    with torch.no_grad():
        subject.model.lm_head.weight.mul_(2)
    with pytest.raises(ValueError, match=r"'tiny' with other weights.* -o"):
        check_same(records, run_facts(subject, SPECS, ""))


def test_a_label_that_means_another_method_is_refused(tmp_path: Path, subject: Subject) -> None:
    table = tmp_path / "tab.json"
    specs = parse_methods(f"dense,minference:patterns={table}")
    default_patterns(4, 4, Dense()).save(table)
    records = begin(tmp_path, run_facts(subject, specs, ""))
    check_same(records, run_facts(subject, specs, ""))
    default_patterns(4, 4, AShape(1, 1)).save(table)
    with pytest.raises(ValueError, match=r"tab\.json with other patterns or options .* -o"):
        check_same(records, run_facts(subject, specs, ""))
    check_same(records, run_facts(subject, SPECS, ""))


def test_other_texts_are_refused(tmp_path: Path, subject: Subject) -> None:
    facts = run_facts(subject, SPECS, "") | {"texts": "a"}
    records = begin(tmp_path, facts)
    check_same_texts(records, facts)
    check_same_texts(records, facts | {"python": "3.99.0"})  # the same texts came with it
    with pytest.raises(ValueError, match=r"prompts with the texts of Python 3.* -o"):
        check_same_texts(records, facts | {"texts": "b"})


def test_needles_at_other_depths_are_refused(tmp_path: Path, subject: Subject) -> None:
    facts = run_facts(subject, SPECS, "")
    records = begin(tmp_path, facts)
    check_same_depths(records, facts | {"depths": 7})
    records.append([facts | {"depths": 0}, facts | {"depths": 5}])
    for depths in (0, 5):
        check_same_depths(records, facts | {"depths": depths})
    with pytest.raises(ValueError, match=r"needles at 5 depths, and now there are 7; .* -o"):
        check_same_depths(records, facts | {"depths": 7})


def test_before_texts_were_noted_the_python_counts(tmp_path: Path, subject: Subject) -> None:
    facts = run_facts(subject, SPECS, "")
    records = begin(tmp_path, facts)
    check_same_texts(records, facts | {"texts": "a"})
    with pytest.raises(ValueError, match=r"those of this Python 3\.99\.0 are others"):
        check_same_texts(records, facts | {"texts": "a", "python": "3.99.0"})


def test_a_folder_of_an_earlier_version_is_gone_on_with_and_says_what_it_lacks(
    tmp_path: Path, subject: Subject, caplog: pytest.LogCaptureFixture
) -> None:
    asked = {"task": "t", "length": 1, "index": 0, "method": "dense", "score": 1, "density": [1]}
    lines = [{"record": "run", "model": "tiny"}, {"record": "ruler", **asked}]
    (tmp_path / FILE_NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))
    facts = run_facts(subject, SPECS, "")
    with caplog.at_level(logging.WARNING, logger="minference"):
        check_same(Records.open(tmp_path), facts)
    assert "with which weights, patterns and options dense ran" in caplog.text
    caplog.clear()
    check_same(begin(tmp_path, facts), facts)
    assert caplog.text == ""


def test_the_hash_is_the_same_in_every_process() -> None:
    assert content_hash((1, "a")) == "2a123b2622700355"
    assert content_hash((1, "b")) != content_hash((1, "a"))
