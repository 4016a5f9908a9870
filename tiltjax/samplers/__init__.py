r"""Samplers without weights.

| sampler | |
|---|---|
| `sample` | follow a model, guided or not, from noise to data |
| `sample_with_log_prob` | the same, with the log-density of the law of the samples |
| `flow` | the probability flow of one state, as a function of time |
| `gibbs` | the exact tilt by a concave quadratic reward |
| `best_of_n`, `softmax_of_n` | selection among finished samples |
| `calibrate` | the mean squared error of a denoiser, which `Conjugate` needs |
"""

from tiltjax.samplers._calibrate import calibrate
from tiltjax.samplers._density import sample_with_log_prob
from tiltjax.samplers._flow import Flow, flow
from tiltjax.samplers._gibbs import gibbs
from tiltjax.samplers._sample import (
    check_noise,
    check_run,
    evaluate,
    first_time,
    initial_noise,
    map_particles,
    resolve_times,
    sample,
    started,
)
from tiltjax.samplers._selection import best_of_n, softmax_of_n

__all__ = [
    "sample",
    "sample_with_log_prob",
    "flow",
    "Flow",
    "gibbs",
    "best_of_n",
    "softmax_of_n",
    "calibrate",
]
