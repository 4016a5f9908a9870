"""Closed forms and quadrature for reward-tilted Gaussian mixtures: what each sampler should, and will, produce."""
