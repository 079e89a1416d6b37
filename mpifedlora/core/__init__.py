"""Algorithms and protocol: pure functions and values."""
