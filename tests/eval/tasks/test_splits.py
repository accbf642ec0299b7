"""Training and evaluation share no word, number or text."""

from __future__ import annotations

from random import Random

import pytest

from minference.eval.tasks.haystack import documents, hide, noise, prose
from minference.eval.tasks.vocabulary import Vocabulary, is_held_out, word_lists


def test_halves_of_the_word_lists_do_not_meet() -> None:
    train, held_out = word_lists(held_out=False), word_lists(held_out=True)
    for mine, other in zip(train, held_out, strict=True):
        assert set(mine).isdisjoint(other)
        assert len(mine) > len(other) > 70


@pytest.mark.parametrize("draw", ["word", "number", "uuid", "name", "code"])
@pytest.mark.parametrize("split", ["train", "dev", "heldout"])
def test_drawn_strings_belong_to_their_half(draw: str, split: str) -> None:
    vocabulary = Vocabulary(Random(0), split)
    drawn = [getattr(vocabulary, draw)() for _ in range(200)]
    assert len(set(drawn)) == 200
    assert {is_held_out(text) for text in drawn} == {split != "train"}


def test_keys_never_repeat_even_when_the_words_run_out() -> None:
    vocabulary = Vocabulary(Random(0), "heldout")
    keys = [vocabulary.key() for _ in range(12_000)]
    assert len(set(keys)) == 12_000


def test_documents_of_the_halves_differ_and_are_ascii() -> None:
    train, held_out = documents(held_out=False), documents(held_out=True)
    assert set(train).isdisjoint(held_out)
    assert sum(map(len, held_out)) > 200_000
    assert all(text.isascii() and "\r" not in text for text in held_out)


@pytest.mark.parametrize("chars", [1, 2, 500, 70_000])
def test_prose_has_the_length_asked(chars: int) -> None:
    assert len(prose(Random(1), "heldout", chars)) == chars
    assert len(noise(chars)) == chars


def test_prose_begins_again_when_the_text_is_used_up() -> None:
    total = sum(map(len, documents(held_out=True)))
    assert len(prose(Random(1), "heldout", total + 10_000)) == total + 10_000


def test_hide_keeps_the_text_and_the_order_of_the_facts() -> None:
    text = prose(Random(2), "dev", 5000)
    facts = [f"fact {number}" for number in range(9)]
    hidden = hide(Random(3), text, facts)
    lines = hidden.split("\n")
    assert [line for line in lines if line.startswith("fact ")] == facts
    rest = "\n".join(line for line in lines if not line.startswith("fact "))
    assert rest.replace("\n", "") == text.replace("\n", "")


@pytest.mark.parametrize("depth", [0.0, 1.0])
def test_hide_reaches_both_ends(depth: float) -> None:
    hidden = hide(Random(3), "one\ntwo\nthree\n", ["fact"], depth)
    assert hidden == ("fact\none\ntwo\nthree\n" if depth == 0.0 else "one\ntwo\nthree\nfact\n")
