"""The soft cap of attention scores, as Gemma 2 has it (arXiv 2408.00118)."""

from torch import Tensor


def softcapped(scores: Tensor, softcap: float) -> Tensor:
    """softcap * tanh(score / softcap) of each score; the scores themselves where `softcap` is 0."""
    return softcap * (scores / softcap).tanh() if softcap else scores


def softcap_(scores: Tensor, softcap: float) -> Tensor:
    """The same in place."""
    return scores.div_(softcap).tanh_().mul_(softcap) if softcap else scores
