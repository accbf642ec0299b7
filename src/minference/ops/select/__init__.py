"""From scores to lists of columns and offsets."""
