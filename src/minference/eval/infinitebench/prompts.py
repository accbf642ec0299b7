"""The benchmark's prompts for a model that completes text, and how long an answer may be.

The wording belongs to the benchmark: other words would measure another thing.
"""

from __future__ import annotations

import re

from minference.errors import unknown_name
from minference.eval.infinitebench.files import Example

NEW_TOKENS = {
    "passkey": 6,
    "number_string": 12,
    "kv_retrieval": 50,
    "longbook_sum_eng": 1200,
    "longbook_choice_eng": 40,
    "longbook_qa_eng": 40,
    "longbook_qa_chn": 40,
    "longdialogue_qa_eng": 40,
    "math_find": 3,
    "math_calc": 30_000,
    "code_run": 5,
    "code_debug": 5,
}
"""Tokens of an answer, by task; of a tokenizer over subwords."""

_OPTIONS = "A. {a}\nB. {b}\nC. {c}\nD. {d}"
_FIND = "There is an important info hidden inside a lot of irrelevant text. Find it"
_MASK = (
    "Below is a dialogue script where one random occurrence of a character name is replaced with "
    '"$$MASK$$", and you should try to guess who that character is.\n\n'
)
# text before the context, and text behind it
_TEMPLATES = {
    "passkey": (
        f"{_FIND} and memorize it. I will quiz you about the important information.\n\n",
        "\n\n{input}\n\nThe pass key is",
    ),
    "number_string": (
        f"{_FIND}. I will quiz you about the important information there.\n\n",
        "\n\n{input}\n\nThe sequence of digits is",
    ),
    "kv_retrieval": (
        "Extract the value corresponding to the specified key in the JSON object below.\n\n",
        "\n\n{input}",
    ),
    "longbook_sum_eng": ("Summarize the book below.\n\n", "\n\nSummary:"),
    "longbook_choice_eng": (
        "Read the book and answer the question.\n\n",
        f"\n\nQuestion: {{input}}\n{_OPTIONS}\n\nThe letter of the correct answer is",
    ),
    "longbook_qa_eng": (
        "Read the book and answer the question. Be very concise in your answer.\n\n",
        "\n\nQuestion: {input}\nAnswer:",
    ),
    "longbook_qa_chn": ("阅读以下书籍然后回答问题。\n\n", "\n\n问题：{input}\n答案："),  # noqa: RUF001
    "longdialogue_qa_eng": (
        _MASK,
        "\n\nThe name that has been replaced with $$MASK$$ is likely",
    ),
    "math_find": ("{prefix}\n\n", "\n\n{input}"),
    "math_calc": (
        "Let us calculate the intermediate values of an expression.\n\n"
        "Expression: 1 + 3 + 4\nValues: [1, 4, 8]\n\n"
        "Expression: 8 - 3 + 2 - 4\nValues: [8, 5, 7, 3]\n\nExpression: ",
        "\nValues:",
    ),
    "code_run": (
        "There is a function called {func} in the following Python code.\n\n",
        "\n\nPlease compute the exact value of {call}. The value of {call} is",
    ),
    "code_debug": (
        "Following is a Python code where exactly one of the functions/methods has a deliberate "
        "error that makes it crash.\n\n",
        f"\n\nOptions:\n{_OPTIONS}\n\nThe correct option is:",
    ),
}


def prompt_of(example: Example) -> str:
    """What a model reads: the benchmark's wording for models that complete.

    Raises:
        ValueError: an unknown task, or an example without what its task asks about.
    """
    if example.task not in _TEMPLATES:
        raise unknown_name("InfiniteBench task", example.task, _TEMPLATES)
    values = {"input": example.input, **_fields(example)}
    before, behind = (part.format(**values) for part in _TEMPLATES[example.task])
    return f"{before}{example.context}{behind}"


def _fields(example: Example) -> dict[str, str]:
    if example.task in ("code_debug", "longbook_choice_eng"):
        if len(example.options) != 4:
            raise ValueError(
                f"example {example.id} of {example.task} must have 4 options, got "
                f"{len(example.options)}"
            )
        return dict(zip("abcd", example.options, strict=True))
    if example.task == "code_run":
        call = _searched(r"func_\d+\(-?\d+\)", example)
        return {"call": call, "func": call.split("(")[0]}
    if example.task == "math_find":
        number = _searched(r"The \w+ number", example).lower()
        return {"prefix": f"What is {number} in the following list?"}
    return {}


def _searched(pattern: str, example: Example) -> str:
    found = re.search(pattern, example.input)
    if found is None:
        raise ValueError(
            f"input of example {example.id} of {example.task} must hold {pattern!r}, got "
            f"{example.input[:80]!r}"
        )
    return found[0]
