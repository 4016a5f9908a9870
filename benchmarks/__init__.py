"""Benchmarks, each for one question: `python -m benchmarks.accuracy.gaussian_tilt`."""
