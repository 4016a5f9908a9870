r"""Reward guidance of FLUX.1 as published, built from parts of this library.

    v_sigma -> v_sigma - min(sigma / (1 - sigma), limit) g
    g = sum_i w_i c_i g_i,    w = softmax(scale r_1, ..., scale r_k)
    g_i = ∇_x r(decode(X_{s,1}(x_s^i)))
    c_i = length / |g_i|, or `scale` if there is no length;
        with damping also / (1 + 2 |c_i g_i| v_t)

x_s^i is the state after noise has lowered its snr by `snr_factor`, and X_{s,1} is one call of a
flow map. The steps `first`, ..., `first + guided - 1` of 28 are guided. The other steps are those
of the flow map alone, from each time to the next.

| published | tiltjax |
|---|---|
| renoising and one lookahead | `Lookahead(model, snr_factor)`; a factor of 1 adds no noise: FMRG |
| reward of the decoded image | `Decoded(model.decode, reward)` in `PlugIn` |
| gradients of one length | `Normalized(., length)`; with a divisor d instead, `scale = 1 / d` |
| damping with its sigma | `NormDamped(., sigma)` |
| k particles | `Averaged(., k)`: each gradient is normalized, then weighted |
| the coefficient and its cap | `GainCapped(., limit)`: the factor `(1 - t) / t` of any guidance |
| the guided steps | `Window(., times[first], times[first + guided])` |
| steps of the flow map | `Euler()` on `model.leaping(times)` |

    particles = published(key, model, reward, num=4)
    images = model.decode(particles.x)

A guided step calls the network once for the step and once, forward and backward, for the k
particles as one batch. There are three differences from the published code. A run starts at t =
1e-3 instead of 0 (`times`). The gradient of each image is normalized separately if several images
are sampled at once. The gradient of a negative reward is normalized too, and its weights are those
of `-r`.

With normalized gradients the scale of a reward only changes the weights w. The samples do not come
from a tilt at any scale. To sample a tilt, leave out the length and use weights (`tiltjax.smc`).
References: Dandapanthula and Boffi (arXiv 2606.02884); Holderrieth et al. (arXiv 2602.05993), whose
pipeline this module simplifies.
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
    """Latents of guided images, sampled with the published guidance.

    **Arguments:**

    - `model`, of a network with two times and an autoencoder. A model with one time is guided at
      the denoiser (`Tweedie`; no noise is added, `snr_factor` is ignored) and takes steps of Euler.
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

    - `model`, the sampled model: for a flow map `model.leaping(grid)`.
    - `reward`, of an image `(height, width, 3)` in [0, 1]; `grid`, the times of the run.
    - `scale`: of the reward in the weights of the k particles and, without a length, in the
      gradient.
    - `k`, `snr_factor`; `length` of every gradient, `None` for no normalization; `sigma` of the
      damping, `None` for no damping; `limit` of the coefficient, `None` for no limit.
    - `first`, `guided`: the first guided step, counted from 0, and the number of guided steps, at
      most the remaining ones.

    **Raises:** `ValueError` for a `first` that is not a step of the grid.
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
    # Read with NumPy, so that the ends of the window are exactly numbers of the grid, also inside
    # jit.
    ends = np.asarray(grid) if _checks.concrete(grid) else grid
    return Window(guidance, ends[start], ends[stop])


def _guided_steps(first: int, guided: int, steps: int) -> tuple[int, int]:
    if isinstance(first, bool) or not isinstance(first, int) or not 0 <= first < steps:
        raise ValueError(f"first must be one of the steps 0 to {steps - 1}, got {first!r}")
    return first, min(first + _checks.count(guided, "guided"), steps)
