"""Samplers without weights."""

from tiltjax.samplers._calibrate import calibrate
from tiltjax.samplers._density import sample_with_log_prob
from tiltjax.samplers._flow import Flow, flow
from tiltjax.samplers._gibbs import Mixing, gibbs
from tiltjax.samplers._sample import first_time, fitting, run_times, sample
from tiltjax.samplers._selection import best_of_n, softmax_of_n

__all__ = [
    "sample",
    "fitting",
    "run_times",
    "first_time",
    "Flow",
    "flow",
    "sample_with_log_prob",
    "Mixing",
    "gibbs",
    "best_of_n",
    "softmax_of_n",
    "calibrate",
]
