"""Rows of numbers as bytes, for keys and values that wait on the host."""
