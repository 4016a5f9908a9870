"""What the contract tests run over, and the brute force they compare with.

A new guidance, posterior or solver is tested by being listed in `all_guidances`, `all_posteriors`
or `all_solvers`. The witnesses (`np_condition`, `np_tilt`, ...) are dense NumPy, sharing no code
with the library.
"""

import socket
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
from helpers import environment

import tiltjax as tj
from tiltjax import rewards, scales, solvers
from tiltjax.interpolants import Interpolant

SIGMAS = 5.0  # standard errors a statistical test allows


class Trigonometric(Interpolant):
    """`alpha = sin(pi t / 2)`, `sigma = c cos(pi t / 2)`: a variance-preserving path, to prove the
    base class general.
    """

    base_scale: jax.Array

    def __init__(self, base_scale=1.0):
        self.base_scale = jnp.asarray(base_scale, float)

    def alpha(self, t):
        return jnp.sin(jnp.pi / 2 * t)

    def sigma(self, t):
        # The sine of the complement, which vanishes at t = 1 to the last bit; cos(pi / 2) does not.
        return self.base_scale * jnp.sin(jnp.pi / 2 * (1 - t))

    def time(self, snr):
        return 2 / jnp.pi * jnp.arctan(self.base_scale * jnp.sqrt(snr))


def paths():
    """Interpolants by name."""
    return {
        "linear": tj.Linear(),
        "linear, base 1.7": tj.Linear(1.7),
        "trigonometric, base 0.6": Trigonometric(0.6),
        "vp": tj.VP(),
        "ve": tj.VE(),
        "discrete vp": tj.DiscreteVP(np.cumprod(1 - np.linspace(0.01, 0.6, 17))),
    }


def planar(dtype=jnp.float64):
    """Two modes in the plane whose covariances do not commute."""
    return tj.GaussianMixture(
        jnp.asarray([0.3, 0.7], dtype),
        jnp.asarray([[-1.5, 0.2], [1.0, -0.4]], dtype),
        jnp.asarray([[[0.5, 0.2], [0.2, 0.4]], [[0.3, -0.1], [-0.1, 0.6]]], dtype),
    )


def random_mixture(k, d, seed=0, dtype=jnp.float64):
    """`k` random components in dimension `d`."""
    rng = np.random.default_rng(seed)
    roots = rng.normal(size=(k, d, d))
    covs = roots @ roots.transpose(0, 2, 1) / d + 0.1 * np.eye(d)
    weights = rng.uniform(0.2, 1.0, size=k)
    return tj.GaussianMixture(
        *(jnp.asarray(a, dtype) for a in (weights, rng.normal(size=(k, d)), covs))
    )


def gaussian(mean, cov, dtype=jnp.float64):
    """One Gaussian as a mixture."""
    return tj.GaussianMixture(
        jnp.ones(1, dtype), jnp.asarray([mean], dtype), jnp.asarray([cov], dtype)
    )


def log_h(prior, target, h, scale, path):
    """The exact `log h` of a mixture and the reward `-(x - y)^T H (x - y)`, as a function
    `(t, x)`.
    """

    def value(t, x):
        line = tj._pytree.cast(path, x.dtype)
        post = prior.condition(line.alpha(t), line.sigma(t), x)
        dtype = post.means.dtype
        y, weight = jnp.asarray(target, dtype), jnp.asarray(h, dtype)

        def component(mean, cov):
            matrix = jnp.eye(len(y), dtype=dtype) + 2 * scale * cov @ weight
            e = mean - y
            return -jnp.linalg.slogdet(matrix)[1] / 2 - scale * e @ weight @ jnp.linalg.solve(
                matrix, e
            )

        return jax.nn.logsumexp(jnp.log(post.weights) + jax.vmap(component)(post.means, post.covs))

    return value


TARGET = (0.5, 1.0)


def all_posteriors():
    """Posteriors by name: functions of an `Analytic` model."""
    return {
        "exact": tj.Exact,
        "glass": lambda model: tj.Glass(model, inner_steps=4),
        "flow map": lambda model: tj.FlowMap(model, inner_steps=4),
        "tweedie": tj.Tweedie,
    }


