"""Gaussian mixtures against dense NumPy and quadrature. Tiers: exact (float64, 1e-10; float32 by
the condition number of the map itself), statistical (5 standard errors).
"""

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import contracts
from scipy import stats

import tiltjax as tj
from tiltjax import mixtures

TOLERANCE = 1e-10
CASES = {
    (k, d): contracts.random_mixture(k, d, seed=10 * k + d)
    for k, d in [(1, 1), (3, 2), (2, 4), (2, 5), (9, 2)]
}


@pytest.fixture(params=CASES, ids=lambda case: "K={}, d={}".format(*case))
def mixture(request):
    return CASES[request.param]


def point(d, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=d))


def test_condition_and_denoise_against_dense_algebra(mixture):
    x, both = (
        point(mixture.dim),
        jax.jit(lambda m, t, x: (m.condition(t, 1 - t, x), m.denoise(t, 1 - t, x))),
    )
    for t in (1e-3, 0.5, 0.999):
        expected = contracts.np_condition(mixture, t, 1 - t, np.asarray(x))
        got, denoised = both(mixture, t, x)
        chex.assert_trees_all_close(
            (got.weights, got.means, got.covs), expected, rtol=TOLERANCE, atol=TOLERANCE
        )
        chex.assert_trees_all_close(
            denoised, expected[0] @ expected[1], rtol=TOLERANCE, atol=TOLERANCE
        )


def test_log_prob_against_scipy(mixture):
    x = point(mixture.dim, 1)
    weights, means, covs = contracts.np_fields(mixture)
    parts = [
        stats.multivariate_normal(m, s).logpdf(np.asarray(x))
        for m, s in zip(means, covs, strict=True)
    ]
    chex.assert_trees_all_close(
        mixture.component_log_probs(x), np.log(weights) + np.array(parts), rtol=TOLERANCE
    )
    chex.assert_trees_all_close(
        mixture.log_prob(x), np.logaddexp.reduce(np.log(weights) + parts), rtol=TOLERANCE
    )


def test_against_quadrature_on_the_line():
    """The witness knows no linear algebra: Bayes' rule on a grid (a trapezoid is spectrally
    accurate here).
    """
    mixture = tj.GaussianMixture(
        [0.2, 0.5, 0.3], [[-2.0], [0.5], [3.0]], [[[0.3]], [[1.0]], [[0.05]]]
    )
    alpha, sigma, x = 0.6, 0.5, 0.4
    z = np.linspace(-12.0, 14.0, 26001)
    prior = sum(
        w * stats.norm(m[0], s[0, 0] ** 0.5).pdf(z)
        for w, m, s in zip(*contracts.np_fields(mixture), strict=True)
    )
    joint = prior * stats.norm(alpha * z, sigma).pdf(x)
    mass = np.trapezoid(joint, z)
    mean = np.trapezoid(z * joint, z) / mass
    post = mixture.condition(alpha, sigma, jnp.asarray([x]))
    chex.assert_trees_all_close(
        mixture.denoise(alpha, sigma, jnp.asarray([x]))[0], mean, rtol=TOLERANCE
    )
    chex.assert_trees_all_close(post.mean()[0], mean, rtol=TOLERANCE)
    chex.assert_trees_all_close(
        post.cov()[0, 0], np.trapezoid((z - mean) ** 2 * joint, z) / mass, rtol=TOLERANCE
    )
    for at in (-2.1, 0.0, 3.1):
        expected = np.log(np.interp(at, z, prior))  # the points lie on the grid
        chex.assert_trees_all_close(mixture.log_prob(jnp.asarray([at])), expected, rtol=1e-9)


