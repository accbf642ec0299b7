"""InfiniteBench's three retrieval tasks, written here in the published form and to any length."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from minference.errors import unknown_name
from minference.eval.infinitebench.files import Example
from minference.eval.infinitebench.prompts import prompt_of
from minference.eval.tasks.haystack import NOISE

GENERATED = ("passkey", "number_string", "kv_retrieval")
_UNITS_PROBED = 20
Built = tuple[str, str, str]
"""Context, question and answer."""


def generate(
    task: str, length: int, count: int, *, seed: int = 0, measure: Callable[[str], int] = len
) -> Iterator[Example]:
    """Examples whose prompts are as long as asked and no longer, keys spread over the depth.

    Args:
        task: one of `GENERATED`.
        length: tokens of a prompt, the benchmark's wording included.
        count: how many examples.
        seed: of keys, values and places.
        measure: counts the tokens of a text.

    Raises:
        ValueError: a task that needs the published file, or a length too short for the task.
    """
    if task not in GENERATED:
        raise unknown_name("generated InfiniteBench task", task, GENERATED)
    return (
        _fit(Order(task, seed, i, i / max(count - 1, 1)), length, measure) for i in range(count)
    )


@dataclass(frozen=True)
class Order:
    """What determines an example but for its length: `depth` is the key's, from 0 to 1."""

    task: str
    seed: int
    index: int
    depth: float

    def build(self, units: int) -> Example:
        """The example with so many sentences of noise or pairs."""
        rng = Random(f"infinitebench/{self.task}/{self.seed}/{self.index}")
        context, question, answer = _BUILDERS[self.task](rng, units, self.depth)
        return Example(self.task, self.index, context, question, (answer,))


def _fit(order: Order, length: int, measure: Callable[[str], int]) -> Example:
    """The example with the most units whose prompt is not longer than asked."""
    empty, probe = (measure(prompt_of(order.build(units))) for units in (1, 1 + _UNITS_PROBED))
    units = 1 + max(length - empty, 0) * _UNITS_PROBED // max(probe - empty, 1)
    while (tokens := measure(prompt_of(example := order.build(units)))) > length:
        if units == 1:
            raise ValueError(
                f"the shortest {order.task} prompt has {tokens} tokens, asked for at most "
                f"{length}; ask for longer prompts"
            )
        units = max(1, units - 1 - units // 500)
    return example


def _passkey(rng: Random, units: int, depth: float) -> Built:
    key = "".join(rng.choice("0123456789") for _ in range(5))
    fact = f"The pass key is {key}. Remember it. {key} is the pass key.\n"
    return _hidden(fact, units, depth), "What is the pass key?", key


def _number_string(rng: Random, units: int, depth: float) -> Built:
    digits = [rng.choice("0123456789") for _ in range(5)]
    for have in range(5, 10):
        place = rng.randrange(have)
        digits.insert(place, digits[place])
    key = "".join(digits)
    fact = f"The sequence of digits is {key}. Remember it. {key} is the sequence of digits.\n"
    return _hidden(fact, units, depth), "What is the sequence of digits?", key


def _hidden(fact: str, units: int, depth: float) -> str:
    before = round(depth * units)
    return NOISE * before + fact + NOISE * (units - before)


def _kv_retrieval(rng: Random, units: int, depth: float) -> Built:
    pairs = [(_uuid(rng), _uuid(rng)) for _ in range(units)]
    body = ", ".join(f'"{key}": "{value}"' for key, value in pairs)
    key, value = pairs[min(int(depth * units), units - 1)]
    question = f'Key: "{key}"\nThe value associated with the specified key is: '
    return f"JSON data:\n{{{body}}}", question, value


def _uuid(rng: Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


_BUILDERS: dict[str, Callable[[Random, int, float], Built]] = {
    "passkey": _passkey,
    "number_string": _number_string,
    "kv_retrieval": _kv_retrieval,
}
