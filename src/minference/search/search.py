"""Search the pattern of every head of a transformers model, a layer at a time, in one forward pass
a prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import minference
from minference.errors import UnsupportedError, unknown_name
from minference.log import info_once
from minference.methods.base import Context
from minference.methods.dense import Dense
from minference.patterns import BUDGET_LENGTH, Pattern
from minference.search.checks import check_lengths, check_model
from minference.search.cost import CostModel
from minference.search.found import Found, choose
from minference.search.grow import grow_to_recall
from minference.search.progress import Progress, fingerprint, hash_of_prompts
from minference.search.score import OBJECTIVES, Call, score_layer
from minference.search.space import TARGET, equalised, space
from minference.search.timing import LayerShape, fit_timings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COSTS = ("auto", "fitted", "counted")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a search compares.

    Attributes:
        space: name of the preset of candidates.
        target: pattern whose cost every candidate is brought to; None leaves them as they are.
        objective: "output" or "mass", see `LayerScorer.scores`.
        rows: rows of each prompt to compare.
        recall: attention mass that every head must keep; None to stop at the choice.
        cost: "fitted" weighs what the kernels compute by their times on the model's device,
            "counted" by its amount, "auto" is fitted on CUDA and counted elsewhere.
    """

    space: str = "wide"
    target: Pattern | None = TARGET
    objective: str = "output"
    rows: int = 64
    recall: float | None = None
    cost: str = "auto"

    def __post_init__(self) -> None:
        """Checks names and numbers before any work."""
        if self.objective not in OBJECTIVES:
            raise unknown_name("objective", self.objective, OBJECTIVES)
        if self.cost not in COSTS:
            raise unknown_name("cost", self.cost, COSTS)
        if self.recall is not None and not 0 < self.recall <= 1:
            raise ValueError(f"recall must be in (0, 1], got {self.recall}")
        if self.rows < 1:
            raise ValueError(f"rows must be at least 1, got {self.rows}")
        space(self.space)

    def candidates(self, cost: CostModel, length: int = BUDGET_LENGTH) -> tuple[Pattern, ...]:
        """The preset's patterns, at equal cost for prompts of that length where a target is set."""
        own = space(self.space)
        if self.target is None:
            return own
        return equalised(own, cost.row_cost(self.target, BUDGET_LENGTH), cost, length)


def search(
    model: PreTrainedModel,
    prompts: Sequence[Tensor],
    settings: Settings,
    *,
    model_name: str | None = None,
    state: Path | None = None,
    on_layer: Callable[[int, int], None] | None = None,
    on_found: Callable[[Found], object] | None = None,
) -> Found:
    """Chooses for each head the candidate of best mean score over the prompts.

    Args:
        model: a causal language model that `attach` serves.
        prompts: token ids of each prompt, [1, L], at least 512 of them. Candidates cost the same
            at the length of the longest.
        settings: what to compare.
        model_name: id of the weights, for the provenance.
        state: file that keeps what is found, layer by layer; a search that finds one of the same
            model, settings and prompts goes on from there, and it is removed at the end.
        on_layer: called with the numbers of prompt and layer as a layer is done.
        on_found: called with what was found before `state` is removed, to save it.

    Raises:
        ValueError: a prompt that is too short or too long for the model, or none.
        UnsupportedError: a model that cannot be attached to, or without a layer to search.
    """
    config = model.config.get_text_config(decoder=True)
    lengths = tuple(ids.shape[1] for ids in prompts)
    check_lengths(lengths, config)
    with minference.attach(model, Dense()):
        check_model(model)  # nor is anything measured if `attach` refuses
    done = Progress.load(state, _about(model, prompts, settings))
    if done.cost is None:
        done.cost = cost_of(model, settings)
        done.write()
    candidates = settings.candidates(done.cost, max(lengths))

    def score(number: int, context: Context, q: Tensor, k: Tensor, v: Tensor) -> None:
        key = f"{number}/{context.layer}"
        if key not in done.scores:
            found = score_layer(Call(q, k, v, context), candidates, rows=settings.rows)
            done.scores[key] = {name: values.tolist() for name, values in found.items()}
            done.write()
        if on_layer is not None:
            on_layer(number, context.layer)

    _each_prompt(model, prompts, "scores", done, score)
    if not done.scores:
        raise UnsupportedError(
            f"{type(model).__name__} has no layer of full causal attention to search; layers "
            "with a window of their own are served without patterns"
        )
    found = choose(
        candidates,
        done.scores,
        objective=settings.objective,
        space=settings.space,
        lengths=lengths,
        cost=done.cost,
        config=config,
        model_name=model_name,
    )
    if settings.recall is not None:
        found = _raise_recall(model, prompts, found, settings, done)
    if on_found is not None:
        on_found(found)
    done.remove()
    return found


