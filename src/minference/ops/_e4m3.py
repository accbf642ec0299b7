"""The eight-bit format of keys kept and of fp8 products."""

import torch

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
"""Largest number of the format."""
