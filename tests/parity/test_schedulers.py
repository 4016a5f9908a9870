"""The grids of `tiltjax.grids` and the levels of `VE` against the schedulers of `diffusers`.

Run by `make test-parity`, in an environment of its own.
"""

import jax
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler, EulerDiscreteScheduler

import tiltjax as tj

STABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def table(scheduler):
    return tj.DiscreteVP(scheduler.alphas_cumprod.double().numpy())


@pytest.mark.parametrize("steps", [1, 4, 7, 30, 50, 100, 999])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_timesteps(spacing, steps):
    if spacing == "linspace" and steps == 1:
        return  # one step from the cleanest level, which tiltjax refuses
    scheduler = DDIMScheduler(**STABLE, timestep_spacing=spacing, steps_offset=1)
    scheduler.set_timesteps(steps)
    vp = table(scheduler)
    times = getattr(tj.grids, spacing)(vp, steps)
    levels = np.asarray(vp.index(times[:-1]))
    np.testing.assert_allclose(levels, scheduler.timesteps.numpy(), atol=2e-4)  # single precision
    assert times[-1] == 1


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers
@pytest.mark.parametrize("kind", ["karras", "exponential"])
def test_noise_levels_of_a_table(kind):
    scheduler = EulerDiscreteScheduler(**STABLE, **{f"use_{kind}_sigmas": True})
    scheduler.set_timesteps(25)
    vp = table(scheduler)
    times = getattr(tj.grids, kind)(vp, 25)
    levels = jax.vmap(vp.sigma)(times) / jax.vmap(vp.alpha)(times)
    np.testing.assert_allclose(levels, scheduler.sigmas.numpy(), rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["karras", "exponential"])
def test_noise_levels_of_edm(kind):
    scheduler = EDMEulerScheduler(
        sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, sigma_schedule=kind
    )
    scheduler.set_timesteps(18)
    ve = tj.VE()
    grids = [getattr(tj.grids, kind)(ve, 18)] + ([ve.default_times(18)] if kind == "karras" else [])
    for times in grids:
        np.testing.assert_allclose(ve.sigma(times), scheduler.sigmas.numpy(), rtol=2e-4, atol=1e-6)


def test_preconditioning_of_edm():
    scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
    ve, x, output = tj.VE(), np.asarray([3.0, -1.0]), np.asarray([0.2, 0.7])
    got = []

    def network(c_noise, scaled):
        got.append((c_noise, scaled))
        return jax.numpy.asarray(output)

    for s in (0.01, 0.5, 20.0):
        got.clear()
        t = ve.time(jax.numpy.asarray(s**-2))
        denoised = tj.from_edm(network, shape=(2,)).denoise(t, jax.numpy.asarray(x))
        c_noise, scaled = got[0]
        sigma = torch.tensor(s)
        np.testing.assert_allclose(c_noise, scheduler.precondition_noise(sigma), rtol=1e-4)
        expected = scheduler.precondition_inputs(torch.tensor(x), sigma)
        np.testing.assert_allclose(scaled, expected, rtol=1e-4)
        expected = scheduler.precondition_outputs(torch.tensor(x), torch.tensor(output), sigma)
        np.testing.assert_allclose(denoised, expected, rtol=1e-4, atol=1e-5)
