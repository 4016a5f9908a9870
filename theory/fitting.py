r"""A Gaussian mixture for samples: the way to `theory` without a closed form.

`fit_mixture` maximizes `sum_i log sum_k w_k N(x_i; mu_k, S_k)`, by the expectation-maximization of
scikit-learn. `recommend` and all laws of `theory` then apply to samples of a real model, as far as
the mixture describes the model.
"""

import importlib
import warnings
from typing import Any

import numpy as np

from tiltjax import _checks
from tiltjax.mixtures import GaussianMixture

_FLOOR = 1e-6  # of a variance, relative to the mean variance of the samples
_STARTS, _ITERATIONS, _TOLERANCE = 4, 1000, 1e-5  # the tolerance is of the mean log-likelihood


def fit_mixture(samples: Any, components: int, *, seed: int = 0) -> GaussianMixture:
    """The mixture of `components` Gaussians with full covariances that is most likely for
    `samples`, the best of four starts.

    Limits. The fit finds a local maximum, and it needs many more samples than the
    `components (d + 1) (d + 2) / 2` numbers of the mixture: for images, fit a few coordinates that
    the reward depends on. Predictions for the fit hold for a model as far as its law is this
    mixture. A tilt weighs the tails of the law, where a fit knows least. So compare
    `theory.tilt(fit, reward, scale)` with held-out samples that have large rewards.

    **Arguments:**

    - `samples`: `(n, d)`, without weights: `particles.x`, or `particles.resample(key)`.
    - `components`: their number, at least 1.
    - `seed`: of the starts.

    **Raises:** `ValueError` for samples that are not finite, all equal, or fewer than
    `components (d + 1)`; `ImportError` without scikit-learn.

    Source: Dempster, Laird and Rubin 1977, *Maximum likelihood from incomplete data via the EM
    algorithm*.
    """
    components, seed = _checks.count(components, "components"), _checks.count(seed, "seed", 0)
    x = np.asarray(_checks.finite(samples, "samples", 2), np.float64)
    n, d = x.shape
    if n < components * (d + 1):
        raise ValueError(
            f"{components} components in {d} dimensions need at least {components * (d + 1)} "
            f"samples, got {n}: draw more samples or use fewer components"
        )
    mixture = _sklearn("mixture")
    center, unit = x.mean(0), np.sqrt(x.var(0).mean())
    if unit == 0:
        raise ValueError("all samples are equal, so a mixture has no width to fit")
    fit = mixture.GaussianMixture(
        components,
        tol=_TOLERANCE,
        reg_covar=_FLOOR,
        max_iter=_ITERATIONS,
        n_init=_STARTS,
        random_state=seed,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", _sklearn("exceptions").ConvergenceWarning)  # told below
        fit.fit((x - center) / unit)
    if not fit.converged_:
        _checks.warn(
            f"expectation-maximization did not converge with {components} components: use fewer"
        )
    return GaussianMixture(fit.weights_, center + unit * fit.means_, unit**2 * fit.covariances_)


def _sklearn(module: str) -> Any:
    try:
        return importlib.import_module(f"sklearn.{module}")
    except ImportError:
        raise ImportError("fit_mixture needs scikit-learn: pip install tiltjax[fit]") from None
