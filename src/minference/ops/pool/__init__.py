"""Scores of mean-pooled blocks, and the best of each row of blocks."""
