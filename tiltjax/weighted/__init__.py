r"""Weighted particles: sequential Monte Carlo, its published settings, and audits.

`smc` samples with weights; `fk_steering`, `das` and `tds` are published settings of it; `audit`
measures how far a guidance is from the tilt. What a run is made of: `weighted.proposals`,
`weighted.potentials`, `weighted.tempering`, and `tiltjax.resampling`.
"""

from tiltjax.weighted import potentials, proposals, tempering
from tiltjax.weighted._audit import Audit, Estimated, audit, pareto_shape, report
from tiltjax.weighted._methods import das, fk_steering, tds
from tiltjax.weighted._smc import smc

__all__ = [
    "smc",
    "fk_steering",
    "das",
    "tds",
    "audit",
    "Audit",
    "Estimated",
    "pareto_shape",
    "proposals",
    "potentials",
    "tempering",
]
