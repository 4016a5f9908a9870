"""Resampling: every scheme is unbiased, keeps to floor or ceil where it says so, and survives
adversarial weights. Tier: statistical, exact.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiltjax as tj
from tiltjax import resampling

SCHEMES = {
    name: getattr(resampling, name)
    for name in ("multinomial", "stratified", "systematic", "residual", "ssp")
}
WEIGHTS = np.array([0.31, 0.02, 0.0, 0.2, 0.07, 0.25, 0.15])
RUNS = 20_000


def offspring(scheme, log_weights, num=None, runs=RUNS):
    n = len(log_weights)
    keys = jax.random.split(jax.random.key(3), runs)
    count = lambda key: jnp.zeros(n).at[scheme(key, log_weights, num)].add(1.0)
    return np.asarray(jax.vmap(count)(keys))


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("num", [7, 4, 20])
def test_offspring_are_unbiased(name, num):
    with np.errstate(divide="ignore"):
        counts = offspring(SCHEMES[name], jnp.asarray(np.log(WEIGHTS) + 50.0), num)
    assert np.all(counts.sum(axis=1) == num)
    expected = num * WEIGHTS
    error = np.sqrt(np.var(counts, axis=0) / RUNS) + 1e-9
    assert np.all(np.abs(counts.mean(axis=0) - expected) < 5 * error)
    assert np.all(counts[:, 2] == 0)
    if name in ("systematic", "ssp"):
        assert np.all((counts >= np.floor(expected - 1e-9)) & (counts <= np.ceil(expected + 1e-9)))
    if name == "residual":
        assert np.all(counts >= np.floor(expected - 1e-9))


@pytest.mark.parametrize("name", SCHEMES)
def test_the_points_are_independent_of_the_slot(name):
    # Pairs of different particles: too many shared ancestors, or too few, would show in the second
    # moments of the counts.
    counts = offspring(SCHEMES[name], jnp.zeros(6), 6)
    covariance = np.cov(counts.T)
    assert np.all(np.abs(covariance.sum(axis=0)) < 1e-9)
    if name == "multinomial":
        np.testing.assert_allclose(covariance, np.eye(6) - 1 / 6, atol=0.05)
    else:
        assert np.all(np.diag(covariance) <= 1 - 1 / 6 + 0.05)


@pytest.mark.parametrize("n", [41, 47, 55])
def test_equal_weights_of_single_precision_are_whole(n):
    ancestors = np.asarray(resampling.residual(jax.random.key(0), jnp.zeros(n, jnp.float32)))
    assert np.array_equal(np.sort(ancestors), np.arange(n))


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_adversarial_weights(name, dtype):
    scheme, key = SCHEMES[name], jax.random.key(0)
    n = 50_000  # cumulative sums of single precision do not reach one
    equal = np.asarray(scheme(key, jnp.zeros(n, dtype)))
    assert equal.dtype == np.int32
    assert equal.min() >= 0
    assert equal.max() < n
    if name != "multinomial":
        # The sums' rounding may move a point across a border, one particle here and there.
        assert np.mean(np.bincount(equal, minlength=n) == 1) > 0.99
    hot = jnp.full(9, -jnp.inf, dtype).at[4].set(-1e4)
    assert np.all(np.asarray(scheme(key, hot)) == 4)
    last = jnp.zeros(9, dtype).at[8].set(-jnp.inf)
    assert np.asarray(scheme(key, last, 1000)).max() < 8
    assert np.asarray(scheme(key, jnp.asarray([3.0], dtype))).tolist() == [0]
    big = jnp.asarray([1e4, 1e4 - 1, -1e4], dtype)
    assert np.asarray(scheme(key, big, 100)).max() <= 1


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="one number per particle"):
        resampling.systematic(jax.random.key(0), jnp.zeros((3, 2)))
    with pytest.raises(ValueError, match="num"):
        resampling.systematic(jax.random.key(0), jnp.zeros(3), 0)
    for bad, largest in ((-jnp.inf, "-inf"), (jnp.nan, "nan"), (jnp.inf, "inf")):
        with pytest.raises(ValueError, match=f"not all -inf: their maximum is {largest}$"):
            resampling.systematic(jax.random.key(0), jnp.full(3, bad))


def test_effective_sample_sizes():
    from tiltjax.particles import conditional_effective, effective

    log_weights = jnp.log(jnp.asarray([1.0, 2.0, 3.0]))
    np.testing.assert_allclose(effective(log_weights), 36 / 14, rtol=1e-12)
    np.testing.assert_allclose(effective(jnp.zeros(5) - 1e5), 5, rtol=1e-9)
    # Equal factors are even whatever the weights were; after equal weights it is the effective
    # sample size.
    np.testing.assert_allclose(conditional_effective(log_weights, jnp.full(3, 7.0)), 3, rtol=1e-12)
    np.testing.assert_allclose(
        conditional_effective(jnp.zeros(3), log_weights), 36 / 14, rtol=1e-12
    )


def test_particles_are_saved_and_read_again(tmp_path):
    model = tj.Analytic(tj.GaussianMixture([1.0], [[0.0]], [[[1.0]]]))
    guidance = tj.dps(model, tj.rewards.Quadratic([1.0]), 0.3)
    weighted = tj.smc(jax.random.key(0), model, guidance, num=30, steps=5)
    plain = tj.sample(jax.random.key(0), model, num=3, steps=3, save_trajectory=True)
    narrow = tj.Particles(jnp.ones((3, 2), jnp.bfloat16) / 3, jnp.zeros(3))
    for i, particles in enumerate((weighted, plain, narrow)):
        particles.save(tmp_path / f"{i}")
        again = tj.Particles.load(tmp_path / f"{i}")
        assert jax.tree.structure(again) == jax.tree.structure(particles)
        for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(particles), strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(
                np.asarray(one, np.float64), np.asarray(other, np.float64)
            )
    np.savez(tmp_path / "other.npz", a=np.ones(2))
    np.save(tmp_path / "array.npy", np.ones(2))
    (tmp_path / "text").write_text("nothing")
    for name in ("other.npz", "array.npy", "text"):
        with pytest.raises(ValueError, match="holds no particles"):
            tj.Particles.load(tmp_path / name)


def test_the_last_point_is_never_handed_to_a_weight_of_zero(monkeypatch):
    # The largest offset there is, where a difference of single precision rounds up.
    monkeypatch.setattr(
        jax.random, "uniform", lambda key, shape, dtype: jnp.full(shape, 1 - 2.0**-24, dtype)
    )
    log_weights = jnp.zeros(1000, jnp.float32).at[-100:].set(-jnp.inf)
    assert int(resampling.systematic(jax.random.key(0), log_weights)[-1]) == 899


def test_equal_weights_keep_everybody_in_single_precision():
    for seed in range(3):
        ancestors = resampling.systematic(jax.random.key(seed), jnp.zeros(100_000, jnp.float32))
        np.testing.assert_array_equal(ancestors, np.arange(100_000))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("scheme", ["systematic", "stratified"])
def test_narrow_log_weights_are_resampled_in_single_precision(scheme, dtype):
    ancestors = getattr(resampling, scheme)(jax.random.key(0), jnp.zeros(1000, dtype))
    np.testing.assert_array_equal(ancestors, np.arange(1000))
