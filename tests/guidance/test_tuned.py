"""A tuned model as a guidance of its base: what its weights make of a mixture of two models.

The truth is what the weighted chain itself samples, `E_P[exp(g(1) L) ...]`: in closed form for two
Gaussians, by a transfer operator on a grid for mixtures; and how fast that tends to
`p^(1 - g) q^g`. Tiers: exact, order, statistical.
"""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import contracts

import tiltjax as tj
from tiltjax import models, resampling
from tiltjax.weighted import potentials, proposals, tempering

KEY = jax.random.key(0)
GAUSSIANS = ((-1.0, 1.0), (1.0, 0.5))  # mean and variance of p and q
MIXTURES = (
    ((0.5, 0.5), (-1.5, 1.5), (0.3, 0.3)),
    ((0.5, 0.5), (-0.8, 1.5), (0.1, 0.3)),
)  # weights, means, variances


def denoiser(law, t, x):
    weights, means, variances, path = law
    alpha, sigma = path.alpha(t), path.sigma(t)
    noisy, off = alpha**2 * variances + sigma**2, x - alpha * means
    share = jax.nn.softmax(jnp.log(weights) - off**2 / (2 * noisy) - jnp.log(noisy) / 2)
    return jnp.sum(share * (means + alpha * variances / noisy * off), keepdims=True)


def model(weights, means, variances, path=None):
    """A mixture on the line, by its formula: cheaper than `Analytic`, which takes matrices."""
    path = tj.Linear() if path is None else path
    law = (*(jnp.asarray(part, float) for part in (weights, means, variances)), path)
    return tj.from_denoiser(denoiser, law, shape=(1,), interpolant=path)


P, Q = (model([1.0], [m], [v]) for m, v in GAUSSIANS)
TWO = tuple(model(*law) for law in MIXTURES)


class Monomial(eqx.Module):
    """`a t^p`: all schedules here are one program."""

    a: jax.Array
    p: jax.Array

    def __init__(self, a, p):
        self.a, self.p = jnp.asarray(a, float), jnp.asarray(p, float)

    def __call__(self, t):
        return self.a * t**self.p


# What a chain of finite steps samples, in NumPy.


def steps_of(count):
    """`(t, keep, gain, s2)` of the steps of `Ancestral(1)` but the jump at the end."""
    times = np.linspace(1e-3, 1, count + 1)
    for t, u in itertools.pairwise(times[:-1]):
        rho = t * (1 - u) / (u * (1 - t))
        keep = (1 - u) * rho / (1 - t)
        yield t, keep, u - keep * t, (1 - u) ** 2 * (1 - rho**2)


def gaussian_chain(g, count):
    """Mean and variance of the end, and the log of the integral, of the Gaussian chain of P
    weighted by `exp(g L)`.
    """
    laws = np.asarray(GAUSSIANS)

    def denoise(t):  # slope and offset of both
        slope = t * laws[:, 1] / (t**2 * laws[:, 1] + (1 - t) ** 2)
        return slope, laws[:, 0] * (1 - slope * t)

    mean, variance, log_norm = 0.0, (1 - 1e-3) ** 2, 0.0
    for t, keep, gain, s2 in steps_of(count):
        slope, offset = denoise(t)
        # exp(-g (1 - g) |m_q - m_p|^2 / (2 s2)) of a state x: a Gaussian factor of precision k
        # about x0.
        k = g * (1 - g) * (gain * (slope[1] - slope[0])) ** 2 / s2
        x0 = -(offset[1] - offset[0]) / (slope[1] - slope[0])
        log_norm -= 0.5 * np.log1p(k * variance) + 0.5 * k * (mean - x0) ** 2 / (1 + k * variance)
        mean, variance = (
            (mean + k * variance * x0) / (1 + k * variance),
            variance / (1 + k * variance),
        )
        slope, offset = (1 - g) * slope[0] + g * slope[1], (1 - g) * offset[0] + g * offset[1]
        mean, variance = (
            keep * mean + gain * (slope * mean + offset),
            (keep + gain * slope) ** 2 * variance + s2,
        )
    slope, offset = denoise(1 - (1 - 1e-3) / count)
    return slope[0] * mean + offset[0], slope[0] ** 2 * variance, log_norm


