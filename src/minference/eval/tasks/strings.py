"""Pass-key and number-string retrieval in InfiniteBench's form (arXiv 2402.13718)."""

from __future__ import annotations

from minference.eval.tasks.draft import Brief, Draft
from minference.eval.tasks.haystack import hide, noise
from minference.eval.tasks.sample import Question

_HEAD = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there.\n\n"
)


def build_passkey(brief: Brief) -> Draft:
    """One five-digit pass key in noise, said twice."""
    key = brief.vocabulary.number(5)
    fact = f"The pass key is {key}. Remember it. {key} is the pass key."
    return _hidden(brief, fact, "\nWhat is the pass key? The pass key is", key)


def build_number_string(brief: Brief) -> Draft:
    """One string of ten digits, each repeated some times, in noise, said twice."""
    runs = [brief.rng.choice("0123456789") * brief.rng.randint(1, 4) for _ in range(10)]
    digits = "".join(runs)[:10]
    fact = f"The sequence of digits is {digits}. Remember it. {digits} is the sequence of digits."
    question = "\nWhat is the sequence of digits? The sequence of digits is"
    return _hidden(brief, fact, question, digits)


def _hidden(brief: Brief, fact: str, question: str, answer: str) -> Draft:
    room = brief.chars - len(_HEAD) - len(fact) - 2
    context = hide(brief.rng, noise(room), [fact], brief.depth)
    depth = context.find(fact) / len(context)
    return Draft(_HEAD + context, (Question(question, answer, depth=depth),))
