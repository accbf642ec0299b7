"""Where the last queries look: attention mass by column, distance and block offset."""
