r"""Weighted particles: sequential Monte Carlo, the published methods, and audits.

`smc` samples with weights; `fk_steering`, `das`, `tds` and `svdd` are the published methods;
`audit` measures how far a guidance is from the tilt. The parts of a run are in
`weighted.proposals`, `weighted.potentials`, `weighted.tempering` and `tiltjax.resampling`. With
`SMC`, `init`, `step` and `finish` you can write the loop of `smc` yourself.
"""

from tiltjax._tails import pareto_shape, tail_length
from tiltjax.weighted import potentials, proposals, tempering
from tiltjax.weighted._audit import Audit, Estimated, audit, report
from tiltjax.weighted._methods import das, fk_steering, svdd, tds
from tiltjax.weighted._smc import SMC, Info, State, finish, init, smc, step

__all__ = [
    "smc",
    "fk_steering",
    "das",
    "tds",
    "svdd",
    "SMC",
    "State",
    "Info",
    "init",
    "step",
    "finish",
    "audit",
    "Audit",
    "Estimated",
    "pareto_shape",
    "proposals",
    "potentials",
    "tempering",
]
