"""The Hopper kernel (`impl="hopper"`): CUDA C++ for sm_90a, compiled when it is first used."""

from minference.ops.attention.hopper.launch import sparse_attention, why_not

__all__ = ["sparse_attention", "why_not"]
