"""Metrics: pure functions of Python and NumPy values."""
