"""The plugin's options: read from JSON, checked, and turned into a method. Needs no vLLM.

The same plain form travels from `attach_llm` to worker processes, so nothing is ever pickled.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from minference import env
from minference.errors import UnsupportedError, unknown_name
from minference.head_patterns import HeadPatterns, get_support_models, tables_in
from minference.log import get_logger
from minference.methods import Method, get_method
from minference.methods.spec import named_method

KEY = "minference"
"""Name of the options in vLLM's additional config, and in a file around them."""


@dataclass(frozen=True)
class Model:
    """What options may depend on.

    Attributes:
        names: the served model's id or path, then its other names.
        model_type: `model_type` of the transformers config.
        layers: attention layers of the whole model.
        heads: query heads of a layer, over all tensor-parallel ranks.
    """

    names: tuple[str, ...]
    model_type: str
    layers: int
    heads: int


@dataclass(frozen=True)
class Options:
    """What is asked of vLLM's attention.

    Attributes:
        method: name of a method.
        settings: the method's own options, `patterns` among them.
        min_chunk: chunks of fewer queries (decode, the tail of a prompt) stay dense.
        starting_layer: layers below it stay dense.
        workspace_mib: most MiB of keys and values that are copied out of pages at a time; the
            context of one KV head at least.
        impl: implementation of the operations.
    """

    method: str = "minference"
    settings: Mapping[str, Any] = field(default_factory=dict)
    min_chunk: int = 128
    starting_layer: int = 0
    workspace_mib: int = 512
    impl: str = "auto"

    def __post_init__(self) -> None:
        """Checks every name and number that needs no model."""
        fields = _method_fields(get_method(self.method))
        own = [f.name for f in dataclasses.fields(self) if f.name != "settings"]
        for name in self.settings:
            if name not in fields:
                kind = f"minference option (method {self.method!r})"
                raise unknown_name(kind, name, {*own, *fields})
        for name, least in (("min_chunk", 2), ("starting_layer", 0), ("workspace_mib", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"minference option {name} must be an int >= {least}, got {value}")
        if self.impl not in env.IMPLS:
            raise unknown_name("minference option impl", self.impl, env.IMPLS)

    @classmethod
    def from_dict(cls, data: object) -> Self:
        """Reads decoded JSON: an object, or true for the defaults.

        Raises:
            TypeError: neither.
            ValueError: an option or a method that does not exist, or a bad value.
        """
        if data is True:
            return cls()
        if not isinstance(data, Mapping):
            raise TypeError(f"minference options must be an object or true, got {data!r:.60}")
        own = {f.name for f in dataclasses.fields(cls)} - {"settings"}
        settings = {name: value for name, value in data.items() if name not in own}
        return cls(settings=settings, **{name: data[name] for name in data.keys() & own})

    @classmethod
    def from_method(cls, method: Method, **common: Any) -> Self:  # noqa: ANN401
        """The options that build an equal method in another process."""
        return cls.from_dict({**_encode(method), **common})

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values that `from_dict` reads."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        settings = own.pop("settings")
        return {**own, **settings}

    def build(self, model: Model) -> Method:
        """The method, with the model's own patterns where none are named.

        Raises:
            ValueError: a bad value, or patterns of another shape than the model's.
        """
        method = _decode(self.method, self.settings, model)
        for patterns in _patterns_of(method):
            if patterns.shape != (model.layers, model.heads):
                raise ValueError(
                    f"patterns must hold {model.layers} layers of {model.heads} heads for "
                    f"{model.names[0]!r}, got {patterns.layers} of {patterns.heads}; name the "
                    f"model's own file or leave `patterns` out"
                )
        return method


def asked_options(additional: object, *, custom_backend: bool) -> Options | None:
    """What a configuration asks for; None means that nothing was asked.

    Args:
        additional: vLLM's additional config; its entry `minference` wins, false for nothing.
        custom_backend: whether the attention backend CUSTOM was chosen, which asks for the
            defaults where no options are given.

    Raises:
        FileNotFoundError: MINFERENCE_CONFIG names no file.
        TypeError, ValueError: options that do not exist, or bad values.
    """
    asked = additional.get(KEY) if isinstance(additional, Mapping) else None
    if asked is False:
        return None
    if asked is not None:
        return Options.from_dict(asked)
    path = env.config_path()
    if path is not None:
        return Options.from_dict(_read(path))
    return Options() if custom_backend else None


def model_patterns(model: Model) -> HeadPatterns:
    """Patterns found by the model's names, by its folder, or by its architecture and shape."""
    for name in model.names:
        if name in get_support_models() or tables_in(name):
            return HeadPatterns.from_pretrained(name)
    found = HeadPatterns.for_shape(model.layers, model.heads, model.model_type)
    origin = found.provenance.model or "the default patterns"
    get_logger(__name__).warning(
        "no head patterns for %s; using %s. Name a file with the option `patterns`",
        model.names[0],
        origin,
    )
    return found


def _read(path: Path) -> object:
    if not path.is_file():
        raise FileNotFoundError(f"MINFERENCE_CONFIG names no file: {str(path)!r}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"MINFERENCE_CONFIG: {path.name} is not JSON: {error}") from error
    return data[KEY] if isinstance(data, dict) and data.keys() == {KEY} else data


def _method_fields(cls: type[Method]) -> dict[str, Any]:
    return {f.name: f for f in dataclasses.fields(cls) if f.init and f.repr}


def _patterns_of(method: Method) -> list[HeadPatterns]:
    values = [getattr(method, name) for name in _method_fields(type(method))]
    inner = [p for v in values if isinstance(v, Method) for p in _patterns_of(v)]
    return [v for v in values if isinstance(v, HeadPatterns)] + inner


def _encode(method: Method) -> dict[str, Any]:
    data: dict[str, Any] = {"method": method.name}
    for name in _method_fields(type(method)):
        value = getattr(method, name)
        if isinstance(value, HeadPatterns):
            value = value.to_dict()
        elif isinstance(value, Method):
            value = _encode(value)
        data[name] = value
    try:
        return json.loads(json.dumps(data))
    except TypeError as error:
        raise UnsupportedError(
            f"method {method.name!r} cannot be sent to vLLM's workers: {error}; its fields must "
            f"be numbers, text, patterns or methods"
        ) from error


def _read_patterns(value: object) -> HeadPatterns:
    if isinstance(value, Mapping):
        return HeadPatterns.from_dict(dict(value))
    if not isinstance(value, str):
        raise ValueError(f"option patterns must be a file, an id or a table, got {value!r}")
    return HeadPatterns.from_pretrained(value)


def _decode(name: str, settings: Mapping[str, Any], model: Model) -> Method:
    values: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and "method" in value:
            inner = {k: v for k, v in value.items() if k != "method"}
            values[key] = _decode(str(value["method"]), inner, model)
        elif key == "patterns" and value is not None:
            values[key] = _read_patterns(value)
        elif key != "patterns":
            values[key] = value
    try:
        return named_method(name, values, lambda: model_patterns(model))
    except TypeError as error:
        raise ValueError(f"bad options of method {name!r}: {error}") from error