def all_guidances():
    """Guidances by name: functions `(model, reward, scale)` of an `Analytic` model in the plane.

    The reward must be `Quadratic(TARGET)`, which `Doob` is given in closed form.
    """
    return {
        "doob": lambda model, reward, scale: tj.Doob(
            model, log_h(model.mixture, TARGET, np.eye(2), scale, model.interpolant)
        ),
        "plug-in, exact": lambda model, reward, scale: tj.PlugIn(tj.Exact(model), reward, scale),
        "plug-in, exact, k=3": lambda model, reward, scale: tj.PlugIn(
            tj.Exact(model), reward, scale, k=3
        ),
        "plug-in, glass, k=2": lambda model, reward, scale: tj.PlugIn(
            tj.Glass(model, 4), reward, scale, k=2
        ),
        "plug-in, flow map": lambda model, reward, scale: tj.PlugIn(
            tj.FlowMap(model, 4), reward, scale
        ),
        "damped": lambda model, reward, scale: tj.PlugIn(
            tj.Exact(model), reward, tj.Damped(scale, 0.7)
        ),
        "dps": tj.dps,
        "fmrg": lambda model, reward, scale: tj.fmrg(model, reward, scale, inner_steps=4),
        "laplace": tj.Laplace,
        "clipped": lambda model, reward, scale: tj.guidance.wrappers.Clipped(
            tj.Laplace(model, reward, scale), 0.5
        ),
        "unscaled": lambda model, reward, scale: tj.guidance.wrappers.Unscaled(
            tj.dps(model, reward, scale)
        ),
        "capped": lambda model, reward, scale: tj.guidance.wrappers.GainCapped(
            tj.dps(model, reward, scale), 0.5
        ),
        "shortened": lambda model, reward, scale: tj.guidance.wrappers.NormDamped(
            tj.Laplace(model, reward, scale), 0.7
        ),
        "averaged": lambda model, reward, scale: tj.guidance.wrappers.Averaged(
            tj.PlugIn(tj.Exact(model), reward, scale), 3
        ),
        "window": lambda model, reward, scale: tj.guidance.wrappers.Window(
            tj.dps(model, reward, scale), 0.2, 0.8
        ),
        "tuned": lambda model, reward, scale: tj.Tuned(
            model, tj.Tilted(model, reward, scale), reward=reward, scale=scale
        ),
    }


def all_solvers():
    """Solvers by name."""
    return {
        "euler": solvers.Euler(),
        "heun": solvers.Heun(),
        "heun, shared draw": solvers.Heun(share_draw=True),
        "ancestral": solvers.Ancestral(),
        "ancestral, eta=.5": solvers.Ancestral(0.5),
        "ddim": solvers.Ancestral(0.0),
        "adaptive": solvers.Adaptive(),
    }


def all_rewards():
    """Rewards of the plane by name."""
    return {
        "quadratic": rewards.Quadratic(TARGET),
        "diagonal": rewards.Quadratic(TARGET, [2.0, 0.5]),
        "matrix": rewards.Quadratic(TARGET, [[2.0, 0.3], [0.3, 0.5]]),
        "linear": rewards.LinearReward([1.0, -0.5]),
        "bump": rewards.Bump(TARGET, 1.2),
        "step": rewards.StepReward(2.0, [1.0, 1.0], 0.3),
        "double well": rewards.DoubleWell(),
        "sum": 2 * rewards.Quadratic(TARGET) - rewards.LinearReward([1.0, 2.0]),
        "function": rewards.as_reward(lambda x: jnp.sin(jnp.sum(x))),
    }


def all_scales():
    """Scale laws by name: functions of the final scale."""
    return {"constant": scales.Constant, "damped": lambda scale: scales.Damped(scale, 0.7)}


# Brute force in NumPy.


def np_fields(mixture):
    """`(weights, means, covs)` in float64."""
    return tuple(np.asarray(a, np.float64) for a in (mixture.weights, mixture.means, mixture.covs))


def np_log_normal(x, mean, cov):
    """The log-density of `N(mean, cov)` at `x`."""
    e = x - mean
    return -0.5 * (e @ np.linalg.inv(cov) @ e + np.linalg.slogdet(2 * np.pi * cov)[1])


def np_softmax(log_weights):
    """Normalized weights."""
    weights = np.exp(log_weights - np.max(log_weights))
    return weights / weights.sum()


