"""XAttention's block scores: sums over antidiagonals of strided queries and keys."""