def geometric_mean(g):
    """Mean, variance and the log of the integral of `p^(1 - g) q^g` for the two Gaussians."""
    (a, v), (b, w) = GAUSSIANS
    precision = (1 - g) / v + g / w
    mean = ((1 - g) * a / v + g * b / w) / precision
    square = (1 - g) * (a**2 / v + np.log(2 * np.pi * v)) + g * (b**2 / w + np.log(2 * np.pi * w))
    return (
        mean,
        1 / precision,
        -0.5 * (square - mean**2 * precision - np.log(2 * np.pi / precision)),
    )


def grid_chain(g, count, laws=MIXTURES, value=np.ones_like):
    """The states before the jump, where it takes them, and the measure of `exp(g L) value(x_1)` on
    them, of the chain of two mixtures.
    """
    x = np.linspace(-7, 7, 1201)
    cell = x[1] - x[0]

    def denoise(t, law):
        w, m, v = (np.asarray(part)[:, None] for part in law)
        noisy = t**2 * v + (1 - t) ** 2
        share = w * np.exp(-((x - t * m) ** 2) / (2 * noisy)) / np.sqrt(noisy)
        return np.sum(share / share.sum(axis=0) * (m + t * v / noisy * (x - t * m)), axis=0)

    measure = np.exp(-(x**2) / (2 * (1 - 1e-3) ** 2)) / np.sqrt(2 * np.pi) / (1 - 1e-3) * cell
    for t, keep, gain, s2 in steps_of(count):
        base, tuned = (denoise(t, law) for law in laws)
        mean = keep * x + gain * (base + g * (tuned - base))
        measure = measure * np.exp(-g * (1 - g) * (gain * (tuned - base)) ** 2 / (2 * s2))
        measure = (
            measure
            @ np.exp(-((x - mean[:, None]) ** 2) / (2 * s2))
            / np.sqrt(2 * np.pi * s2)
            * cell
        )
    end = denoise(1 - (1 - 1e-3) / count, laws[0])
    return x, end, measure * value(end)


def runs_of(base, guidance, runs=2000, num=8, steps=20, fns=(), **settings):
    """`log_norm` of many small runs, and their weighted means of functions, each as `(runs,)`."""

    def one(key):
        particles = tj.smc(key, base, guidance, num=num, steps=steps, **settings)
        return particles.log_norm, *(jnp.squeeze(particles.mean(fn)) for fn in fns)

    return tuple(
        np.asarray(part) for part in jax.vmap(one)(jax.random.split(jax.random.key(3), runs))
    )


def assert_unbiased(log_norms, truth):
    """The mean of `exp(log_norm)` within standard errors of the truth, and no run the whole of
    it.
    """
    ratio = np.exp(log_norms - truth)
    error = ratio.std(ddof=1) / np.sqrt(len(ratio))
    assert error < 0.06
    assert ratio.max() / ratio.sum() < 0.1
    assert abs(ratio.mean() - 1) < 4 * error


def assert_lands(log_norms, means, truth):
    """The mean of all runs, each weighted by its constant (which is unbiased for the integral
    against the target), within standard errors.
    """
    weights = np.exp(log_norms - log_norms.max())
    weights /= weights.sum()
    error = np.sqrt(np.sum((weights * (means - truth)) ** 2))
    assert error < 0.1
    assert abs(weights @ (means - truth)) < contracts.SIGMAS * error


# L is the ratio of the models' densities.


