"""What a search has found so far, kept in a file so that a stopped search goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minference.errors import PatternFileError
from minference.json_files import read_json, write_text
from minference.log import warn_once
from minference.patterns import Pattern, pattern_from_dict
from minference.search.cost import CostModel, Timings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAMPLED = 64
"""Elements of each weight that a fingerprint reads."""
Scores = dict[str, list[list[float]]]
"""By objective: [candidate][head]."""


def fingerprint(model: PreTrainedModel) -> str:
    """A hash of the model's configuration and of evenly spread elements of each of its weights."""
    config = model.config.to_dict()
    kept = {
        k: v for k, v in config.items() if not k.startswith("_") and k != "transformers_version"
    }
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode())
    for name, weight in model.named_parameters():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        if weight.is_meta or not weight.numel():
            continue
        steps = torch.arange(SAMPLED, device=weight.device)
        places = steps * (weight.numel() - 1) // (SAMPLED - 1)
        digest.update(weight.detach().reshape(-1)[places].double().cpu().numpy().tobytes())
    return digest.hexdigest()


def hash_of_prompts(prompts: Sequence[Tensor]) -> list[str]:
    """A hash of each prompt's token ids."""
    return [hashlib.sha256(ids.cpu().long().numpy().tobytes()).hexdigest() for ids in prompts]


@dataclass
class Progress:
    """Results by "prompt/layer", written to a file as they come.

    Attributes:
        path: where they are kept, None for nowhere.
        about: the model, prompts and settings that they belong to.
        cost: what candidates cost; None until it is known.
        scores: of every candidate.
        grown: patterns and kept mass after growth.
        ended: passes over a prompt that are done, as "scores/0" or "grown/0".
    """

    path: Path | None
    about: dict[str, Any]
    cost: CostModel | None = None
    scores: dict[str, Scores] = field(default_factory=dict)
    grown: dict[str, tuple[list[Pattern], list[float]]] = field(default_factory=dict)
    ended: list[str] = field(default_factory=list)

    @classmethod
    def load(cls, path: Path | None, about: dict[str, Any]) -> Progress:
        """What the file holds if it is of that search; else nothing, with a warning."""
        own = cls(path, about)
        if path is None or not path.is_file():
            return own
        try:
            kept = read_json(path)
            if kept["about"] != about:
                differing = sorted(k for k in about if kept["about"].get(k) != about[k])
                warn_once(
                    f"{path} is of a search with another {', '.join(differing)}; starting anew"
                )
                return own
            own.read(kept)
        except (PatternFileError, KeyError, TypeError, ValueError, AttributeError) as error:
            warn_once(f"{path} cannot be used ({error}); starting anew")
            return cls(path, about)
        return own

    def read(self, kept: dict[str, Any]) -> None:
        """Takes over what `write` wrote."""
        timings = kept["timings"]
        self.cost = CostModel(None if timings is None else Timings.from_dict(timings))
        self.scores, self.ended = kept["scores"], kept["ended"]
        self.grown = {
            key: ([pattern_from_dict(p) for p in entry["patterns"]], entry["mass"])
            for key, entry in kept["grown"].items()
        }

    def write(self) -> None:
        """Keeps everything, where there is a place for it."""
        if self.path is None or self.cost is None:
            return
        timings = self.cost.timings
        grown = {
            key: {"patterns": [p.to_dict() for p in own], "mass": mass}
            for key, (own, mass) in self.grown.items()
        }
        kept = {
            "about": self.about,
            "timings": None if timings is None else timings.to_dict(),
            "scores": self.scores,
            "grown": grown,
            "ended": self.ended,
        }
        write_text(self.path, json.dumps(kept))

    def end(self, name: str) -> None:
        """Marks a pass as done."""
        self.ended.append(name)
        self.write()

    def remove(self) -> None:
        """Forgets the file."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
