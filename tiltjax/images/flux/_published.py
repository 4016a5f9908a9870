r"""Reward guidance of FLUX.1 as it is published, put together from parts of this library.

    v_sigma -> v_sigma - min(sigma / (1 - sigma), limit) g
    g = sum_i w_i c_i g_i,    w = softmax(scale r_1, ..., scale r_k)
    g_i = ∇_x r(decode(X_{s,1}(x_s^i)))
    c_i = length / |g_i|,     or scale;    with damping also / (1 + 2 |c_i g_i| v_t)

x_s^i is the state after noise was added until its snr is `snr_factor` lower, X_{s,1} one call of a
flow map. Guided are the steps `first`, ..., `first + guided - 1` of 28; the others are the flow
map's alone, from each time to the next.

| published | here |
|---|---|
| renoising and one lookahead | `Lookahead(model, snr_factor)`; a factor of 1 adds no noise: FMRG |
| reward of the decoded image | `Decoded(model.decode, reward)` in `PlugIn` |
| gradients of one length | `Normalized(., length)`; with a divisor d instead, `scale = 1 / d` |
| damping with its sigma | `NormDamped(., sigma)` |
| k particles | `Averaged(., k)`: each gradient brought to its length, then weighed |
| the coefficient and its cap | `GainCapped(., limit)`: the factor `(1 - t) / t` of any guidance |
| the guided steps | `Window(., times[first], times[first + guided])` |
| steps of the flow map | `Euler()` on `model.leaping(times)` |

    particles = published(key, model, reward, num=4)
    images = model.decode(particles.x)

A guided step calls the network once for the step and once, forward and backward, for the k
particles, as one batch. What is different: a run starts at t = 1e-3 instead of 0 (`times`), an
image's gradient is brought to its length by itself where several are made at once, and so is that
of a negative reward, whose weights are those of `-r`.

Normalized gradients make a reward's scale inert but in w: what is sampled is no tilt, and no scale
of one. To sample a tilt, leave the length out and weigh (`tiltjax.smc`). References: Dandapanthula
and Boffi (arXiv 2606.02884); Holderrieth et al. (arXiv 2602.05993), whose pipeline it simplifies.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Array

from tiltjax import _checks, grids
from tiltjax.guidance import Guidance, PlugIn
from tiltjax.guidance.wrappers import Averaged, GainCapped, Normalized, NormDamped, Window
from tiltjax.images.flux._model import FACTOR, FluxModel, Lookahead, times
from tiltjax.images.rewards import Decoded
from tiltjax.particles import Particles
from tiltjax.posteriors import Tweedie
from tiltjax.samplers import sample
from tiltjax.solvers import Euler


def published(
    key: Array,
    model: FluxModel,
    reward: Callable,
    *,
    num: int = 1,
    steps: int = 28,
    grid: Array | None = None,
    start: Array | None = None,
    chunk_size: int | None = None,
    progress: bool = False,
    **settings: Any,
) -> Particles:
    """Latents of guided images, sampled as published.

    **Arguments:**

    - `model`, of a network with two times and an autoencoder. With one time it is guided at the
      denoiser (`Tweedie`; no noise is added, `snr_factor` does not count) and takes steps of Euler.
    - `reward`, of an image `(height, width, 3)` in [0, 1].
    - `steps` of the published grid, or `grid`, the times themselves.
    - `num`, `start`, `chunk_size`, `progress`: as in `tiltjax.sample`.
    - `settings`: of `published_guidance`.

    **Raises:** as `tiltjax.sample` and `published_guidance`.
    """
    _checks.instance(model, FluxModel, "model", "published(key, FluxModel(...), reward)")
    if grid is None:
        grid = times(steps, FACTOR * model.shape[0], FACTOR * model.shape[1])
    if model.parts.transformer.config.dual_time:
        model = model.leaping(grid)
    guidance = published_guidance(model, reward, grid, **settings)
    return sample(
        key,
        model,
        guidance,
        num=num,
        times=grid,
        solver=Euler(),
        start=start,
        chunk_size=chunk_size,
        progress=progress,
    )


def published_guidance(
    model: FluxModel,
    reward: Callable,
    grid: Array,
    *,
    scale: float | Array = 1.0,
    k: int = 1,
    snr_factor: float | Array = 5.0,
    length: float | Array | None = 10.0,
    sigma: float | Array | None = None,
    limit: float | Array | None = 20.0,
    first: int = 1,
    guided: int = 5,
) -> Guidance:
    """The guidance of the published run, for `tiltjax.sample` and the other samplers.

    **Arguments:**

    - `model`, the one that is sampled: for a flow map `model.leaping(grid)`.
    - `reward`, of an image `(height, width, 3)` in [0, 1]; `grid`, the times of the run.
    - `scale`: in the weights of the k particles and, without a length, on the gradient.
    - `k`, `snr_factor`; `length` of every gradient, `None` to leave them `scale` times what they
      are; `sigma` of the damping; `limit` of the coefficient, `None` for none.
    - `first`, `guided`: the first step that is guided, counted from 0, and how many are; as many as
      are left, if fewer.

    **Raises:** `ValueError` for steps that are not there.
    """
    _checks.instance(model, FluxModel, "model", "published_guidance(FluxModel(...), reward, grid)")
    grid = grids.time_grid(grid, None)
    start, stop = _guided_steps(first, guided, len(grid) - 1)
    dual = model.parts.transformer.config.dual_time
    posterior = Lookahead(model, snr_factor) if dual else Tweedie(model)
    guidance: Guidance = PlugIn(posterior, Decoded(model.decode, reward), scale)
    if length is not None:
        guidance = Normalized(guidance, length)
    if sigma is not None:
        guidance = NormDamped(guidance, sigma)
    if _checks.count(k, "k") > 1:
        guidance = Averaged(guidance, k)
    if limit is not None:
        guidance = GainCapped(guidance, limit)
    # Read off with NumPy, so that the window's ends are the grid's own numbers also inside of
    # someone's jit.
    ends = np.asarray(grid) if _checks.concrete(grid) else grid
    return Window(guidance, ends[start], ends[stop])


def _guided_steps(first: int, guided: int, steps: int) -> tuple[int, int]:
    if isinstance(first, bool) or not isinstance(first, int) or not 0 <= first < steps:
        raise ValueError(f"first must be one of the steps 0 to {steps - 1}, got {first!r}")
    return first, min(first + _checks.count(guided, "guided"), steps)