@pytest.mark.parametrize("path", [tj.Linear(1.3), tj.VP()], ids=["linear", "vp"])
def test_the_ratio_along_a_path_is_that_of_the_marginals(path):
    base, tuned = (model(*law, path) for law in MIXTURES)
    guidance, num = tj.Tuned(base, tuned), 150

    def log_density(law, t, x):
        alpha, sigma = path.alpha(t), path.sigma(t)
        w, m, v = (jnp.asarray(part) for part in law)
        noisy = alpha**2 * v + sigma**2
        return jax.nn.logsumexp(
            jnp.log(w) - (x[0] - alpha * m) ** 2 / (2 * noisy) - jnp.log(noisy) / 2
        )

    def stray(count):
        """The root mean square of `L - log q_t / p_t` over states of the base chain at t = .5 and
        .9.
        """
        times = jnp.append(
            jnp.linspace(1e-3, 0.5, count + 1), jnp.linspace(0.5, 0.9, count + 1)[1:]
        )

        def one(key):
            key_start, key_run = jax.random.split(key)
            x = base.initial(key_start, times[0])

            def advance(carry, scanned):
                x, seen = carry
                t, u, key = scanned
                kernel = tj.Ancestral().kernel(path, t, u)
                x, _ = kernel.propose(key, x, seen.base, None)
                _, seen = guidance(key, u, x, seen)
                ratio = log_density(MIXTURES[1], u, x) - log_density(MIXTURES[0], u, x)
                return (x, seen), seen.log_ratio - ratio

            _, seen = guidance(key, times[0], x, guidance.init(x))
            keys = jax.random.split(key_run, len(times) - 1)
            return jax.lax.scan(advance, (x, seen), (times[:-1], times[1:], keys))[1]

        off = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(KEY, num)))[
            :, [count - 1, 2 * count - 1]
        ]
        return np.sqrt(np.mean(off**2))

    coarse, fine = stray(16), stray(256)
    # A square root of the step: a quarter for sixteen times as many.
    assert fine < 0.1
    assert 2.5 < coarse / fine < 8, (coarse, fine)


# Weighted particles are the geometric mean.


@pytest.mark.parametrize("g", [0.5, 2.0, -0.3])
def test_the_weighted_chain_tends_to_the_geometric_mean(g):
    errors = np.abs(
        [
            np.subtract(gaussian_chain(g, count), geometric_mean(g))
            for count in (200, 400, 800, 1600)
        ]
    )
    assert np.all(errors[-1] < 0.03)
    for row in errors.T:
        assert abs(contracts.slope(row) - 1) < 0.2 or row[0] < 1e-3, errors


@pytest.mark.slow
@pytest.mark.parametrize(
    ("final", "p"),
    [(0.5, 0.0), (1.0, 2.0), (0.5, 2.0), (2.0, 0.0), (-0.3, 1.0)],
    ids=["constant", "power", "half power", "beyond", "below"],
)
def test_two_gaussians_land_where_their_chain_does(final, p):
    mean, variance, log_norm = gaussian_chain(final, 30)
    guidance = tj.Tuned(P, Q, Monomial(final, p))
    log_norms, means, squares = runs_of(P, guidance, 500, 24, 30, (lambda x: x, lambda x: x**2))
    assert_unbiased(log_norms, log_norm)
    assert_lands(log_norms, means, mean)
    assert_lands(log_norms, squares - 2 * mean * means + mean**2, variance)


@pytest.mark.slow
def test_mixtures_land_there_and_the_annealed_flow_does_not():
    """Where one of two modes has moved away, the geometric mean prefers the other; the average of
    scores does not know.
    """
    base, tuned = TWO
    steps, fine = 40, np.linspace(-7, 7, 20_001)
    density = np.ones_like(fine)
    for w, m, v in MIXTURES:
        parts = zip(w, m, v, strict=True)
        density *= np.sqrt(
            sum(
                w * np.exp(-((fine - m) ** 2) / (2 * v)) / np.sqrt(2 * np.pi * v)
                for w, m, v in parts
            )
        )
    right = density[fine > 0].sum() / density.sum()
    _, end, measure = grid_chain(0.5, steps)
    log_norm = np.log(measure.sum())
    assert abs(log_norm - np.log(density.sum() * (fine[1] - fine[0]))) < 0.04
    measure /= measure.sum()
    assert abs(measure[end > 0].sum() - right) < 0.02
    for weight in (Monomial(0.5, 0.0), Monomial(0.5, 2.0)):
        log_norms, share, means = runs_of(
            base,
            tj.Tuned(base, tuned, weight),
            400,
            16,
            steps,
            (lambda x: (x > 0).astype(x.dtype), lambda x: x),
        )
        assert_unbiased(log_norms, log_norm)
        assert_lands(log_norms, share, measure[end > 0].sum())
        assert_lands(log_norms, means, measure @ end)
    flow = tj.sample(jax.random.key(2), tj.Annealed(base, tuned, 0.5), num=6000, steps=steps)
    share = float(np.mean(np.asarray(flow.x) > 0))
    assert abs(share - right) > 2 * contracts.SIGMAS * np.sqrt(share * (1 - share) / 6000)


