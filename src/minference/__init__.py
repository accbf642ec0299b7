"""Dynamic sparse attention for the prefill of long prompts.

Public names load on first use, so that `import minference` stays quick, needs no optional package
and never initialises CUDA.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minference.errors import UnsupportedError
    from minference.patterns import (
        AShape,
        BlockSparse,
        Dense,
        Pattern,
        TriShape,
        VerticalSlash,
    )

__version__ = "0.1.0.dev0"

_EXPORTS = {
    "UnsupportedError": "minference.errors",
    "AShape": "minference.patterns",
    "BlockSparse": "minference.patterns",
    "Dense": "minference.patterns",
    "Pattern": "minference.patterns",
    "TriShape": "minference.patterns",
    "VerticalSlash": "minference.patterns",
}

__all__ = [
    "AShape",
    "BlockSparse",
    "Dense",
    "Pattern",
    "TriShape",
    "UnsupportedError",
    "VerticalSlash",
    "__version__",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
