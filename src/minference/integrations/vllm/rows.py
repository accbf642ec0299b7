"""Which rows of a batch are long prompts. Plain integers; needs no vLLM and no device.

A row is one request's queries of this step: a decode token, or a chunk of a prompt behind the
context that is already in its pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """Queries begin..stop-1 of the batch, the last ones of a context of `context` tokens.

    Attributes:
        number: place of the request in the batch.
        begin: first query of the request in the batch.
        stop: one past its last query.
        context: keys that its last query sees, its own included.
    """

    number: int
    begin: int
    stop: int
    context: int

    @property
    def queries(self) -> int:
        """Queries of this step."""
        return self.stop - self.begin


def batch_rows(query_start: Sequence[int], context: Sequence[int]) -> tuple[Row, ...]:
    """The rows of a batch, without empty ones (padding of a captured graph).

    Args:
        query_start: where each request's queries begin, and where the last one's end.
        context: length of each request's context; entries past the requests are ignored.

    Raises:
        ValueError: a context that is shorter than the row's queries.
    """
    rows = []
    for number in range(len(query_start) - 1):
        row = Row(number, query_start[number], query_start[number + 1], context[number])
        if row.queries == 0:
            continue
        if row.context < row.queries:
            raise ValueError(
                f"request {number} of the batch has {row.queries} queries on {row.context} keys; "
                f"the metadata is not that of a causal decoder"
            )
        rows.append(row)
    return tuple(rows)


def long_rows(rows: Sequence[Row], *, min_chunk: int, min_context: int) -> tuple[Row, ...]:
    """The rows that a sparse method may serve: enough queries, on a long enough context."""
    return tuple(r for r in rows if r.queries >= min_chunk and r.context >= min_context)


def other_rows(rows: Sequence[Row], served: Sequence[Row]) -> tuple[Row, ...]:
    """The rows that remain for the dense kernel."""
    numbers = {row.number for row in served}
    return tuple(row for row in rows if row.number not in numbers)