@pytest.mark.parametrize("d", [1, 2, 4])
def test_the_slope_in_the_state_alone_equals_that_of_arrays(d, monkeypatch):
    mixture, x = contracts.random_mixture(3, d, seed=d), point(d, 2)

    def slopes(mixture, x):
        def of(x, t):
            return mixture.denoise(t, 1 - t, x)

        ends = [jax.jacrev(of)(x, t) for t in (1e-3, 0.999)]
        return ends, jax.jacfwd(of)(x, 0.6), jax.jacfwd(jax.jacrev(of))(x, 0.6)

    small = jax.jit(lambda *args: slopes(*args))(mixture, x)
    monkeypatch.setattr(mixtures, "_UNROLL", 0)
    chex.assert_trees_all_close(
        small, jax.jit(lambda *args: slopes(*args))(mixture, x), rtol=1e-9, atol=TOLERANCE
    )


def test_the_way_back_keeps_a_matrix_of_each_call():
    """Of a chain of calls in the plane: the three numbers of each slope, and no more than the state
    besides.
    """
    mixture, steps = CASES[3, 2], 7

    def chain(x):
        step = lambda x, t: (mixture.denoise(t, 1 - t, x), None)
        return jnp.sum(jax.lax.scan(step, x, jnp.linspace(0.2, 0.8, steps))[0])

    _, back = jax.vjp(chain, point(2))
    kept = [leaf for leaf in jax.tree.leaves(back) if np.shape(leaf)[:1] == (steps,)]
    assert 0 < sum(np.size(leaf) for leaf in kept) <= 5 * steps


@pytest.mark.parametrize("d", [1, 2, 4])
def test_entries_equal_arrays(d, monkeypatch):
    mixture, x = contracts.random_mixture(3, d, seed=d), point(d, 2)

    def everything(mixture, x):
        post = mixture.condition(0.7, 0.4, x)
        values = post.weights, post.means, post.covs, mixture.log_prob(x)
        denoised = lambda m, x: m.denoise(0.7, 0.4, x)
        of_mixture, of_x = jax.jacobian(denoised, argnums=(0, 1))(mixture, x)
        # A symmetric matrix moves symmetrically: only this part of its derivative has a meaning.
        of_covs = of_mixture.covs + jnp.swapaxes(of_mixture.covs, -1, -2)
        return values, denoised(mixture, x), of_mixture.weights, of_mixture.means, of_covs, of_x

    small = jax.jit(lambda *args: everything(*args))(mixture, x)
    monkeypatch.setattr(mixtures, "_UNROLL", 0)
    chex.assert_trees_all_close(
        small, jax.jit(lambda *args: everything(*args))(mixture, x), rtol=1e-9, atol=TOLERANCE
    )


def dense_denoise(log_weights, means, covs, alpha, sigma, x):
    """The posterior mean by dense algebra."""
    noisy = alpha**2 * covs + sigma**2 * jnp.eye(len(x))[None]
    residuals = x[None] - alpha * means
    solved = jnp.linalg.solve(noisy, residuals[..., None])[..., 0]
    log_probs = -(jnp.linalg.slogdet(noisy)[1] + jnp.sum(residuals * solved, axis=1)) / 2
    moved = means + alpha * jnp.einsum("kij,kj->ki", covs, solved)
    return jax.nn.softmax(log_weights + log_probs) @ moved


