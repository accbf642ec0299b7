"""Offline search for the pattern of every head of a model."""
