"""Tensor mathematics: polynomials, Newton–Schulz, matrix views, update scales. Knows no ranks."""