def observe_layers(
    model: PreTrainedModel, ids: Tensor, observe: Callable[[Context, Tensor, Tensor, Tensor], None]
) -> None:
    """One dense forward pass over a prompt; `observe` gets context, q, k and v of each layer."""
    with (
        torch.no_grad(),
        minference.attach(model, Dense(), min_seq_len=0, observe=observe),
    ):
        model(ids.to(model.device), use_cache=False, logits_to_keep=1)


def _each_prompt(
    model: PreTrainedModel,
    prompts: Sequence[Tensor],
    name: str,
    done: Progress,
    observe: Callable[[int, Context, Tensor, Tensor, Tensor], None],
) -> None:
    """A pass over each prompt that has not ended yet."""
    for number, ids in enumerate(prompts):
        if f"{name}/{number}" not in done.ended:
            observe_layers(model, ids, lambda *call, number=number: observe(number, *call))
            done.end(f"{name}/{number}")


def _about(model: PreTrainedModel, prompts: Sequence[Tensor], settings: Settings) -> dict[str, Any]:
    device = model.device
    return {
        "model": fingerprint(model),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "prompts": hash_of_prompts(prompts),
        "settings": repr(settings),
        "version": minference.__version__,
    }


def cost_of(model: PreTrainedModel, settings: Settings) -> CostModel:
    """What candidates cost on the model's device, measured there where the settings say so."""
    device = model.device
    if settings.cost == "counted" or (settings.cost == "auto" and device.type != "cuda"):
        return CostModel()
    config = model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    shape = LayerShape(
        heads=heads,
        kv_heads=_first(config, "num_key_value_heads") or heads,
        dim=_first(config, "qk_head_dim", "head_dim") or config.hidden_size // heads,
        dtype=model.dtype,
        device=device,
    )
    cost = CostModel(fit_timings(shape))
    info_once(cost.describe())
    return cost


def _first(config: Any, *names: str) -> int | None:  # noqa: ANN401
    return next((x for name in names if (x := getattr(config, name, None))), None)


def _raise_recall(
    model: PreTrainedModel,
    prompts: Sequence[Tensor],
    found: Found,
    settings: Settings,
    done: Progress,
) -> Found:
    """Budgets grown prompt by prompt; a head's mass is the least that any prompt left it."""
    target = settings.recall
    assert target is not None
    rows = {layer: list(found.patterns[layer]) for layer in found.layers}
    mass = {layer: [1.0] * found.patterns.heads for layer in found.layers}

    def take(layer: int, own: list[Pattern], kept: list[float]) -> None:
        rows[layer], mass[layer] = own, [min(x) for x in zip(mass[layer], kept, strict=True)]

    def grow(number: int, context: Context, q: Tensor, k: Tensor, v: Tensor) -> None:
        key, layer = f"{number}/{context.layer}", context.layer
        if key not in done.grown:
            call = Call(q, k, v, context)
            done.grown[key] = grow_to_recall(
                call, rows[layer], target, found.cost, rows=settings.rows
            )
            take(layer, *done.grown[key])
            done.write()

    for number in range(len(prompts)):
        for layer in found.layers:
            if f"{number}/{layer}" in done.grown:
                take(layer, *done.grown[f"{number}/{layer}"])
    _each_prompt(model, prompts, "grown", done, grow)
    return found.with_rows(
        [rows[layer] for layer in found.layers], [mass[layer] for layer in found.layers], target
    )
