"""Common and frequent words in RULER's form (arXiv 2404.06654): answers spread over all the text.

The whole text is one question's evidence, so these tasks ask one question however many are wanted
and `num_questions` above 1 is refused by `make_sample`.
"""

from __future__ import annotations

from collections import Counter

from minference.eval.tasks.draft import Brief, Draft
from minference.eval.tasks.sample import Question

_COMMON = 10
_LONG = 24_000
_ZIPF = 2.0
_CODED = 60


def build_common_words(brief: Brief) -> Draft:
    """A numbered list in which ten words come 30 times and all others 3 times (6 and 1 if short).

    The answer names them in the order of their first appearance.
    """
    head = (
        "Below is a numbered list of words. In these words, some appear more often than others. "
        "Memorize the ones that appear most often.\n"
    )
    often, seldom = (30, 3) if brief.chars >= _LONG else (6, 1)
    common = [brief.vocabulary.word() for _ in range(_COMMON)]
    room = brief.chars - len(head) - 1
    words = [word for word in common for _ in range(often)]
    room -= sum(_entry_chars(word) for word in words)
    while room > 0:
        word = brief.vocabulary.word()
        room -= seldom * _entry_chars(word)
        if room >= 0:
            words += [word] * seldom
    brief.rng.shuffle(words)
    context = " ".join(f"{at}. {word}" for at, word in enumerate(words, 1)) + "\n"
    first = [word for word in dict.fromkeys(words) if word in set(common)]
    answer = " ".join(f"{at}. {word}" for at, word in enumerate(first, 1))
    question = (
        f"\nQuestion: What are the {_COMMON} most common words in the above list? Answer: The top "
        f"{_COMMON} words that appear most often in the list are:"
    )
    return Draft(head + context, (Question(question, answer, tuple(first)),))


def build_frequent_words(brief: Brief) -> Draft:
    """Coded words whose frequency falls with the square of their rank; the three most frequent.

    The most frequent token of all is a run of dots, which the question tells to ignore.
    """
    head = (
        "Read the following coded text and track the frequency of each coded word. Find the three "
        "most frequently appeared coded words. "
    )
    coded = [brief.vocabulary.code() for _ in range(_CODED)]
    ranks = ["....", *coded]
    weights = [1 / rank**_ZIPF for rank in range(1, len(ranks) + 1)]
    count = max((brief.chars - len(head)) // 6, 20)
    words = brief.rng.choices(ranks, weights, k=count)
    words = words[: _fitting(words, brief.chars - len(head) - 1)]
    top = [word for word, _ in _ranked(words) if word != "...."][:3]
    question = (
        "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the "
        "three most frequently appeared words in the above coded text? Answer: According to the "
        "coded text above, the three most frequently appeared words are:"
    )
    prompt = head + " ".join(words) + "\n"
    return Draft(prompt, (Question(question, ", ".join(top), tuple(top)),))


def _entry_chars(word: str) -> int:
    return len("1234. ") + len(word)


def _fitting(words: list[str], room: int) -> int:
    for count, word in enumerate(words):
        room -= len(word) + 1
        if room < 0:
            return count
    return len(words)


def _ranked(words: list[str]) -> list[tuple[str, int]]:
    """Words by falling frequency, ties in the order of their first appearance."""
    return Counter(words).most_common()
