"""What the page shows at each step, without gradio, on a tiny model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from minference.demo.session import Form, Session, Shown
from minference.eval.runner import Subject
from minference.testing import tiny_model

NEEDLE = Path(__file__).parents[2] / "models" / "needle"
SHAPE = "a_shape:sink=64,local=128,min_seq_len=0"
FORM = Form(tokens="1k", seed=1, depth=0.3, method=SHAPE, layer=1, head=2)


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    model = tiny_model("qwen3", max_position_embeddings=2048)
    own = Session(Subject("tiny", model, AutoTokenizer.from_pretrained(NEEDLE)))
    yield own
    own.close()


def last(session: Session, form: Form) -> Shown:
    return list(session.answer(form))[-1]


def test_both_sides_and_the_picture_come_one_by_one(session: Session) -> None:
    pytest.importorskip("matplotlib")
    asked, dense, both, drawn = session.answer(FORM)
    assert asked.status == "Reading 1,025 tokens with dense attention …"
    assert asked.question is not None
    assert "What is the special magic number for" in asked.question
    assert (asked.dense, asked.sparse, asked.picture) == (None, None, None)
    assert dense.dense is not None
    assert dense.sparse is None
    assert both.sparse is not None
    assert both.sparse.density < 0.5
    assert f"{both.sparse.density:.1%} of the attention" in both.status
    assert "right: neither" in both.status  # the weights are random
    assert drawn.picture is not None
    assert drawn.picture.read_bytes().startswith(b"\x89PNG")


def test_own_text_has_no_right_answer(session: Session) -> None:
    shown = last(session, replace(FORM, text="a <b>word</b> " * 30))
    assert shown.question is not None
    assert shown.question.startswith("… ")
    assert "right:" not in shown.status


def test_a_prompt_below_the_threshold_says_so(session: Session) -> None:
    shown = last(session, replace(FORM, method="a_shape"))
    assert "Nothing was left out" in shown.status
    assert shown.sparse is not None
    assert shown.sparse.density == 1
    assert shown.picture is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": " "}, "the prompt is empty"),
        ({"text": "a" * 3000}, "prompt and answer have 3033 tokens, the model takes 2048"),
        ({"tokens": "many"}, "a length must look like 16384, 16k or 1m, got 'many'"),
        ({"tokens": "10"}, "length"),
        ({"tokens": "4k"}, "prompt and answer have 4096 tokens"),
        ({"tokens": "1g"}, "16384, 16k or 1m"),
        ({"method": "a_shap"}, "did you mean 'a_shape'"),
        ({"method": "a_shape:far=3"}, "valid names are"),
        ({"layer": 9}, "layer must be 0 to 3"),
        ({"seed": -1, "tokens": ""}, "got ''"),
    ],
)
def test_bad_input_is_one_sentence(
    session: Session, changes: dict[str, object], message: str
) -> None:
    (shown,) = session.answer(replace(FORM, **changes))  # type: ignore[arg-type]
    assert shown.failed
    assert message in shown.status
    assert "\n" not in shown.status


def test_pictures_go_with_the_session(session: Session) -> None:
    pytest.importorskip("matplotlib")
    own = Session(session.subject)
    picture = last(own, FORM).picture
    assert picture is not None
    own.close()
    assert not picture.exists()
