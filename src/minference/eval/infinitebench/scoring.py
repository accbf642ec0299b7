"""InfiniteBench's scores of an answer, from 0 to 1, with the rules that its authors published.

They are lenient on purpose (the right letter somewhere near the front, the key among the words),
so they differ from the exact match of `minference.eval.scoring`.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import takewhile

from minference.errors import unknown_name
from minference.eval.infinitebench.files import Example

_LETTERS = "ABCD"
# what separates words in a retrieved answer
_BREAKS = "\n:\"'.,?!{}"
_CHINESE_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟"  # noqa: RUF001
    "〰〾〿–—‘’‛“”„‟…‧﹏."  # noqa: RUF001
)


def score_answer(example: Example, text: str) -> float:
    """Score of a model's text, by the rule of the example's task.

    Raises:
        ValueError: an unknown task, or an answer that is none of the options.
    """
    if example.task not in _RULES:
        raise unknown_name("InfiniteBench task", example.task, _RULES)
    return float(_RULES[example.task](example, text))


def token_f1(predicted: Sequence[str], expected: Sequence[str]) -> float:
    """Harmonic mean of precision and recall over tokens, each counted as often as it occurs."""
    same = sum((Counter(predicted) & Counter(expected)).values())
    return _f1(same, len(predicted), len(expected))


def rouge_lsum(predicted: str, expected: str) -> float:
    """ROUGE-L F1 of summaries: common subsequences by line, united over the other's lines."""
    own, other = (
        [tokens for line in text.split("\n") if (tokens := re.findall(r"[a-z0-9]+", line.lower()))]
        for text in (expected, predicted)
    )
    own_left, other_left = (Counter(t for line in lines for t in line) for lines in (own, other))
    sizes = other_left.total(), own_left.total()
    hits = 0
    for line in own:
        places = sorted({place for theirs in other for place in _common_places(line, theirs)})
        for token in (line[place] for place in places):
            if own_left[token] > 0 and other_left[token] > 0:
                own_left[token] -= 1
                other_left[token] -= 1
                hits += 1
    return _f1(hits, *sizes)


def _f1(same: int, predicted: int, expected: int) -> float:
    if not same:
        return 0.0
    precision, recall = same / predicted, same / expected
    return 2 * precision * recall / (precision + recall)


def _common_places(first: Sequence[str], second: Sequence[str]) -> Iterable[int]:
    """Places in the first list of a longest common subsequence."""
    length = [[0] * (len(second) + 1)]
    for token in first:
        row, above = [0], length[-1]
        for column, other in enumerate(second, 1):
            best = max(above[column], row[-1])
            row.append(above[column - 1] + 1 if token == other else best)
        length.append(row)
    i, j = len(first), len(second)
    while i and j:
        if first[i - 1] == second[j - 1]:
            i, j = i - 1, j - 1
            yield i
        elif length[i][j - 1] > length[i - 1][j]:
            j -= 1
        else:
            i -= 1


def _replaced(text: str, pieces: Iterable[str]) -> str:
    for piece in pieces:
        text = text.replace(piece, " ")
    return text


def _among_words(example: Example, text: str) -> bool:
    return str(example.answers[0]) in _replaced(text, _BREAKS).split()


def _among_upper_words(example: Example, text: str) -> bool:
    return str(example.answers[0]) in _replaced(text, _BREAKS).upper().split()


def _first_digits(example: Example, text: str) -> bool:
    found = re.search(r"[0-9]+", text)
    return found is not None and found[0] == str(example.answers[0])


def _last_integer(example: Example, text: str) -> bool:
    words = _replaced(text, "\n.`'\":").split()
    return bool(words) and _integer(words[-1]) == int(example.answers[0])


def _integer(word: str) -> int | None:
    try:
        return int(word)
    except ValueError:
        return None


def _first_number(example: Example, text: str) -> bool:
    found = re.search(r"\d+\.\d+|\d+", text)
    if found is None:
        return False
    expected = float(example.answers[0])
    whole = expected.is_integer() and not isinstance(example.answers[0], float)
    return (int(float(found[0])) if whole else float(found[0])) == expected


def _leading_values(example: Example, text: str) -> float:
    values = [int(digits) for digits in re.findall(r"[0-9]+", text)]
    expected = [int(value) for value in example.answers]
    pairs = zip(values, expected, strict=False)
    return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs))) / len(expected)


def _choice(example: Example) -> tuple[str, str]:
    """The right option and its letter."""
    answer = str(example.answers[0])
    if answer in example.options:
        return answer, _LETTERS[example.options.index(answer)]
    if len(example.answers) == 2 and example.answers[1] in tuple(_LETTERS):
        return answer, str(example.answers[1])
    raise ValueError(
        f"the answer of example {example.id} of {example.task} must be one of its options, got "
        f"{answer!r}"
    )


def _behind(text: str, prefixes: Iterable[str]) -> str | None:
    """What follows the first prefix that occurs, without the character behind it."""
    for prefix in prefixes:
        place = text.find(prefix)
        if place >= 0:
            return text[place + len(prefix) + 1 :]
    return None


def _buggy_function(example: Example, text: str) -> bool:
    name, letter = _choice(example)
    text = text.strip()
    if text[:2] in (f"{letter}.", f"{letter}:"):
        return True
    words = (*"\n`'\"-*", "Option", "option")
    text = re.sub(" +", " ", _replaced(text, words))
    said = _behind(text, ("answer is:", "is:", "answer:"))
    return said is not None and said.startswith((letter, name))


def _right_letter(example: Example, text: str) -> bool:
    right = _choice(example)
    text = text.strip()
    if text[:1] in tuple(_LETTERS):
        return text[0] in right
    if text in right:
        return True
    text = re.sub(" +", " ", _replaced(text, "\n\"'.,?!{}"))
    said = _behind(text, ("answer is:", "answer:", "answer is", "option is"))
    if said is not None:
        return said.startswith(right)
    letters = (word for word in text.split() if word in _LETTERS)
    return next(letters, None) in right


def _best_f1(example: Example, text: str) -> float:
    return max(token_f1(_words(text), _words(str(answer))) for answer in example.answers)


def _best_character_f1(example: Example, text: str) -> float:
    return max(token_f1(_characters(text), _characters(str(a))) for a in example.answers)


def _words(text: str) -> list[str]:
    bare = "".join(sign for sign in text.lower() if sign not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def _characters(text: str) -> list[str]:
    dropped = {*string.punctuation, *_CHINESE_PUNCTUATION}
    return list("".join("".join(s for s in text.lower() if s not in dropped).split()))


def _summary(example: Example, text: str) -> float:
    return max(rouge_lsum(text, str(answer)) for answer in example.answers)


_RULES: dict[str, Callable[[Example, str], float]] = {
    "passkey": _first_digits,
    "number_string": _first_digits,
    "kv_retrieval": _among_words,
    "longbook_sum_eng": _summary,
    "longbook_choice_eng": _right_letter,
    "longbook_qa_eng": _best_f1,
    "longbook_qa_chn": _best_character_f1,
    "longdialogue_qa_eng": _among_upper_words,
    "math_find": _first_number,
    "math_calc": _leading_values,
    "code_run": _last_integer,
    "code_debug": _buggy_function,
}
