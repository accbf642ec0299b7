"""What an evaluation asks: tasks at lengths, the same questions for every method."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

from minference.errors import unknown_name
from minference.eval.tasks import ONE_QUESTION, TASKS, Placement, Sample, Split, make_sample
from minference.eval.tasks.draft import Measure

SPREAD_QUESTIONS = 12
ASKED: tuple[Split, ...] = ("dev", "heldout")
"""Splits that an evaluation asks of; the third is for training."""
GROUPS: dict[str, tuple[str, ...]] = {
    "niah": ("niah",),
    "retrieval": ("single", "multikey", "needle_lines", "key_value", "multivalue"),
    "infinitebench": ("passkey", "number_string", "key_value"),
    "ruler_forms": (
        "single_noise",
        "single",
        "single_uuid",
        "multikey",
        "needle_lines",
        "uuid_lines",
        "multivalue",
        "variable_tracking",
        "common_words",
        "frequent_words",
    ),
}


@dataclass(frozen=True)
class Cell:
    """A task at a length: `prompts` different prompts with `questions` questions each.

    `depths` above 0 places the single needle of prompt i at depth (i % depths) / (depths - 1).
    """

    task: str
    length: int
    placement: Placement
    split: Split
    prompts: int
    questions: int
    depths: int = 0

    @property
    def source(self) -> str:
        """The generator's name; `niah` is a single needle at given depths."""
        return "single" if self.task == "niah" else self.task

    def order(self, seed: int) -> tuple[object, ...]:
        """Arguments of `draw` for one prompt."""
        depth = None
        if self.depths:
            depth = (seed % self.depths) / max(self.depths - 1, 1)
        return self.source, self.length, seed, self.split, self.questions, self.placement, depth


def draw(order: tuple[object, ...], measure: Measure = len) -> Sample:
    """One prompt with its questions; top-level, so that other processes can run it."""
    task, length, seed, split, questions, placement, depth = order
    return make_sample(
        task,  # type: ignore[arg-type]
        length,  # type: ignore[arg-type]
        seed,  # type: ignore[arg-type]
        split,  # type: ignore[arg-type]
        num_questions=questions,  # type: ignore[arg-type]
        placement=placement,  # type: ignore[arg-type]
        depth=depth,  # type: ignore[arg-type]
        measure=measure,
    )


def check_cells(cells: Iterable[Cell], measure: Measure, limit: int | None = None) -> None:
    """Draws the shortest first prompt of every task: what does not fit is said before any work.

    Args:
        cells: what will be asked.
        measure: counts the tokens of a text.
        limit: tokens that the model takes, where its configuration says so.

    Raises:
        ValueError: a length too short for a task's prompt, or too long for the model.
    """
    shortest: dict[str, Cell] = {}
    for cell in sorted(cells, key=lambda cell: cell.length):
        check_length(cell.length, limit)
        shortest.setdefault(cell.task, cell)
    for cell in shortest.values():
        draw(cell.order(0), measure)


def check_length(length: int, limit: int | None) -> None:
    """Raises ValueError for prompts of more tokens than the model takes; None takes any."""
    if limit is not None and length > limit:
        raise ValueError(
            f"a length must be at most the {limit} tokens that the model takes, got {length}; ask "
            "for shorter prompts, or raise max_position_embeddings in its configuration if it was "
            "made for more"
        )


def draw_all(
    orders: Sequence[tuple[object, ...]], measure: Measure, workers: int = 0
) -> Generator[Sample]:
    """The prompts of several orders, in order.

    Args:
        orders: arguments of `draw`.
        measure: counts the tokens of a text; other processes must be able to load it.
        workers: processes that draw ahead of the caller; 0 draws when asked.
    """
    if not workers:
        yield from (draw(order, measure) for order in orders)
        return
    # not forked: the caller may hold a GPU
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    try:
        ahead: deque[Future[Sample]] = deque()
        for order in orders:
            ahead.append(pool.submit(draw, order, measure))
            if len(ahead) > 2 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def valid_tasks() -> list[str]:
    """Every name that `resolve_tasks` takes."""
    return sorted({*GROUPS, *TASKS})


def resolve_tasks(names: Iterable[str]) -> list[str]:
    """Task names with groups spelt out, each once, in the order given.

    Raises:
        ValueError: an unknown name; the message lists the valid ones.
    """
    found: dict[str, None] = {}
    for name in names:
        if name in GROUPS:
            found |= dict.fromkeys(GROUPS[name])
        elif name in TASKS:
            found[name] = None
        else:
            raise unknown_name("task", name, valid_tasks())
    if not found:
        raise ValueError(f"no task given; valid names are {', '.join(valid_tasks())}")
    return list(found)


def make_cells(
    tasks: Iterable[str],
    lengths: Iterable[int],
    *,
    samples: int,
    placement: Placement = "end",
    split: Split = "heldout",
    questions: int | None = None,
    depths: int = 5,
) -> Iterator[Cell]:
    """The cells of the generated tasks, shortest lengths first; a sample is a question.

    Args:
        tasks: resolved names.
        lengths: prompt lengths in tokens.
        samples: questions a cell.
        placement: "end", "spread" or "cached".
        split: "dev" to tune on, "heldout" to report.
        questions: questions a prompt; 1 at the end and 12 otherwise if None.
        depths: depths of the needle task `niah`; fewer samples see the first of them.

    Raises:
        ValueError: a count below 1.
    """
    for name, count in (("samples", samples), ("questions", questions), ("depths", depths)):
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    each = questions or (1 if placement == "end" else SPREAD_QUESTIONS)
    for length in sorted(set(lengths)):
        for task in tasks:
            one = task in ONE_QUESTION or task == "niah"
            count = 1 if one else min(each, samples)
            yield Cell(
                task,
                length,
                "end" if one else placement,
                split,
                prompts=-(-samples // count),
                questions=count,
                depths=depths if task == "niah" else 0,
            )