def ours(log_weights, means, covs, alpha, sigma, x):
    base = tj.GaussianMixture(jnp.ones(len(means)), means, covs)
    return base.replace(log_weights, means, covs).denoise(alpha, sigma, x)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "covs"),
    [
        ((1, 3), "isotropic"),
        pytest.param((2, 2), "singular", marks=pytest.mark.nightly),
        ((3, 4), "distinct"),
        pytest.param((6, 6), "distinct", marks=pytest.mark.nightly),
        ((6, 6), "isotropic"),
    ],
    ids=str,
)
def test_derivatives_of_any_order_against_dense_algebra(case, covs):
    """First, second and third ones, pure and mixed, along random directions of all arguments and of
    each alone, forward over reverse and the other way around.
    """
    (k, d), rng = case, np.random.default_rng(case)
    mixture = contracts.random_mixture(k, d, seed=k * d)
    matrices = {
        "distinct": mixture.covs,
        "isotropic": jnp.asarray(rng.uniform(0.5, 2, size=(k, 1, 1)) * np.eye(d)[None]),
        "singular": mixture.covs.at[:, 0, :].set(0).at[:, :, 0].set(0),
    }[covs]
    at = (mixture.log_weights, mixture.means, matrices, *map(jnp.asarray, (0.6, 0.4)), point(d, 3))

    def direction():
        *rest, of_covs, of_alpha, of_sigma, of_x = (
            jnp.asarray(rng.normal(size=a.shape)) for a in at
        )
        return (*rest, of_covs + jnp.swapaxes(of_covs, 1, 2), of_alpha, of_sigma, of_x)

    full, other = direction(), direction()
    alone = lambda which: tuple(jnp.where(i == which, v, 0 * v) for i, v in enumerate(full))
    directions = [full, *map(alone, range(len(at)))]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *directions)

    def derivatives(fn):
        along = lambda fn, v: lambda *args: jax.jvp(fn, args, v)[1]
        total = lambda *args: jnp.sum(fn(*args) * jnp.arange(1.0, d + 1))

        def all_of(v):
            second = along(along(fn, v), other)
            of_x = jax.jacfwd(jax.jacrev(fn, argnums=5), argnums=5)
            back = jax.vjp(along(total, v), *at)[1](1.0)
            inner = sum(jnp.sum(a * b) for a, b in zip(back, other, strict=True))
            return along(fn, v)(*at), second(*at), along(second, v)(*at), along(of_x, v)(*at), inner

        return jax.jit(jax.vmap(all_of))(stacked)

    got, expected = derivatives(ours), derivatives(dense_denoise)
    chex.assert_trees_all_close(got, expected, rtol=1e-7, atol=1e-9)


def test_mixtures_are_decomposed_where_a_program_begins():
    """A loop over times has no decomposition inside, also not of a mixture inside a function; and
    nobody's covariances go stale.
    """
    prior, x = contracts.random_mixture(3, 6), point(6)
    model = tj.Analytic(prior)

    def run(model):
        step = lambda x, t: (model.denoise(t, x), None)
        return jax.lax.scan(step, x, jnp.linspace(0.2, 0.8, 5))[0]

    def decompositions_in_loops(run):
        loops = [e for e in jax.make_jaxpr(run)(model).eqns if e.primitive.name == "scan"]
        assert len(loops) == 1
        return str(loops[0].params["jaxpr"]).count("eigh")

    assert decompositions_in_loops(run) > 0
    assert decompositions_in_loops(lambda model: run(mixtures.decomposed(model))) == 0
    function = tj._pytree.Function(mixtures.GaussianMixture.log_prob.__get__(prior))
    assert "eigh" not in str(jax.make_jaxpr(mixtures.decomposed(function))(x))
    wider = eqx.tree_at(lambda m: m.covs, prior, 2 * prior.covs)
    expected = tj.GaussianMixture(prior.weights, prior.means, 2 * prior.covs)
    chex.assert_trees_all_close(wider.denoise(0.5, 0.5, x), expected.denoise(0.5, 0.5, x))
    posterior = mixtures.decomposed(prior).condition(0.6, 0.4, x)
    fresh = prior.condition(0.6, 0.4, x)
    chex.assert_trees_all_close(
        posterior.log_prob(point(6, 1)), fresh.log_prob(point(6, 1)), rtol=1e-12
    )


