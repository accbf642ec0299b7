"""FlexPrefill's choice for each head: blocks by means, or lines."""
