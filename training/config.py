"""Shape of the model and the schedule of its training: everything that a run depends on."""

from __future__ import annotations

from dataclasses import dataclass

BOS, EOS, PAD = 256, 257, 258


@dataclass(frozen=True)
class ModelShape:
    """A Qwen3 decoder over bytes; 15.7M parameters as it stands, 31.3 MB in bf16."""

    vocab: int = 272
    width: int = 512
    layers: int = 6
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 128
    mlp: int = 832
    rope_theta: float = 1e8
    norm_eps: float = 1e-6
    max_positions: int = 262_144

    @property
    def parameters(self) -> int:
        """Number of parameters, the tied embedding counted once."""
        attention = self.width * self.head_dim * 2 * (self.heads + self.kv_heads)
        norms = 2 * self.width + 2 * self.head_dim
        layer = attention + 3 * self.width * self.mlp + norms
        return self.vocab * self.width + self.layers * layer + self.width


@dataclass(frozen=True)
class Phase:
    """A run of steps at one context length.

    Attributes:
        length: tokens of a row; a step has as many rows as fit into the step's tokens.
        steps: optimizer steps.
        rates: learning-rate factors at the first and the last step, linear between.
        answer_weight: weight of the mean loss over answers beside that over all text.
        mixed: share of rows that hold several contexts and ask about all of them at the end.
        boost: how much more often the slow learners come, variable tracking and multi-value.
        lone_chains: share of variable-tracking contexts with RULER's single chain.
    """

    length: int
    steps: int
    rates: tuple[float, float]
    answer_weight: float = 1.0
    mixed: float = 0.3
    boost: float = 1.0
    lone_chains: float = 0.35


@dataclass(frozen=True)
class Recipe:
    """One training run; the step count alone says where it stands."""

    phases: tuple[Phase, ...]
    step_tokens: int = 131_072
    warmup: int = 40
    matrix_rate: float = 0.02
    vector_rate: float = 0.004
    weight_decay: float = 0.01
    seed: int = 1

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return sum(phase.steps for phase in self.phases)

    def at(self, step: int) -> tuple[Phase, float]:
        """Phase and learning-rate factor of a step, without the warm-up."""
        for phase in self.phases:
            if step < phase.steps:
                share = step / phase.steps
                return phase, phase.rates[0] + share * (phase.rates[1] - phase.rates[0])
            step -= phase.steps
        raise ValueError(f"step is past the end of the recipe: expected < {self.steps}")


FULL = Recipe(
    phases=(
        Phase(2048, 900, (1.0, 1.0)),
        Phase(8192, 500, (1.0, 0.8)),
        Phase(2048, 850, (1.0, 1.0), boost=4.0),
        Phase(8192, 450, (1.0, 0.8), mixed=0.2, boost=4.0),
        Phase(32_768, 480, (0.8, 0.5), answer_weight=1.5, mixed=0.4, boost=1.5),
        Phase(65_536, 240, (0.5, 0.3), answer_weight=2.0, mixed=0.5, boost=1.5),
        Phase(131_072, 240, (0.3, 0.02), answer_weight=2.0, mixed=0.6, boost=2.0, lone_chains=0.9),
        Phase(32_768, 260, (0.3, 0.12), answer_weight=2.0, mixed=0.4, boost=5.0, lone_chains=0.9),
        Phase(131_072, 60, (0.1, 0.005), answer_weight=2.0, mixed=0.6, boost=3.0, lone_chains=0.9),
    )
)
PROBE = Recipe(
    phases=tuple(Phase(2048 * 2**at, 5, (1.0, 1.0), mixed=0.5) for at in (0, 2, 4, 5, 6))
)
TINY = Recipe(
    phases=(Phase(1024, 3, (1.0, 1.0)), Phase(2048, 2, (1.0, 0.1))), step_tokens=2048, warmup=1
)
TINY_SHAPE = ModelShape(width=64, layers=2, heads=4, kv_heads=2, head_dim=16, mlp=96)
RECIPES: dict[str, Recipe] = {"full": FULL, "probe": PROBE, "tiny": TINY}