@pytest.mark.parametrize("side", [-1.0, 1.0])
def test_of_two_components_the_smaller_share_keeps_its_digits(side):
    """Of points at 0 and c, `D = c / (1 + exp(c (c/2 - x) / sigma^2))`, from where c has all of the
    mass to where it has none; c may come first.
    """
    c, x = 1.0, np.linspace(-20.0, 21.0, 83)
    points = np.float32([[0.0], [c]])[:: int(side)]
    mixture = tj.GaussianMixture(
        np.full(2, 0.5, np.float32), points, np.zeros((2, 1, 1), np.float32)
    )
    denoised = jax.vmap(lambda x: mixture.denoise(jnp.float32(1), jnp.float32(0.5), x))(
        jnp.float32(x)[:, None]
    )[:, 0]
    expected = c / (1 + np.exp(c * (c / 2 - x) / 0.5**2))
    assert denoised.dtype == jnp.float32
    np.testing.assert_allclose(
        denoised, expected, rtol=2e-5
    )  # of the exponent, up to 82, as many digits


@pytest.mark.parametrize("weight", [1e-10, 1e-25, 1e-34])
def test_a_small_weight_moves_the_mean_by_the_right_amount(weight):
    """Of points at 1 and 0, weighted w to 1 and seen halfway, `D = w / (1 + w)`."""
    points, halfway = np.float32([[1.0], [0.0]]), jnp.full(1, 0.5, jnp.float32)

    def of(w):
        mixture = tj.GaussianMixture(
            jnp.stack([w, jnp.float32(1)]), points, np.zeros((2, 1, 1), np.float32)
        )
        return mixture.denoise(jnp.float32(1), jnp.float32(0.5), halfway)[0]

    got = [jax.jit(way(of))(jnp.float32(weight)) for way in (jax.grad, jax.jacfwd)]
    np.testing.assert_allclose(got, 1.0, rtol=1e-4)


@pytest.mark.slow
def test_derivatives_of_two_components_far_apart_in_single_precision():
    """In the width of the noise, thrice, forward and reverse: of points at 1 and -1, seen at x,
    `D = 1 - 2 / (1 + exp(2 x / sigma^2))`.
    """
    halves = np.float32([1.5, 15.0, 25.0, 39.5, 100.0])  # of the exponents
    points = np.float32([[1.0], [-1.0]])
    mixture = tj.GaussianMixture(
        np.full(2, 0.5, np.float32), points, np.zeros((2, 1, 1), np.float32)
    )
    of = lambda sigma, x: mixture.denoise(jnp.float32(1), sigma, x[None])[0]
    plain = lambda sigma, x: -2 * jax.nn.sigmoid(-2 * x / sigma**2)
    for ways in ([jax.grad] * 3, [jax.jacfwd] * 3, [jax.grad, jax.jacfwd, jax.jacfwd]):
        got, expected = of, plain
        for way in ways:
            got, expected = way(got), way(expected)
            value = jax.jit(jax.vmap(got, (None, 0)))(jnp.float32(1), halves)
            assert value.dtype == jnp.float32
            truth = jax.jit(jax.vmap(expected, (None, 0)))(jnp.float64(1), np.float64(halves))
            np.testing.assert_allclose(value, truth, rtol=1e-3, atol=1e-30)


@pytest.mark.slow
def test_derivatives_where_two_components_tie():
    """`D = x/2 + tanh(x/2)/2` of N(-1, 1) and N(1, 1) at alpha = sigma = 1; at 0 a comparison
    decides which of two forms is differentiated.
    """
    mixture = tj.GaussianMixture(jnp.full(2, 0.5), [[-1.0], [1.0]], np.ones((2, 1, 1)))
    of = lambda x: mixture.denoise(1.0, 1.0, x[None])[0]
    for x in jnp.asarray([0.0, 0.3, -0.3]):
        tanh = np.tanh(x / 2)
        rate = (1 - tanh**2) / 2
        got = (
            of(x),
            jax.grad(of)(x),
            jax.jacfwd(jax.grad(of))(x),
            jax.grad(jax.jacfwd(jax.grad(of)))(x),
        )
        expected = (
            x / 2 + tanh / 2,
            0.5 + rate / 2,
            -tanh * rate / 2,
            (-(rate**2) + tanh**2 * rate) / 2,
        )
        chex.assert_trees_all_close(got, expected, rtol=1e-12, atol=1e-12)


