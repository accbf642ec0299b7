"""JSON files read with one clear error and written whole or not at all. Floor 0."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minference.errors import PatternFileError


def read_json(path: Path) -> Any:  # noqa: ANN401
    """Decodes a file.

    Raises:
        FileNotFoundError: there is no such file.
        PatternFileError: the file is no JSON text.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no pattern file at {str(path)!r}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise PatternFileError(f"{path}: not JSON: {error}") from error


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Decodes a file of one object a line; empty lines count for nothing.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is no JSON object.
    """
    objects = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{path} must hold one JSON object a line, and line {number} is none: {error}"
            ) from error
        if not isinstance(found, dict):
            raise ValueError(
                f"{path} must hold one JSON object a line, got {type(found).__name__} in line "
                f"{number}"
            )
        objects.append(found)
    return objects


def write_text(path: Path, text: str) -> None:
    """Writes a file so that a reader sees the old text or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def line_json(data: Mapping[str, Any]) -> str:
    """JSON text with each entry of a top-level list or object on its own line."""
    lines = []
    for name, value in data.items():
        if isinstance(value, Mapping) and value:
            inner = ",\n".join(f"  {_dump(key)}: {_dump(item)}" for key, item in value.items())
            lines.append(f" {_dump(name)}: {{\n{inner}\n }}")
        elif isinstance(value, list | tuple) and value:
            inner = ",\n".join(f"  {_dump(item)}" for item in value)
            lines.append(f" {_dump(name)}: [\n{inner}\n ]")
        else:
            lines.append(f" {_dump(name)}: {_dump(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _dump(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
