"""What a model reads, task by task."""

import pytest

from minference.eval.infinitebench.files import TASKS, Example
from minference.eval.infinitebench.prompts import NEW_TOKENS, prompt_of

OPTIONS = ("w", "x", "y", "z")
INPUTS = {
    "code_run": "Please give me the exact number of the return value of func_3(-7).",
    "math_find": "You should answer with only one number. The second number is the answer.",
}


def example(task: str, **fields: object) -> Example:
    own = {"input": INPUTS.get(task, "QUESTION"), "options": OPTIONS} | fields
    return Example(task, 0, "CONTEXT {x}", own["input"], ("a",), own["options"])  # type: ignore[arg-type]


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_a_prompt_and_an_answer_length(task: str) -> None:
    text = prompt_of(example(task))
    assert text.count("CONTEXT {x}") == 1
    assert ("QUESTION" in text) == (
        task not in {*INPUTS, "longbook_sum_eng", "longdialogue_qa_eng", "math_calc", "code_debug"}
    )
    assert NEW_TOKENS[task] > 0


def test_the_wording_of_some_tasks() -> None:
    choice = prompt_of(example("longbook_choice_eng"))
    end = "Question: QUESTION\nA. w\nB. x\nC. y\nD. z\n\nThe letter of the correct answer is"
    assert choice.endswith(f"CONTEXT {{x}}\n\n{end}")
    assert prompt_of(example("code_run")).endswith(
        "Please compute the exact value of func_3(-7). The value of func_3(-7) is"
    )
    assert prompt_of(example("code_run")).startswith("There is a function called func_3 in")
    find = prompt_of(example("math_find"))
    assert find.startswith("What is the second number in the following list?\n\nCONTEXT")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (example("code_debug", options=OPTIONS[:3]), "4 options, got 3"),
        (example("code_run", input="compute"), "must hold"),
        (example("math_find", input="find it"), "must hold"),
        (example("passkeys"), "passkey"),
    ],
)
def test_an_example_without_what_its_task_asks_about(wrong: Example, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prompt_of(wrong)
