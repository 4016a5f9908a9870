"""Time grids: published schedules, against plain numbers and their formulas. Tier: exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import contracts

import tiltjax as tj

STABLE = tj.DiscreteVP(np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2))
PATHS = contracts.paths()


def levels(path, times):
    return np.asarray(jax.vmap(path.sigma)(times) / jax.vmap(path.alpha)(times))


def indices(times, path=STABLE):
    assert float(times[-1]) == 1
    found = np.asarray(path.index(times[:-1]))
    np.testing.assert_allclose(found, np.round(found), atol=1e-9)
    return np.round(found).astype(int).tolist()


@pytest.mark.parametrize("name", PATHS)
def test_levels_of_karras_and_of_equal_ratios(name):
    path = PATHS[name]
    low, high, rho, n = 0.1, 4.0, 5.0, 7
    times = tj.grids.karras(path, n, sigma_min=low, sigma_max=high, rho=rho)
    roots = np.linspace(high ** (1 / rho), low ** (1 / rho), n)
    np.testing.assert_allclose(levels(path, times[:-1]), roots**rho, rtol=1e-9)
    times = tj.grids.exponential(path, n, sigma_min=low, sigma_max=high)
    np.testing.assert_allclose(levels(path, times[:-1]), np.geomspace(high, low, n), rtol=1e-9)
    assert float(times[-1]) == 1


def test_default_levels():
    ve = tj.VE()
    np.testing.assert_allclose(tj.grids.karras(ve, 18), ve.default_times(18), atol=1e-14)
    # The published numbers of 18 steps: Karras et al. (2022), the deterministic sampler.
    known = [80.0, 57.586, 40.786, 28.375, 19.352, 12.910, 8.401, 5.315, 3.257, 1.923]
    np.testing.assert_allclose(levels(ve, tj.grids.karras(ve, 18))[:10], known, rtol=1e-3)
    both = levels(STABLE, tj.grids.karras(STABLE, 10)[:-1])[[0, -1]]
    np.testing.assert_allclose(both, [14.6146, 0.0292], rtol=1e-2)
    both = levels(tj.Linear(2.0), tj.grids.exponential(tj.Linear(2.0), 10)[:-1])[[0, -1]]
    np.testing.assert_allclose(both, [2 * 999.0, 0.008], rtol=1e-9)
    assert tj.grids.karras(tj.VP(), 1).tolist() == [0, 1]


def test_timesteps_of_diffusers():
    assert indices(tj.grids.leading(STABLE, 100)) == list(range(991, 0, -10))
    assert indices(tj.grids.leading(STABLE, 5, offset=0)) == [800, 600, 400, 200, 0]
    assert indices(tj.grids.leading(STABLE, 30))[:3] == [958, 925, 892]
    assert indices(tj.grids.trailing(STABLE, 100)) == list(range(999, 0, -10))
    assert indices(tj.grids.trailing(STABLE, 7)) == [999, 856, 713, 570, 428, 285, 142]
    assert indices(tj.grids.linspace(STABLE, 5)) == [999, 749, 500, 250, 0]
    assert indices(tj.grids.linspace(STABLE, 1000)) == list(range(999, -1, -1))


def test_runs_can_start_and_end_on_these_grids():
    model = tj.Analytic(contracts.gaussian([0.4], [[0.3]]), STABLE)
    for make in (tj.grids.leading, tj.grids.trailing, tj.grids.linspace, tj.grids.karras):
        times = make(STABLE, 20)
        model.check_times(times)
        model.check_start(np.asarray(times)[0])
        assert np.all(np.diff(times) > 0)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: tj.grids.leading(STABLE, 1000), ValueError, "would be 1000.*lower offset = 1"),
        (lambda: tj.grids.trailing(STABLE, 1001), ValueError, "steps must be at most 1000"),
        (lambda: tj.grids.linspace(STABLE, 1), ValueError, "steps must be at least 2"),
        (lambda: tj.grids.leading(tj.VP(), 10), TypeError, "DiscreteVP, got VP.*use karras"),  # pyright: ignore
        (lambda: tj.grids.karras(tj.VE(), 5, sigma_max=90.0), ValueError, "sigma_max must lie"),
        (lambda: tj.grids.karras(tj.VE(), 5, sigma_min=90.0), ValueError, "got 90 >= 80"),
        (lambda: tj.grids.karras(tj.VE(), 5, rho=0.0), ValueError, "rho must lie"),
        (lambda: tj.grids.karras(tj.VE(), 0), ValueError, "steps must be at least 1"),
        (
            lambda: jax.jit(lambda s: tj.grids.karras(tj.VE(0.1, s), 5))(jnp.asarray(3.0)),
            TypeError,
            "outside of jit",
        ),
    ],
)
def test_grids_that_cannot_be(build, error, message):
    with pytest.raises(error, match=message):
        build()
