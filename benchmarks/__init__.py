"""Each benchmark answers one question: `python -m benchmarks.accuracy.gaussian_tilt`."""