def test_embedding_in_a_higher_dimension_changes_nothing():
    """A plane inside six dimensions, the rest a point mass at zero: arrays, singular covariances,
    same numbers.
    """
    mixture, d = contracts.planar(), 6
    means = jnp.zeros((2, d)).at[:, :2].set(mixture.means)
    covs = jnp.zeros((2, d, d)).at[:, :2, :2].set(mixture.covs)
    large, x = tj.GaussianMixture(mixture.weights, means, covs), point(2)
    padded = jnp.concatenate([x, jnp.zeros(d - 2)])
    small_post, large_post = mixture.condition(0.6, 0.3, x), large.condition(0.6, 0.3, padded)
    chex.assert_trees_all_close(large_post.weights, small_post.weights, atol=TOLERANCE)
    chex.assert_trees_all_close(
        large_post.means, means.at[:, :2].set(small_post.means), atol=TOLERANCE
    )
    chex.assert_trees_all_close(
        large_post.covs, covs.at[:, :2, :2].set(small_post.covs), atol=TOLERANCE
    )


@pytest.mark.parametrize("d", [2, 5])
def test_point_masses(d):
    means = np.random.default_rng(4).normal(size=(3, d))
    mixture = tj.GaussianMixture([0.2, 0.3, 0.5], means, np.zeros((3, d, d)))
    x, alpha, sigma = point(d, 5), 0.7, 0.3
    distance = np.sum((np.asarray(x) - alpha * means) ** 2, axis=1) / (2 * sigma**2)
    weights = contracts.np_softmax(np.log([0.2, 0.3, 0.5]) - distance)
    post = mixture.condition(alpha, sigma, x)
    chex.assert_trees_all_close((post.weights, post.means), (weights, means), atol=TOLERANCE)
    chex.assert_trees_all_equal(post.covs, jnp.zeros((3, d, d)))
    draws = np.asarray(mixture.sample(jax.random.key(0), 50))
    assert all(any(np.array_equal(draw, mean) for mean in means) for draw in draws)
    assert np.all(np.isfinite(jax.jit(jax.jacobian(lambda x: mixture.denoise(alpha, sigma, x)))(x)))


def test_a_component_without_weight_takes_no_part():
    mixture = tj.GaussianMixture([0.0, 1.0], [[0.0, 0.0], [1.0, 2.0]], np.stack([np.eye(2)] * 2))
    alone = contracts.gaussian([1.0, 2.0], np.eye(2))
    x = point(2)
    chex.assert_trees_all_close(
        mixture.denoise(0.4, 0.6, x), alone.denoise(0.4, 0.6, x), atol=TOLERANCE
    )
    gradient = jax.jacobian(lambda x: mixture.denoise(0.4, 0.6, x))(x)
    chex.assert_trees_all_close(
        gradient, jax.jacobian(lambda x: alone.denoise(0.4, 0.6, x))(x), atol=TOLERANCE
    )


@pytest.mark.slow
@pytest.mark.parametrize("d", [2, 5])
def test_single_precision_loses_only_what_the_map_itself_magnifies(d):
    single = contracts.random_mixture(3, d, seed=d, dtype=jnp.float32)
    double = jax.tree.map(lambda a: a.astype(jnp.float64), single)
    with_derivatives = jax.jit(
        lambda m, *at: (
            m.denoise(*at),
            jax.jacobian(lambda *at: m.denoise(*at), argnums=(0, 1, 2))(*at),
        )
    )
    for t in (1e-3, 0.5, 0.999):
        alpha, sigma = jnp.float32(t), jnp.float32(1 - t)
        x = (alpha * single.means[0] + sigma * point(d).astype(jnp.float32)).astype(jnp.float32)
        got = single.denoise(alpha, sigma, x)
        assert got.dtype == jnp.float32
        at = tuple(jnp.asarray(a, jnp.float64) for a in (alpha, sigma, x))
        exact, jacobians = with_derivatives(double, *at)
        # What one rounding of each input does to the output; the algorithm may take d^2 of them.
        magnified = sum(
            np.abs(np.asarray(j).reshape(d, -1)) @ np.abs(np.asarray(a)).reshape(-1)
            for j, a in zip(jacobians, at, strict=True)
        )
        allowed = 4 * d**2 * np.finfo(np.float32).eps * (np.abs(np.asarray(exact)) + magnified)
        assert np.all(np.abs(np.asarray(got, np.float64) - np.asarray(exact)) < allowed)


