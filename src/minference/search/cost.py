"""What a pattern costs: keys that each row of a long prompt computes, as the kernels count them."""

from dataclasses import dataclass

from minference.index import BLOCK
from minference.ops.select.reference import offset_budget
from minference.patterns import AShape, BlockSparse, Dense, Pattern, VerticalSlash


@dataclass(frozen=True)
class CostModel:
    """Cost of a row in units of one key inside a computed block.

    Attributes:
        column: cost of a key that is gathered alone; 1 counts tiles, a device's own timings may
            say more.
    """

    column: float = 1.0

    def row_cost(self, pattern: Pattern, length: int) -> float:
        """Cost of a row at the end of a prompt of `length` tokens, at most that of every key.

        Raises:
            TypeError: a pattern that search does not weigh.
        """
        match pattern:
            case Dense():
                return float(length)
            case AShape(sink=sink, local=local):
                cost = float(BLOCK * (-(-sink // BLOCK) - (-local // BLOCK)))
            case VerticalSlash(vertical=vertical, slash=slash):
                cost = BLOCK * offset_budget(slash) + self.column * vertical
            case BlockSparse(topk=topk, block=block):
                cost = float(topk * block)
            case _:
                raise TypeError(
                    f"the cost of {type(pattern).__name__} is not modelled; search weighs A-shape, "
                    "vertical-slash, block-sparse and dense heads"
                )
        return min(cost, float(length))

    def density(self, pattern: Pattern, length: int) -> float:
        """Share of the causal area of a prompt: rows see min(cost, what lies before them)."""
        cost = self.row_cost(pattern, length)
        return cost / length * (2 - cost / length)