# Unbiased, whatever the loop is made of.


SPARSE = {"schedule": tj.weighted.potentials.ResampleSchedule(6, start=5, stop=11)}
REWARD, SCALE = tj.rewards.Quadratic([1.0]), 0.5
HALF, DPS = tj.Tilted(TWO[0], REWARD, SCALE / 2), tj.dps(TWO[0], REWARD, SCALE)
SETTINGS = {
    "base, another's twist": {"proposal": proposals.Base(), "twist": tj.dps(TWO[0], REWARD, 0.2)},
    "base, seldom": {"proposal": proposals.Base(), "ess_threshold": 1.0} | SPARSE,
    "children": {
        "proposal": proposals.Children(2, proposals.Guided()),
        "potential": potentials.Max(),
    }
    | SPARSE,
    "shifted": {
        "proposal": proposals.Shifted(),
        "chunk_size": 3,
        "tempering": tempering.AdaptiveTempering(0.6),
        "ess_threshold": 0.9,
        "resample": resampling.ssp,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_the_integral_of_the_geometric_mean_is_unbiased(name):
    truth = np.log(grid_chain(0.6, 20)[2].sum())
    assert_unbiased(runs_of(TWO[0], tj.Tuned(*TWO, Monomial(0.6, 1.0)), **SETTINGS[name])[0], truth)


ROLES = {
    "clipped": (
        tj.guidance.wrappers.Clipped(tj.Tuned(TWO[0], HALF, 1.5, reward=REWARD, scale=SCALE), 0.5),
        {},
    ),
    "another's twist, seldom": (DPS, {"twist": tj.Tuned(TWO[0], HALF)} | SPARSE),
    "with another's twist": (tj.Tuned(TWO[0], HALF, reward=REWARD, scale=SCALE), {"twist": DPS}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ROLES)
def test_the_constant_of_the_tilt_is_unbiased_whoever_learned_what(name):
    guidance, settings = ROLES[name]
    truth = np.log(grid_chain(0.0, 20, value=lambda x: np.exp(-SCALE * (x - 1) ** 2))[2].sum())
    assert_unbiased(runs_of(TWO[0], guidance, **settings)[0], truth)


# Exact cases.


def unweighted(model, guidance):
    return tj.smc(KEY, model, guidance, num=40, steps=15, ess_threshold=0.9)


NONE = tj.rewards.LinearReward([0.0])


@pytest.mark.slow
def test_no_share_and_no_difference_weigh_nothing():
    chain = unweighted(P, tj.dps(P, NONE))
    for other, weight in ((Q, (0.0, 1.0)), (P, (1.0, 2.0)), (P, (3.0, 0.0))):
        particles = unweighted(P, tj.Tuned(P, other, Monomial(*weight)))
        np.testing.assert_array_equal(particles.x, chain.x)
        np.testing.assert_array_equal(particles.log_weights, np.zeros(40))


def test_the_whole_share_is_the_tuned_chain_without_weights():
    tuned = unweighted(P, tj.Tuned(P, Q, Monomial(1.0, 0.0)))
    np.testing.assert_allclose(tuned.log_weights, 0, atol=1e-12)
    np.testing.assert_allclose(tuned.log_norm, 0, atol=1e-12)
    # As the base chain of the tuned model, but for the last jump, which is the base's, and for the
    # start at the base's denoiser, which the chain forgets to 1e-6.
    chain = unweighted(Q, tj.dps(Q, NONE))
    late = jnp.asarray(1 - (1 - 1e-3) / 15)
    jump = lambda m, x: jax.vmap(lambda x: m.denoise(late, x))(x)
    before = jax.vmap(
        lambda d: (
            (d - Q.denoise(late, jnp.zeros(1)))
            / jax.grad(lambda x: Q.denoise(late, x)[0])(jnp.zeros(1))
        )
    )
    np.testing.assert_allclose(tuned.x, jump(P, before(chain.x)), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["heun", "ancestral, eta=.5", "adaptive"])
def test_samples_move_as_those_of_annealed(name):
    base, tuned = TWO
    run = lambda *args: (
        tj.sample(
            KEY,
            *args,
            num=4,
            times=jnp.asarray([1e-3, 0.2, 0.6, 1.0]),
            solver=contracts.all_solvers()[name],
        ).x
    )
    weight = models.power(2.0)
    np.testing.assert_allclose(
        run(base, tj.Tuned(base, tuned, weight)), run(tj.Annealed(base, tuned, weight)), atol=1e-10
    )


def test_a_second_look_at_one_time_changes_nothing_of_the_ratio():
    guidance = tj.Tuned(*TWO)
    call = jax.jit(lambda t, x, seen: guidance(KEY, t, x, seen)[1])
    look = lambda t, x, seen: call(jnp.asarray(t), jnp.asarray([x]), seen)
    seen = look(0.3, 0.1, look(0.2, 0.0, guidance.init(jnp.zeros(1))))
    assert float(seen.log_ratio) != 0
    for t in (0.3, 0.25):
        again = look(t, 0.4, seen)
        assert float(again.log_ratio) == float(seen.log_ratio)
        assert (float(again.t), float(again.x[0])) == (t, 0.4)
    # Later by less than rounding tells from no noise at all; and the derivative of what is selected
    # away.
    close = look(0.3 * (1 + 1e-15), 0.4, seen)
    assert np.isfinite(float(close.log_ratio))
    slope = jax.grad(lambda x: call(jnp.asarray(0.3), x, seen).log_ratio)(jnp.zeros(1))
    np.testing.assert_array_equal(slope, 0)


# With a reward: how good is the tuned model?


def test_a_model_tuned_to_the_tilt_has_even_weights_and_the_audit_says_how_far_others_are():
    base = TWO[0]
    reports = []
    for scale in (SCALE, SCALE / 2, 0.0):
        tuned = tj.Tilted(base, REWARD, scale)
        guidance = tj.Tuned(base, tuned, reward=REWARD, scale=SCALE)
        reports.append(tj.audit(jax.random.key(4), base, guidance, num=4000, steps=80))
    right, half, none = reports
    assert right.verdict.startswith("Tilting")
    assert right.ess_fraction > 0.95
    assert right.ess_fraction > half.ess_fraction > none.ess_fraction
    assert right.path_kl.value < half.path_kl.value < none.path_kl.value
    for report in reports:
        assert (
            abs(report.log_norm.value - right.log_norm.value)
            < 4 * report.log_norm.error + 4 * right.log_norm.error
        )
    assert half.ess_fraction > 0.5
    assert "Tuned on Ancestral" in str(half)
    with pytest.raises(ValueError, match="no tilt by a reward"):
        tj.audit(KEY, base, tj.Tuned(*TWO), num=100)


@pytest.mark.slow
def test_networks_in_single_precision_by_batches():
    def constant(shift):
        def net(t, x):
            assert x.ndim == 4  # a batch of images
            t = t[:, None, None, None]
            return shift + t / (t**2 + (1 - t) ** 2) * (x - t * shift)

        return tj.from_denoiser(net, shape=(2, 3, 1), batched=True, dtype=jnp.float32)

    base, tuned = constant(0.0), constant(1.0)
    guidance = tj.Tuned(
        base, tuned, models.power(2.0), reward=lambda x: -jnp.sum((x - 1) ** 2), scale=0.3
    )
    particles = tj.smc(
        KEY,
        base,
        guidance,
        num=12,
        steps=6,
        chunk_size=5,
        proposal=proposals.Children(2, proposals.Guided()),
    )
    assert particles.x.shape == (12, 2, 3, 1)
    assert particles.x.dtype == particles.log_norm.dtype == jnp.float32


# Bad input.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tj.Tuned(*TWO, Monomial(jnp.nan, 0.0)), r"finite number, got nan at t = 0\.001"),
        (lambda: tj.Tuned(*TWO, jnp.inf), "weight must be finite"),
        (lambda: tj.Tuned(*TWO, Monomial(jnp.ones(2), 1.0)), "one number"),
        (lambda: tj.Tuned(*TWO, scale=2.0), "reward is None"),
        (lambda: tj.Tuned(*TWO, reward=REWARD, scale=-1.0), "scale must not be negative"),
        (lambda: tj.Tuned(P, model([1.0], [0.0], [1.0], tj.Linear(2.0))), "same interpolant"),
        (lambda: tj.Tuned(P, tj.Analytic(contracts.planar())), "same states"),
        (lambda: tj.Annealed(*TWO, lambda t: 2 * t), r"in \[0, 1\].*got 1\.00\d* at t = 0\.50"),
        (lambda: tj.Annealed(*TWO, lambda t: t - 0.2), r"in \[0, 1\].*got -0\.199 at t = 0\.001"),
        (lambda: tj.Annealed(*TWO, lambda t: t * jnp.nan), "got nan at t = 0.001"),
        (lambda: tj.Annealed(*TWO, jnp.nan), "weight must be finite"),
        (
            lambda: tj.smc(KEY, P, tj.Tuned(P, Q), num=4, solver=tj.Ancestral(0.5)),
            r"use Ancestral\(1\), got Ancestral\(0.5\)",
        ),
        (
            lambda: tj.smc(
                KEY, P, tj.dps(P, REWARD), num=4, twist=tj.Tuned(P, Q), solver=tj.Ancestral(0.9)
            ),
            r"0\.9",
        ),
        (
            lambda: tj.smc(
                KEY,
                P,
                tj.guidance.wrappers.Clipped(tj.Tuned(P, Q), 1.0),
                num=4,
                solver=tj.Ancestral(0.9),
            ),
            r"0\.9",
        ),
        (lambda: tj.smc(KEY, Q, tj.Tuned(P, Q), num=4), "another model"),
        (lambda: tj.Tuned(P, Q).log_tilt(jnp.zeros(1)), "no tilt by a reward"),
    ],
)  # fmt: skip
def test_bad_input_says_what_to_do(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def preference(x):
    """Of one sample: but it has an answer for a time, too."""
    return -jnp.sum(x**2)


def test_a_reward_in_the_place_of_the_weight_is_refused():
    with pytest.raises(TypeError, match=r"got the reward Quadratic: .*reward="):
        tj.Tuned(*TWO, REWARD)
    with pytest.raises(TypeError, match=r"got preference: pass a reward by name, reward="):
        tj.Tuned(*TWO, preference)
    with pytest.raises(TypeError, match=r"got the class PowerWeight: use power\(p\)"):
        tj.Annealed(*TWO, type(models.power(2.0)))


def test_a_tuned_network_is_not_asked_where_it_was_not_trained():
    path = tj.DiscreteVP(np.cumprod(1 - np.linspace(0.01, 0.6, 17)))
    base, tuned = (model(*law, path) for law in MIXTURES)
    late = tj.Tilted(tuned, tj.rewards.Quadratic([0.0]), 40.0)
    times = jnp.append(path.clock(jnp.arange(16.0, -1.0, -2.0)), 1.0)
    for verb in (tj.smc, tj.sample):
        with pytest.raises(ValueError, match="end the grid at t"):
            verb(KEY, base, tj.Tuned(base, late), num=10, times=times)


def test_weights_are_swept_and_traced():
    base, tuned = TWO
    x = jnp.zeros(1)
    pull = lambda g: tj.Tuned(base, tuned, g)(
        KEY, jnp.asarray(0.5), x, tj.Tuned(base, tuned).init(x)
    )[0].tilted[0]
    swept = jax.jit(jax.vmap(pull))(jnp.asarray([0.0, 1.0, 2.0]))
    np.testing.assert_allclose(swept[2] - swept[1], swept[1] - swept[0], rtol=1e-10)
    # A function of something traced is not read.
    inside = lambda g: tj.Annealed(base, tuned, lambda t: g * t).denoise(jnp.asarray(0.5), x)[0]
    np.testing.assert_allclose(jax.jit(inside)(1.0), inside(1.0), rtol=1e-12)
