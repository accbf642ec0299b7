"""Blocks of each query tile by the rows of its group, coarse to fine, and their guard."""
