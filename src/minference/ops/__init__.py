"""Tensor operations: estimate, select, pool, attend. Each has a readable reference beside it."""
