"""Variable tracking in RULER's form (arXiv 2404.06654): chains of assignments hidden in noise."""

from __future__ import annotations

from minference.eval.tasks.draft import Brief, Draft
from minference.eval.tasks.haystack import hide, noise
from minference.eval.tasks.sample import Question

HOPS = 4
_HEAD = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"


def build_variable_tracking(brief: Brief) -> Draft:
    """Hides one chain of five variables for each question; chains mix, each keeps its order."""
    vocabulary = brief.vocabulary
    values = [vocabulary.number(5) for _ in range(brief.num_questions)]
    chains = [[vocabulary.name() for _ in range(HOPS + 1)] for _ in values]
    turns = [index for index in range(len(chains)) for _ in range(HOPS + 1)]
    brief.rng.shuffle(turns)
    lines = _statements(values, chains, turns)
    room = brief.chars - len(_HEAD) - sum(len(line) + 2 for line in lines)
    context = hide(brief.rng, noise(room), lines, brief.depth, turns.index(0))
    questions = tuple(
        _question(value, chain, context) for value, chain in zip(values, chains, strict=True)
    )
    return Draft(_HEAD + context, questions)


def _statements(values: list[str], chains: list[list[str]], turns: list[int]) -> list[str]:
    done = [0] * len(chains)
    lines = []
    for index in turns:
        step = done[index]
        source = f"VAR {chains[index][step - 1]}" if step else values[index]
        lines.append(f"VAR {chains[index][step]} = {source}")
        done[index] += 1
    return lines


def _question(value: str, chain: list[str], context: str) -> Question:
    prompt = (
        f"\nQuestion: Find all variables that are assigned the value {value} in the text above. "
        "Answer: According to the chain(s) of variable assignment in the text above, "
        f"{len(chain)} variables are assigned the value {value}, they are:"
    )
    depth = context.find(f"= {value}") / len(context)
    return Question(prompt, " ".join(chain), tuple(chain), depth)