def np_condition(mixture, alpha, sigma, x):
    """`(weights, means, covs)` of `X_1 | alpha X_1 + sigma X_0 = x`, by the joint Gaussian of each
    component.
    """
    weights, means, covs = np_fields(mixture)
    log_weights, post_means, post_covs = [], [], []
    for w, m, s in zip(weights, means, covs, strict=True):
        noisy = alpha**2 * s + sigma**2 * np.eye(len(m))
        gain = alpha * s @ np.linalg.inv(noisy)
        log_weights.append(np.log(w) + np_log_normal(x, alpha * m, noisy))
        post_means.append(m + gain @ (x - alpha * m))
        post_covs.append(s - gain @ s * alpha)
    return np_softmax(np.array(log_weights)), np.array(post_means), np.array(post_covs)


def np_tilt(mixture, natural, precision):
    """`(weights, means, covs)` of `rho(x) exp(<a, x> - x^T C x / 2)`, with precisions."""
    weights, means, covs = np_fields(mixture)
    log_weights, new_means, new_covs = [], [], []
    for w, m, s in zip(weights, means, covs, strict=True):
        inverse = np.linalg.inv(s)
        cov = np.linalg.inv(inverse + precision)
        b = inverse @ m + natural
        log_weights.append(
            np.log(w)
            + 0.5 * (np.linalg.slogdet(cov)[1] - np.linalg.slogdet(s)[1])
            + 0.5 * (b @ cov @ b - m @ inverse @ m)
        )
        new_means.append(cov @ b)
        new_covs.append(cov)
    return np_softmax(np.array(log_weights)), np.array(new_means), np.array(new_covs)


def np_moments(weights, means, covs):
    """Mean and covariance of a mixture."""
    mean = weights @ means
    spread = means - mean
    return mean, np.einsum("k,kij->ij", weights, covs + spread[:, :, None] * spread[:, None, :])


# Statistics.


def assert_mean(samples, truth, slack=0.0):
    """Every entry of the sample mean within `SIGMAS` computed standard errors (plus a measured
    `slack`) of `truth`.
    """
    samples = np.asarray(samples, np.float64)
    error = np.abs(samples.mean(axis=0) - truth)
    standard = samples.std(axis=0, ddof=1) / np.sqrt(len(samples))
    assert np.all(error < SIGMAS * standard + slack), (error, standard, slack)


def assert_moments(samples, mean, cov, slack=0.0):
    """Sample mean and covariance (about the true mean, so without bias) within `SIGMAS` standard
    errors.
    """
    samples = np.asarray(samples, np.float64)
    assert_mean(samples, mean, slack)
    centered = samples - mean
    assert_mean(centered[:, :, None] * centered[:, None, :], cov, slack)


def same_bits(a, b):
    """Whether two trees hold the same numbers to the last bit."""
    leaves = [[np.asarray(leaf) for leaf in jax.tree.leaves(tree)] for tree in (a, b)]
    assert len(leaves[0]) == len(leaves[1]) > 0
    return all(
        x.dtype == y.dtype and x.tobytes() == y.tobytes() for x, y in zip(*leaves, strict=True)
    )


def slope(errors):
    """The order at which errors fall along a sequence of doubled step counts: minus the fitted
    slope in log2.
    """
    return -np.polyfit(np.arange(len(errors)), np.log2(np.asarray(errors)), 1)[0]


def traced(fn):
    """`fn`, and a list that grows by one at each Python call: at each trace, under `jit`."""
    calls = []

    def counted(*args):
        calls.append(1)
        return fn(*args)

    return counted, calls


def on_eight_devices(script):
    """What an indented program printed, in a process of its own with eight virtual devices."""
    env = environment.quick(8)
    command = [sys.executable, "-c", textwrap.dedent(script)]
    return subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=120, check=False
    )


def on_two_hosts(script, seconds=300):
    """The exit status and what an indented program wrote, out and err, in each of two processes,
    which meet as hosts of two virtual devices. It finds out where by the names ADDRESS and HOST.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    env = environment.quick(2)
    program = textwrap.dedent(script)
    command = lambda host: [sys.executable, "-c", f"ADDRESS, HOST = {address!r}, {host}\n{program}"]
    start = lambda host: subprocess.Popen(
        command(host), env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    hosts = [start(0), start(1)]
    try:
        limit = time.monotonic() + seconds
        # One that failed leaves the other waiting for it.
        while any(host.poll() is None for host in hosts) and not any(host.poll() for host in hosts):
            if time.monotonic() > limit:
                break
            time.sleep(0.05)
    finally:
        for host in hosts:
            host.kill()
        written = [host.communicate() for host in hosts]
    return [(host.returncode, *texts) for host, texts in zip(hosts, written, strict=True)]
