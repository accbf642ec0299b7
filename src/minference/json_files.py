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