def test_every_method_keeps_single_precision():
    mixture = contracts.planar(jnp.float32)
    x = jnp.zeros(2, jnp.float32)
    results = (
        mixture.condition(jnp.float32(0.5), jnp.float32(0.5), x),
        mixture.denoise(0.5, 0.5, x),
        mixture.log_prob(x),
        mixture.component_log_probs(x),
        mixture.mean(),
        mixture.cov(),
        mixture.sample(jax.random.key(0), 3),
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(results)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("d", [2, 5])
def test_gradients_are_finite_for_isotropic_covariances(d):
    """Where an eigendecomposition's derivative is NaN: equal eigenvalues."""
    x = point(d)

    def loss(covs, t):
        mixture = tj.GaussianMixture(
            jnp.asarray([0.5, 0.5]), jnp.ones((2, d)).at[0].set(-1.0), covs
        )
        post = mixture.condition(t, 1 - t, x)
        return (
            jnp.sum(mixture.denoise(t, 1 - t, x))
            + mixture.log_prob(x)
            + jnp.sum(post.covs)
            + jnp.sum(post.cov())
        )

    covs, half, loss = 0.5 * jnp.stack([jnp.eye(d)] * 2), jnp.asarray(0.5), jax.jit(loss)
    gradients = jax.grad(loss, argnums=(0, 1))(covs, half)
    assert all(np.all(np.isfinite(g)) for g in gradients)
    step = 1e-6 * jnp.eye(d)[None]
    numeric = (loss(covs + step, half) - loss(covs - step, half)) / 2e-6
    chex.assert_trees_all_close(jnp.einsum("kii->", gradients[0]), numeric, rtol=1e-8)


def test_moments(mixture):
    chex.assert_trees_all_close(
        (mixture.mean(), mixture.cov()),
        contracts.np_moments(*contracts.np_fields(mixture)),
        atol=TOLERANCE,
    )


@pytest.mark.parametrize("case", [(3, 2), (2, 5)], ids=str)
def test_samples_have_the_mixtures_moments(case):
    mixture = CASES[case]
    draws = mixture.sample(jax.random.key(1), 20_000)
    assert draws.shape == (20_000, mixture.dim)
    contracts.assert_moments(draws, *contracts.np_moments(*contracts.np_fields(mixture)))


def test_samples_of_a_singular_covariance_stay_on_its_plane():
    direction = np.array([1.0, 2.0, -1.0])
    mixture = tj.GaussianMixture([1.0], [[1.0, 0.0, 0.0]], np.outer(direction, direction)[None])
    draws = np.asarray(mixture.sample(jax.random.key(2), 5000))
    along = (draws - [1.0, 0.0, 0.0]) @ direction / (direction @ direction)
    np.testing.assert_allclose(
        draws, np.array([1.0, 0.0, 0.0]) + along[:, None] * direction, atol=TOLERANCE
    )
    contracts.assert_mean(along[:, None] ** 2, 1.0)


def test_under_jit_and_vmap_over_its_fields():
    scales, x = jnp.asarray([0.5, 1.0, 2.0]), point(2)
    base = contracts.planar()

    def denoise(scale):
        return tj.GaussianMixture(base.weights, base.means, scale * base.covs).denoise(0.3, 0.7, x)

    together = jax.jit(jax.vmap(denoise))(scales)
    chex.assert_trees_all_close(together, jnp.stack([denoise(s) for s in scales]), atol=TOLERANCE)
    stacked = jax.vmap(lambda s: tj.GaussianMixture(base.weights, base.means, s * base.covs))(
        scales
    )
    chex.assert_trees_all_close(
        jax.vmap(lambda m: m.denoise(0.3, 0.7, x))(stacked), together, atol=TOLERANCE
    )


def test_weights_are_proportional_and_integers_are_numbers():
    mixture = tj.GaussianMixture([1, 3], [[0], [1]], [[[1]], [[2]]])
    chex.assert_trees_all_close(mixture.weights, jnp.asarray([0.25, 0.75]), rtol=1e-15)
    assert mixture.means.dtype == jnp.float64


@pytest.mark.slow
@pytest.mark.parametrize("components", [1, 2])
@pytest.mark.parametrize("narrow", [0.0, 1e-4])
def test_narrow_directions_off_the_axes_in_single_precision(components, narrow):
    """Where sigma is small C^-1 is large across the data: rounding must meet the residual there,
    not the state.
    """
    angle = np.asarray([[np.cos(0.6), -np.sin(0.6)], [np.sin(0.6), np.cos(0.6)]])
    root, mean = angle * np.sqrt([1.0, narrow]), angle @ [0.0, 30.0]
    means = [mean, mean + angle @ [0.3, 0.0]][:components]
    mixture = tj.GaussianMixture(np.ones(components), means, [root @ root.T] * components)
    single = tj._pytree.cast(mixture, jnp.float32)
    rng = np.random.default_rng(0)
    for sigma in (1e-2, 1e-3):
        alpha = np.float32(1 - sigma)
        x = np.float32(
            alpha * (mean + rng.normal(size=(500, 2)) @ root.T) + sigma * rng.normal(size=(500, 2))
        )
        by = lambda law, dtype, x=x, alpha=alpha, sigma=sigma: jax.vmap(
            lambda x: law.denoise(
                jnp.asarray(alpha, dtype), jnp.asarray(np.float32(sigma), dtype), x
            )
        )(jnp.asarray(x, dtype))
        exact = by(jax.tree.map(lambda leaf: leaf.astype(jnp.float64), single), jnp.float64)
        # What a residual of size sigma and a rounding of the covariance leave, over sigma^2; thirty
        # times less than of the state.
        assert (
            np.abs(np.asarray(by(single, jnp.float32), np.float64) - np.asarray(exact)).max()
            < 10 * np.finfo(np.float32).eps / sigma
        )


def test_covariances_that_are_replaced_inside_of_a_run_count():
    """A guidance that changes its model is called with a mixture that is decomposed already."""
    base = tj.Analytic(tj.GaussianMixture([1.0], [[0.0] * 5], [np.eye(5)]))
    wide = 9 * jnp.eye(5)[None]

    class Replaced(tj.guidance.Guidance):
        model: tj.Analytic

        def __call__(self, key, t, x, state):
            model = eqx.tree_at(lambda m: m.mixture.covs, self.model, wide)
            slope = eqx.filter_grad(lambda m: m.mixture.log_prob(x))(self.model).mixture.covs
            tilted = model.denoise(t, x) + 0 * jnp.sum(slope)
            return tj.guidance.Estimate(jnp.where(jnp.all(slope == 0), jnp.nan, tilted)), state

        def log_tilt(self, x1):
            return jnp.zeros(())

    run = lambda model, guidance=None: (
        tj.sample(jax.random.key(0), model, guidance, num=8, steps=10).x
    )
    expected = run(tj.Analytic(tj.GaussianMixture([1.0], [[0.0] * 5], wide)))
    np.testing.assert_allclose(run(base, Replaced(base)), expected, rtol=1e-9)
