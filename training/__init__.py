"""Trains models/needle, the small byte-level model that retrieves over long contexts.

Run as `python -m training.train`; not part of the wheel.
"""
