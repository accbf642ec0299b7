"""The page of `minference demo`: a prompt answered dense and sparse, side by side."""
