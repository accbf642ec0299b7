"""Columns and offsets of vertical-slash heads in one operator."""
