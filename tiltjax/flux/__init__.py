"""FLUX.1 in Flax: the latent flow model as a `Model` like any other, its parts, and their published weights."""
