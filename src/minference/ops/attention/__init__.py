"""Attention over an index, over a server's pages, and dense."""
