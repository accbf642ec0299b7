"""Methods by name and options, as the command line writes them: `minference:budget_length=32k`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from minference.errors import unknown_name
from minference.head_patterns import HeadPatterns, default_patterns
from minference.methods import Method, get_method
from minference.patterns import VerticalSlash

_BUDGETS = ("vertical", "slash")
_INTERNAL = ("lines",)


@dataclass(frozen=True)
class MethodSpec:
    """A method and its options as text; `label` names it in every record."""

    label: str
    name: str
    options: tuple[tuple[str, str], ...] = ()


def parse_methods(text: str) -> list[MethodSpec]:
    """Reads `dense,minference:vertical=100,slash=800,a_shape`.

    A comma starts a new method unless `key=value` follows it.

    Raises:
        ValueError: an unknown method, an option that is not `key=value`, or a method twice.
    """
    groups: list[str] = []
    for piece in (piece.strip() for piece in text.split(",")):
        if "=" in piece.split(":", 1)[0] and groups:
            groups[-1] += "," + piece
        elif piece:
            groups.append(piece)
    specs = [_parse(group) for group in groups]
    labels = [spec.label for spec in specs]
    if not specs or len(set(labels)) < len(labels):
        raise ValueError(f"methods must name each method once and at least one, got {text!r}")
    return specs


def build_method(spec: MethodSpec, config: Any) -> Method:  # noqa: ANN401
    """A fresh instance for a model.

    `patterns` takes a file or a model id, `vertical` and `slash` give every head the same budgets;
    without any of them a method that needs patterns gets those of the model's shape.

    Args:
        spec: what to build.
        config: configuration of the transformers model.

    Raises:
        ValueError: an option that the method does not have, or a value that it refuses.
    """
    cls = get_method(spec.name)
    known = {field.name: field for field in fields(cls) if field.name not in _INTERNAL}
    budgeted = "patterns" in known
    valid = [*known, *(_BUDGETS if budgeted else ())]
    options: dict[str, Any] = {}
    for key, value in spec.options:
        if key not in valid:
            raise unknown_name(f"option of {spec.name!r}", key, valid)
        options[key] = HeadPatterns.from_pretrained(value) if key == "patterns" else _value(value)
    if budgeted:
        budgets = {key: options.pop(key) for key in _BUDGETS if key in options}
        if budgets and "patterns" in options:
            raise ValueError(
                f"method {spec.label!r} has both patterns and {', '.join(budgets)}; give one"
            )
        options.setdefault("patterns", _patterns(config, budgets))
    return cls(**options)


def _parse(text: str) -> MethodSpec:
    name, _, rest = text.partition(":")
    get_method(name)
    options = []
    for piece in filter(None, rest.split(",")):
        key, equals, value = piece.partition("=")
        if not equals or not key or not value:
            raise ValueError(f"option {piece!r} of method {name!r} must read key=value")
        options.append((key.strip(), value.strip()))
    return MethodSpec(text, name, tuple(options))


def _patterns(config: Any, budgets: dict[str, int]) -> HeadPatterns:  # noqa: ANN401
    text = config.get_text_config()
    shape = text.num_hidden_layers, text.num_attention_heads
    if budgets:
        return default_patterns(
            *shape, VerticalSlash(**{"vertical": 1000, "slash": 6096} | budgets)
        )
    return HeadPatterns.for_shape(*shape, text.model_type)


def _value(text: str) -> object:
    lowered = text.lower()
    if lowered in ("none", "null"):
        return None
    if lowered in ("true", "false"):
        return lowered == "true"
    for kind in (parse_length, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def parse_length(text: str) -> int:
    """A number of tokens: `4096`, `4k` (4096), `1m` (2 ** 20).

    Raises:
        ValueError: anything else.
    """
    lowered = text.strip().lower()
    factor = {"k": 1 << 10, "m": 1 << 20}.get(lowered[-1:], 1)
    digits = lowered if factor == 1 else lowered[:-1]
    if not digits.isascii() or not digits.isdigit():
        raise ValueError(f"a length must be a number of tokens such as 4096 or 128k, got {text!r}")
    return int(digits) * factor
