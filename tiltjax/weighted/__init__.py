"""Weighted particles: sequential Monte Carlo, published methods, audits."""

from tiltjax.weighted import potentials, proposals, tempering
from tiltjax.weighted._audit import RELIABLE, USABLE, Audit, Estimated, audit, pareto_shape, report
from tiltjax.weighted._methods import das, fk_steering, tds
from tiltjax.weighted._smc import descend, everywhere, less, own_key, smc

__all__ = [
    "smc",
    "descend",
    "everywhere",
    "own_key",
    "less",
    "fk_steering",
    "das",
    "tds",
    "RELIABLE",
    "USABLE",
    "Estimated",
    "Audit",
    "audit",
    "report",
    "pareto_shape",
    "proposals",
    "potentials",
    "tempering",
]
