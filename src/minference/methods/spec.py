"""Methods as the command line writes them: `minference:vertical=100,slash=800`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from minference.errors import unknown_name
from minference.head_patterns import HeadPatterns, default_patterns
from minference.lengths import parse_length
from minference.log import warn_once
from minference.methods import Method, get_method
from minference.model_config import layers_and_heads
from minference.patterns import BUDGET_LENGTH, VerticalSlash

_BUDGETS = ("vertical", "slash")
_INTERNAL = ("lines",)


@dataclass(frozen=True)
class MethodSpec:
    """A method and its options as text; `label` names it in every record."""

    label: str
    name: str
    options: tuple[tuple[str, str], ...] = ()


def parse_method(text: str) -> MethodSpec:
    """Reads `name` or `name:key=value,key=value`.

    Raises:
        ValueError: an unknown method, an option that it does not have or that is not `key=value`.
    """
    text = text.strip()
    name, _, rest = text.partition(":")
    valid = _options(get_method(name))
    options: list[tuple[str, str]] = []
    for piece in filter(None, rest.split(",")):
        key, equals, value = (part.strip() for part in piece.partition("="))
        if not equals or not key or not value:
            raise ValueError(f"option {piece!r} of method {name!r} must read key=value")
        if key not in valid:
            raise unknown_name(f"option of {name!r}", key, valid)
        if key in dict(options):
            raise ValueError(f"option {key!r} of method {name!r} must be given once, got {text!r}")
        options.append((key, value))
    return MethodSpec(text, name, tuple(options))


def parse_methods(text: str) -> list[MethodSpec]:
    """Reads `dense,minference:vertical=100,slash=800,a_shape`.

    A comma starts a new method unless `key=value` follows it.

    Raises:
        ValueError: as `parse_method`; no method, or one twice.
    """
    groups: list[str] = []
    for piece in (piece.strip() for piece in text.split(",")):
        if "=" in piece.split(":", 1)[0] and groups:
            groups[-1] += "," + piece
        elif piece:
            groups.append(piece)
    specs = [parse_method(group) for group in groups]
    labels = [spec.label for spec in specs]
    if not specs or len(set(labels)) < len(labels):
        raise ValueError(f"methods must name each method once and at least one, got {text!r}")
    return specs


def build_method(spec: MethodSpec, config: Any) -> Method:  # noqa: ANN401
    """A fresh instance for a model.

    `patterns` takes a file or a model id, `vertical` and `slash` give every head the same budgets;
    without any of them a method that needs patterns gets those of the model's architecture and
    shape. Budgets that come with patterns shrink in contexts of less than 128K tokens, those given
    as numbers stay; `budget_length` says otherwise.

    Args:
        spec: what to build.
        config: configuration of the transformers model.

    Raises:
        ValueError: a value that the method refuses, or patterns and budgets as numbers.
    """
    cls = get_method(spec.name)
    known = _options(cls)
    options: dict[str, Any] = {}
    for key, value in spec.options:
        options[key] = HeadPatterns.from_pretrained(value) if key == "patterns" else _value(value)
    if not takes_patterns(cls):
        return cls(**options)
    budgets = {key: options.pop(key) for key in _BUDGETS if key in options}
    if budgets and "patterns" in options:
        raise ValueError(
            f"method {spec.label!r} has both patterns and {', '.join(budgets)}; give one"
        )
    if "budget_length" in known and not budgets:
        options.setdefault("budget_length", BUDGET_LENGTH)
    return named_method(spec.name, options, lambda: _patterns(config, budgets))


def named_method(
    name: str, options: Mapping[str, Any], patterns: Callable[[], HeadPatterns]
) -> Method:
    """A method by its name and options; `patterns` finds those of one that takes them and was given
    none.

    Raises:
        ValueError: an unknown method, or a value that it refuses.
        TypeError: an option that it does not have.
    """
    cls = get_method(name)
    own = {} if not takes_patterns(cls) or "patterns" in options else {"patterns": patterns()}
    return cls(**own, **options)


def takes_patterns(cls: type[Method]) -> bool:
    """Whether a method needs the patterns of a model's heads."""
    return any(field.name == "patterns" for field in fields(cls))


def _options(cls: type[Method]) -> set[str]:
    """What a specification may say of a method: its fields, and budgets where it takes patterns."""
    known = {field.name for field in fields(cls)} - {*_INTERNAL}
    return known | {*_BUDGETS} if takes_patterns(cls) else known


def fitting_patterns(config: Any) -> HeadPatterns:  # noqa: ANN401
    """The published patterns of this architecture and shape, else the default with a warning.

    Args:
        config: a text model's configuration.
    """
    (layers, heads), kind = layers_and_heads(config), config.model_type
    patterns = HeadPatterns.for_shape(layers, heads, kind)
    if patterns.provenance.model is None:
        warn_once(
            f"no published patterns for this {kind} of {layers} layers: every head gets the "
            "default pattern; `minference search MODEL` finds better, `patterns=FILE` takes what "
            "it found"
        )
    return patterns


def _patterns(config: Any, budgets: dict[str, int]) -> HeadPatterns:  # noqa: ANN401
    text = config.get_text_config(decoder=True)
    shape = layers_and_heads(text)
    if not budgets:
        return fitting_patterns(text)
    for key, value in budgets.items():
        if not isinstance(value, int):
            raise ValueError(f"{key} must be a number of tokens, got {value!r}")
    return default_patterns(*shape, VerticalSlash(**budgets))


def _value(text: str) -> object:
    named = {"none": None, "null": None, "true": True, "false": False}
    if text.lower() in named:
        return named[text.lower()]
    for kind in (int, parse_length, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
