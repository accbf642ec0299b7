"""Benchmarks behind a correctness gate: attention over planted patterns, with dense baselines."""
