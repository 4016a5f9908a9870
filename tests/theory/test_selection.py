"""Laws of selection against SciPy's distributions, quadrature, and the tilt they tend to. Tier:
exact.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

import theory
import tiltjax as tj
from theory import _reward_laws as reward_laws
from theory import selection

PLANE = tj.GaussianMixture([1.0], [[0.3, -0.2]], [[[0.5, 0.1], [0.1, 0.8]]])
LINEAR = tj.rewards.LinearReward([1.0, 0.5])
pytestmark = pytest.mark.optimized  # it runs for longer than it compiles
LINE = tj.GaussianMixture([0.3, 0.7], [[-1.5], [1.0]], [[[0.5]], [[0.09]]])


def line(s2, mean=0.0):
    return tj.GaussianMixture([1.0], [[mean]], [[[s2]]])


def integral(fn, low, high, points=None):
    return integrate.quad(fn, low, high, epsabs=1e-13, epsrel=1e-12, limit=800, points=points)[0]


@pytest.mark.parametrize("n", [1, 2, 10, 1000, 10**9])
def test_best_of_n_by_a_linear_reward_is_the_maximum_of_normals(n):
    law = theory.best_of_n(PLANE, LINEAR, n)
    m, s = 0.2, np.sqrt(0.5 + 0.1 + 0.2)
    log_density = lambda z: np.log(n) + (n - 1) * stats.norm.logcdf(z) + stats.norm.logpdf(z)
    mean = integral(lambda z: z * np.exp(log_density(z)), -9, 10, [0, 5, 6, 7])
    np.testing.assert_allclose(law.mean_reward(), m + s * mean, rtol=1e-8)
    np.testing.assert_allclose(law.kl_to_base(), np.log(n) - (n - 1) / n, rtol=1e-14)
    np.testing.assert_allclose(
        law.reward_log_prob(0.9), log_density((0.9 - m) / s) - np.log(s), rtol=1e-9, atol=1e-12
    )
    np.testing.assert_allclose(law.reward_cdf(law.reward_quantile(0.3)), 0.3, rtol=1e-9)
    x = jnp.array([0.4, 1.0])
    expected = PLANE.log_prob(x) + np.log(n) + (n - 1) * stats.norm.logcdf((0.9 - m) / s)
    np.testing.assert_allclose(law.log_prob(x), expected, rtol=1e-9)


def test_sums_and_multiples_of_linear_rewards_are_linear_rewards():
    parts = 2 * tj.rewards.LinearReward([0.5, 0.0]) - tj.rewards.LinearReward([0.0, -0.5])
    law, same = (theory.best_of_n(PLANE, reward, 10) for reward in (parts, LINEAR))
    np.testing.assert_allclose(law.mean_reward(), same.mean_reward(), rtol=1e-12)
    # A grid has no density of the reward.
    np.testing.assert_allclose(law.reward_log_prob(0.9), same.reward_log_prob(0.9), rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(("d", "offset"), [(1, 1.5), (2, 0.0), (3, 1.5), (6, 1.5)])
def test_best_of_n_by_distance_is_the_minimum_of_noncentral_chi_squares(d, offset):
    weight, s2 = 0.7, 0.5
    prior = tj.GaussianMixture([1.0], np.full((1, d), 0.2), s2 * np.eye(d)[None])
    target = np.full(d, 0.2) + offset * np.eye(d)[0]
    q = stats.ncx2(d, offset**2 / s2) if offset else stats.chi2(d)
    for n in (1, 3, 400):
        law = theory.best_of_n(prior, tj.rewards.Quadratic(target, weight), n)
        # E min Q = ∫ P(Q > q)^n dq.
        mean = integral(lambda x, n=n: q.sf(x) ** n, 0, 80, [1e-4, 1e-2, 1, 10])
        np.testing.assert_allclose(law.mean_reward(), -weight * s2 * mean, rtol=1e-7)
        for r in (-0.05, -0.6):
            np.testing.assert_allclose(law.reward_cdf(r), q.sf(-r / (weight * s2)) ** n, rtol=1e-9)
            density = (
                n * q.sf(-r / (weight * s2)) ** (n - 1) * q.pdf(-r / (weight * s2)) / (weight * s2)
            )
            np.testing.assert_allclose(np.exp(law.reward_log_prob(r)), density, rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 5])
def test_a_step_chooses_the_mode_with_one_minus_two_to_the_minus_n(n):
    problem = tj.problems.step()
    law = theory.best_of_n(problem.prior, problem.reward, n)
    np.testing.assert_allclose(1 - law.reward_cdf(-5.0), 1 - 2.0**-n, rtol=1e-12)
    top = 1 - 2.0**-n
    np.testing.assert_allclose(
        law.kl_to_base(), np.log(2) + top * np.log(top) + (1 - top) * np.log(1 - top or 1)
    )
    side = stats.norm.cdf(3)
    np.testing.assert_allclose(law.masses()[1], side * top + (1 - side) * (1 - top), rtol=1e-12)
    np.testing.assert_allclose(
        np.exp(law.log_prob(jnp.array([0.5]))),
        2 * top * np.exp(problem.prior.log_prob(jnp.array([0.5]))),
    )
    assert law.kl_to_base() <= np.log(n) - (n - 1) / n + 1e-12
    assert law.reward_quantile(0.999) == 0.0
    # The same reward hidden from the closed form, by cells.
    cells = theory.best_of_n(problem.prior, lambda x: problem.reward(x), n)
    np.testing.assert_allclose(cells.masses(), law.masses(), rtol=1e-6)
    np.testing.assert_allclose(cells.kl_to_base(), law.kl_to_base(), atol=1e-9)
    np.testing.assert_allclose(cells.kl_to_tilt(0.3), law.kl_to_tilt(0.3), atol=1e-9)


def test_mode_masses_and_divergences_by_brute_force_on_the_line():
    reward, n = tj.rewards.Quadratic([0.4]), 5
    law = theory.best_of_n(LINE, reward, n)
    cdf = lambda x: sum(
        w * stats.norm.cdf(x, m, s) for w, m, s in ((0.3, -1.5, 0.5**0.5), (0.7, 1.0, 0.3))
    )
    ratio = lambda x: n * (1 - cdf(0.4 + abs(x - 0.4)) + cdf(0.4 - abs(x - 0.4))) ** (n - 1)
    parts = [
        lambda x: 0.3 * stats.norm.pdf(x, -1.5, 0.5**0.5),
        lambda x: 0.7 * stats.norm.pdf(x, 1.0, 0.3),
    ]
    for part, mass in zip(parts, law.masses(), strict=True):
        np.testing.assert_allclose(
            mass, integral(lambda x, part=part: part(x) * ratio(x), -7, 5, [0, 0.4, 1]), rtol=1e-7
        )
    tilt = theory.tilt(LINE, reward, 0.8)
    base = lambda x: parts[0](x) + parts[1](x)
    log_norm = np.log(
        integral(lambda x: base(x) * np.exp(-0.8 * (x - 0.4) ** 2), -7, 5, [0, 0.4, 1])
    )
    np.testing.assert_allclose(tilt.log_norm, log_norm, rtol=1e-9)
    kl = lambda x: base(x) * ratio(x) * (np.log(ratio(x)) + 0.8 * (x - 0.4) ** 2 + log_norm)
    np.testing.assert_allclose(law.kl_to_tilt(0.8), integral(kl, -7, 5, [0, 0.4, 1]), rtol=1e-6)


@pytest.mark.slow
def test_cells_agree_with_the_closed_forms():
    problem = tj.problems.uncentered()
    hidden = tj.rewards.Quadratic(
        [0.0, 2.5], weight=[1.0, 1.0]
    )  # a weight that is not a scalar goes to the grid
    for n in (2, 16):
        a, b = (theory.best_of_n(problem.prior, reward, n) for reward in (problem.reward, hidden))
        np.testing.assert_allclose(a.masses(), b.masses(), rtol=1e-5)
        np.testing.assert_allclose(a.mean_reward(), b.mean_reward(), rtol=1e-6)
        np.testing.assert_allclose(a.kl_to_base(), b.kl_to_base(), rtol=1e-6)
        np.testing.assert_allclose(a.kl_to_tilt(3.0), b.kl_to_tilt(3.0), rtol=1e-6)
        np.testing.assert_allclose(
            a.log_prob(jnp.array([1.0, 0.5])), b.log_prob(jnp.array([1.0, 0.5])), atol=5e-3
        )
        # A cell is on one side of the level or the other.
        np.testing.assert_allclose(a.reward_cdf(-5.0), b.reward_cdf(-5.0), atol=5e-4)
    a, b = (
        theory.softmax_of_n(problem.prior, reward, 4, 1.0) for reward in (problem.reward, hidden)
    )
    np.testing.assert_allclose(a.masses(), b.masses(), rtol=1e-6)
    np.testing.assert_allclose(a.kl_to_tilt(1.0), b.kl_to_tilt(1.0), rtol=1e-6)


@pytest.mark.parametrize("scale", [0.1, 2.0])
def test_softmax_of_two_by_brute_force(scale):
    # E[w / (w + w')] over the rival, in the plane of both.
    law = theory.softmax_of_n(line(0.64, 0.3), tj.rewards.LinearReward([1.0]), 2, scale)
    z = np.linspace(-9, 9, 1201)
    mass = stats.norm.pdf(z) * (z[1] - z[0])
    r = 0.3 + 0.8 * z
    ratio = 2 / (1 + np.exp(-scale * (r[:, None] - r[None]))) @ mass
    np.testing.assert_allclose(law.mean_reward(), mass * ratio @ r, rtol=1e-9)
    np.testing.assert_allclose(law.kl_to_base(), mass * ratio @ np.log(ratio), rtol=1e-8)
    np.testing.assert_allclose(law.ratio(jnp.asarray(r[700])), np.log(ratio[700]), rtol=1e-9)
    np.testing.assert_allclose(
        law.reward_cdf(r[700]), (mass * ratio)[:700].sum() + (mass * ratio)[700] / 2, atol=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "reward", [tj.rewards.LinearReward([1.0]), tj.rewards.Quadratic([1.2]), tj.rewards.Bump([1.0])]
)
def test_softmax_goes_from_the_base_to_the_tilt_as_n_grows(reward):
    for n, scale in ((1, 1.0), (50, 0.0)):
        law = theory.softmax_of_n(LINE, reward, n, scale)
        np.testing.assert_allclose(law.kl_to_base(), 0, atol=1e-10)
        np.testing.assert_allclose(law.masses(), LINE.weights, atol=1e-10)
    kls = [
        float(theory.softmax_of_n(LINE, reward, n, 1.0).kl_to_tilt(1.0))
        for n in (1, 4, 64, 10**4, 10**8)
    ]
    assert np.all(np.diff(kls[:4]) < 0)
    assert abs(kls[-1]) < 1e-9


@pytest.mark.slow
def test_softmax_at_overwhelming_scales_is_best_of_n_and_never_nan():
    best = theory.best_of_n(PLANE, LINEAR, 4)
    before = None
    for scale in (1e-6, 3.0, 60.0, 1e4):
        law = theory.softmax_of_n(PLANE, LINEAR, 4, scale)
        values = np.array(
            [law.mean_reward(), law.kl_to_base(), law.kl_to_tilt(scale), *law.masses()]
        )
        assert np.all(np.isfinite(values))
        assert before is None or law.mean_reward() > before
        before = law.mean_reward() - 1e-6
    np.testing.assert_allclose(law.mean_reward(), best.mean_reward(), atol=1e-5)
    np.testing.assert_allclose(law.kl_to_base(), best.kl_to_base(), atol=1e-4)
    step = tj.problems.step()
    for scale in (1e-6, 1.0, 1e4):
        law = theory.softmax_of_n(step.prior, step.reward, 3, scale)
        chance = [1 / (1 + j / (3 - j) * np.exp(-10 * scale)) for j in range(3)]  # j rivals below
        np.testing.assert_allclose(
            1 - law.reward_cdf(-5.0), np.dot(chance, [1 / 8, 3 / 8, 3 / 8]), rtol=1e-9
        )


@pytest.mark.slow
def test_matching_n_is_the_best_of_all():
    n = theory.matching_n(PLANE, LINEAR, 1.2)
    kl = [float(theory.best_of_n(PLANE, LINEAR, m).kl_to_tilt(1.2)) for m in range(1, 12)]
    assert n == 1 + int(np.argmin(kl))
    problem = tj.problems.gaussian()
    n = theory.matching_n(problem.prior, problem.reward, 3.0)
    assert n == 196
    near = [
        float(theory.best_of_n(problem.prior, problem.reward, m).kl_to_tilt(3.0))
        for m in (n - 1, n, n + 1)
    ]
    assert near[1] < min(near[0], near[2])
    with pytest.raises(ValueError, match=r"at least maximum = 1000.*raise maximum"):
        theory.matching_n(PLANE, LINEAR, 1e4, maximum=1000)


@pytest.mark.slow
def test_laws_compile_map_and_differentiate():
    prior = tj.GaussianMixture([0.4, 0.6], [[-1.0, 0.0], [1.0, 0.5]], [np.eye(2) / 2] * 2)

    def best(y):
        law = theory.best_of_n(prior, tj.rewards.Quadratic(jnp.stack([y, 0.3 * y])), 6)
        return jnp.stack([law.mean_reward(), law.masses()[0], law.kl_to_tilt(0.7)])

    def soft(scale, y):
        law = theory.softmax_of_n(LINE, tj.rewards.Quadratic(y[None]), 6, scale)
        return jnp.stack(
            [law.mean_reward(), law.masses()[0], law.kl_to_tilt(scale), law.kl_to_base()]
        )

    y = jnp.asarray([0.2, 0.9])
    fixed = jax.jit(best)
    np.testing.assert_allclose(jax.jit(jax.vmap(best))(y)[1], best(y[1]), rtol=1e-9)
    slope = jax.jit(jax.jacfwd(fixed))(0.9)
    np.testing.assert_allclose(
        slope, (fixed(0.9 + 1e-4) - fixed(0.9 - 1e-4)) / 2e-4, rtol=1e-5, atol=1e-7
    )
    # One pullback for all four numbers: a reverse pass keeps every node of every one of them.
    compiled, mix = jax.jit(soft), jnp.asarray([1.0, -2.0, 300.0, 1.5])
    slopes = jax.jit(jax.grad(lambda scale, y: mix @ soft(scale, y), argnums=(0, 1)))(0.7, y[1])
    for i, step in enumerate(np.eye(2) * 1e-4):
        up, down = (compiled(0.7 + s * step[0], y[1] + s * step[1]) for s in (1, -1))
        each = (up - down) / 2e-4
        assert np.all(np.abs(mix * each) > 1e-2)  # none is too small to be missed
        np.testing.assert_allclose(slopes[i], mix @ each, rtol=1e-5, atol=1e-7)
    wide = jax.vmap(lambda s: compiled(s, y[1]))(jnp.asarray([1e-6, 0.7, 1e4]))
    np.testing.assert_allclose(wide[1], soft(0.7, y[1]), rtol=1e-9)
    assert np.all(np.isfinite(wide))


@pytest.mark.slow
def test_covariances_that_cannot_be_read_go_to_the_grid():
    def mean(variance):
        prior = tj.GaussianMixture([1.0], [[0.3, -0.2]], (variance * jnp.eye(2))[None])
        return theory.best_of_n(prior, tj.rewards.Quadratic([0.0, 1.0]), 4, cells=400).mean_reward()

    variance = jnp.asarray(0.5)
    np.testing.assert_allclose(jax.jit(mean)(variance), mean(variance), rtol=1e-4)


@pytest.mark.slow
def test_a_grid_differentiates_what_it_can_and_refuses_the_rest():
    def law(y):
        return theory.best_of_n(LINE, tj.rewards.Bump(y[None], 2.0), 4, cells=4000)

    y = jnp.asarray(0.5)
    slope = jax.grad(lambda y: law(y).mean_reward())(y)
    np.testing.assert_allclose(
        slope, (law(y + 0.05).mean_reward() - law(y - 0.05).mean_reward()) / 0.1, rtol=1e-2
    )
    with pytest.raises(ValueError, match=r"no derivative in the reward.*softmax_of_n"):
        jax.grad(lambda y: law(y).masses()[0])(y)
    by_weight = jax.grad(
        lambda w: theory.best_of_n(
            tj.GaussianMixture(jnp.stack([w, 1 - w]), LINE.means, LINE.covs),
            tj.rewards.Bump([0.5], 2.0),
            4,
            cells=4000,
        ).masses()[0]
    )
    assert by_weight(jnp.asarray(0.3)) > 0


@pytest.mark.slow
def test_refusals_say_why_and_what_to_use():
    cube = tj.GaussianMixture([1.0], jnp.zeros((1, 3)), jnp.eye(3)[None])
    with pytest.raises(ValueError, match=r"Bump.*not 3.*tiltjax\.best_of_n"):
        theory.best_of_n(cube, tj.rewards.Bump([0.0, 0.0, 0.0]), 4)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        theory.best_of_n(PLANE, LINEAR, 0)
    with pytest.raises(TypeError, match=r"whole number, got 2\.5"):
        theory.softmax_of_n(PLANE, LINEAR, 2.5, 1.0)
    with pytest.raises(ValueError, match="at most 1e"):
        theory.best_of_n(PLANE, LINEAR, 10**13)
    with pytest.raises(ValueError, match="not be negative"):
        theory.softmax_of_n(PLANE, LINEAR, 2, -1.0)
    with pytest.raises(ValueError, match="does not vary over component 0"):
        theory.best_of_n(PLANE, tj.rewards.LinearReward([0.0, 0.0]), 2)
    with pytest.raises(ValueError, match="height > 0, got -2: reverse the normal"):
        theory.best_of_n(PLANE, tj.rewards.StepReward(-2.0, [1.0, 0.0]), 2)
    for reward in (lambda x: jnp.log(x[0]), lambda x: jnp.where(x[0] > 0, 0.0, -jnp.inf)):
        with pytest.raises(ValueError, match=r"not finite everywhere on the grid: bound it"):
            theory.best_of_n(LINE, reward, 4, cells=2000)
    with pytest.raises(ValueError, match="does not resolve the selected draw"):
        theory.best_of_n(LINE, tj.rewards.Bump([1.0]), 10**6, cells=2000)
    with pytest.raises(ValueError, match="does not resolve a softmax"):
        theory.softmax_of_n(LINE, tj.rewards.Bump([1.0]), 4, 1e4)
    with pytest.raises(ValueError, match="no density in closed form"):
        theory.best_of_n(LINE, tj.rewards.Bump([1.0]), 4).reward_log_prob(0.5)
    with pytest.raises(ValueError, match="outside of jit"):
        jax.jit(lambda s: theory.matching_n(PLANE, LINEAR, s))(1.0)


@pytest.mark.parametrize("largest", [1 - 1e-15, 1.0, 1 + 4e-16])
def test_atoms_without_mass_are_no_number_only(largest):
    """Cells far from every mode have the least positive mass, whatever the others round to."""
    log_masses = jnp.asarray([[-1e7, -1e6, np.log(largest), -1e7]])
    law = reward_laws.AtomReward(jnp.asarray([[0.0, 1.0, 2.0, 3.0]]), log_masses)
    _, log_ratios = selection._best_of_atoms(law, jnp.asarray(32.0))
    assert np.all(np.isfinite(log_ratios))
    np.testing.assert_allclose(log_ratios[0, 2], 0, atol=1e-12)
