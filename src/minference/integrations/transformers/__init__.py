"""transformers: sparse prefill through its attention interface.

Importing this package registers `attn_implementation="minference"`, which then works by name.
"""

from minference.errors import require

require("transformers", "hf")

from minference.integrations.transformers.attach import attach
from minference.integrations.transformers.handle import Handle
from minference.integrations.transformers.host_cache import HostCache
from minference.integrations.transformers.memory import Memory, check_memory, estimate_memory
from minference.integrations.transformers.patch import MInference, attn_types

__all__ = [
    "Handle",
    "HostCache",
    "MInference",
    "Memory",
    "attach",
    "attn_types",
    "check_memory",
    "estimate_memory",
]
