"""Dynamic sparse attention for the prefill of long prompts.

Public names load on first use, so that `import minference` stays quick, needs no optional package
and never initialises CUDA.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minference import methods as methods
    from minference.errors import MissingDependencyError, PatternFileError, UnsupportedError
    from minference.functional import (
        block_sparse_attention,
        streaming_forward,
        vertical_slash_sparse_attention,
    )
    from minference.head_patterns import HeadPatterns, default_patterns, get_support_models
    from minference.index import SparseIndex
    from minference.integrations.transformers import MInference, attach
    from minference.ops.attention.api import sparse_attention
    from minference.patterns import (
        AShape,
        BlockSparse,
        Dense,
        Pattern,
        TriShape,
        VerticalSlash,
    )

__version__ = "0.1.0.dev0"

# public name -> the module that holds it; a module is its own name
_EXPORTS = {
    "AShape": "minference.patterns",
    "BlockSparse": "minference.patterns",
    "Dense": "minference.patterns",
    "HeadPatterns": "minference.head_patterns",
    "MInference": "minference.integrations.transformers",
    "MissingDependencyError": "minference.errors",
    "Pattern": "minference.patterns",
    "PatternFileError": "minference.errors",
    "SparseIndex": "minference.index",
    "TriShape": "minference.patterns",
    "UnsupportedError": "minference.errors",
    "VerticalSlash": "minference.patterns",
    "attach": "minference.integrations.transformers",
    "block_sparse_attention": "minference.functional",
    "default_patterns": "minference.head_patterns",
    "get_support_models": "minference.head_patterns",
    "methods": "minference.methods",
    "sparse_attention": "minference.ops.attention.api",
    "streaming_forward": "minference.functional",
    "vertical_slash_sparse_attention": "minference.functional",
}
__all__ = [
    "AShape",
    "BlockSparse",
    "Dense",
    "HeadPatterns",
    "MInference",
    "MissingDependencyError",
    "Pattern",
    "PatternFileError",
    "SparseIndex",
    "TriShape",
    "UnsupportedError",
    "VerticalSlash",
    "__version__",
    "attach",
    "block_sparse_attention",
    "default_patterns",
    "get_support_models",
    "methods",
    "sparse_attention",
    "streaming_forward",
    "vertical_slash_sparse_attention",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(_EXPORTS[name])
    return module if _EXPORTS[name] == f"{__name__}.{name}" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
