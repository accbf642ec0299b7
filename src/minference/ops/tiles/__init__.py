"""From chosen tiles to the lists of an index."""
