"""Key-value retrieval in InfiniteBench's form (arXiv 2402.13718): a JSON object of UUIDs."""

from __future__ import annotations

from minference.eval.tasks.draft import Brief, Draft
from minference.eval.tasks.sample import Question

_HEAD = "Extract the value corresponding to the specified key in the JSON object below.\n\n"
_PAIR_CHARS = len('"": "", ') + 2 * 36


def build_key_value(brief: Brief) -> Draft:
    """Fills the length with random pairs and asks for some of them."""
    room = brief.chars - len(_HEAD) - len("{}\n")
    count = max(room // _PAIR_CHARS, brief.num_questions)
    draw = brief.vocabulary.uuid
    pairs = [(draw(), draw()) for _ in range(count)]
    body = ", ".join(f'"{key}": "{value}"' for key, value in pairs)
    asked = _asked(brief, count)
    questions = tuple(
        Question(
            f'\nKey: "{pairs[index][0]}"\nThe value associated with the specified key is:',
            pairs[index][1],
            depth=index / count,
        )
        for index in asked
    )
    return Draft(f"{_HEAD}{{{body}}}\n", questions)


def _asked(brief: Brief, count: int) -> list[int]:
    asked = brief.rng.sample(range(count), brief.num_questions)
    if brief.depth is not None:
        asked[0] = min(int(brief.depth * count), count - 1)
        taken = set(asked[1:])
        while asked[0] in taken:
            asked[0] = (asked[0] + 1) % count
    return asked
