"""Weights of guided chains on mixtures: one Gaussian has its closed form, weighted runs the same
effective sample size and spread of log Z. Tier: statistical.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import theory
import tiltjax as tj
from benchmarks.accuracy import recommended
from theory import run_weights, runs

TIMES = jnp.linspace(1e-3, 1, 9)
DPS = theory.Deterministic(theory.dps_denoiser)
LAPLACE = theory.Deterministic(theory.laplace_denoiser)


def measured(prior, reward, scale, field, *, times=TIMES, eta=1.0, num=4096):
    """The measurement, also where there is a closed form."""
    problem, law = runs.problem_of(prior, reward, tj.Linear()), tj.scales.Constant(scale)
    return run_weights._measured(problem, law, field, times, tj.Ancestral(eta), num, 0)


@pytest.mark.parametrize(
    ("field", "affine", "scale", "eta"),
    [
        (DPS, theory.dps_field, 0.2, 1.0),
        pytest.param(LAPLACE, theory.doob_field, 0.3, 0.9, marks=pytest.mark.slow),
        pytest.param(
            theory.PlugInDraws(1, 30), theory.plug_in_field, 0.15, 1.0, marks=pytest.mark.slow
        ),
    ],
)
def test_one_gaussian_has_its_closed_form(field, affine, scale, eta):
    case = tj.problems.get("gaussian")
    exact = theory.path_law(
        affine(case.prior, case.reward, scale), times=TIMES, solver=tj.Ancestral(eta)
    )
    found = measured(case.prior, case.reward, scale, field, eta=eta)
    assert abs(found.log_norm.value - exact.log_norm) < 5 * found.log_norm.error
    assert abs(found.ess.value - exact.ess) < 5 * found.ess.error
    assert found.ess.error < 0.05 * exact.ess
    assert found.basis.startswith("measured")


def test_a_closed_form_has_no_error():
    case = tj.problems.get("gaussian")
    law = theory.weight_law(case.prior, case.reward, 0.6, DPS, times=TIMES)
    exact = theory.path_law(theory.dps_field(case.prior, case.reward, 0.6), times=TIMES)
    assert law.basis == "law at these steps"
    assert law.ess.value == exact.ess
    assert law.ess.error == 0
    np.testing.assert_allclose(law.spread(100).value, np.sqrt((1 / exact.ess - 1) / 100))
    assert "effective sample size" in str(law)


def test_densities_of_the_chains_are_normalized():
    """The mean of P / Q over trajectories of Q is 1, and so for the two other chains."""
    case = recommended.cases()["four modes, anisotropic"]
    problem = runs.problem_of(case.prior, case.reward, tj.Linear())
    start = jax.random.normal(jax.random.key(1), (4096, 2))
    for chain in run_weights._CHAINS:
        found = run_weights.trajectories(
            problem, (DPS,), 0, tj.scales.Constant(0.02), TIMES, jnp.ones(()), jnp.asarray(chain),
            start, jax.random.key(chain),
        )  # fmt: skip
        ratios = np.exp(found.log_ratios[chain])
        assert abs(np.mean(ratios) - 1) < 5 * np.std(ratios) / 4096**0.5


def test_infinite_variance_is_said():
    case = tj.problems.get("gaussian")
    law = theory.weight_law(case.prior, case.reward, 3.0, DPS, times=jnp.linspace(1e-3, 1, 51))
    assert law.ess.value == 0
    assert law.spread(10).value == np.inf
    assert "infinite" in law.basis


@pytest.mark.slow
def test_heavy_tails_of_mixtures_are_said():
    case = tj.problems.get("quadratic")
    law = theory.weight_law(case.prior, case.reward, 1.0, DPS, steps=50)  # each mode alone is fine
    assert law.basis.startswith("upper bound")
    assert law.pareto_k > 0.7
    assert "at most" in str(law)
    assert law.log_norm.error < 0.02
    law = theory.weight_law(case.prior, case.reward, 3.0, DPS, steps=50)
    assert law.ess.value == 0
    assert "infinite" in law.basis


CASES = {
    "quadratic, Laplace": (tj.problems.get("quadratic"), 1.0, tj.Laplace, LAPLACE),
    "uncentered, dps": (tj.problems.get("uncentered"), 0.1, tj.dps, DPS),
    "noniso, dps": (tj.problems.get("noniso"), 0.2, tj.dps, DPS),
    "anisotropic, Conjugate": (
        recommended.cases()["four modes, anisotropic"], 0.3, tj.Conjugate, theory.ConjugateFit(),
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize("name", CASES)
def test_weighted_runs_have_the_effective_sample_size_and_the_spread(name):
    case, scale, guidance, field = CASES[name]
    sets, num, steps = 400, 300, 25
    law = theory.weight_law(case.prior, case.reward, scale, field, steps=steps, num=8192)
    model = tj.Analytic(case.prior)
    particles = tj.smc(
        jax.random.key(0), model, guidance(model, case.reward, scale), num=sets * num,
        steps=steps, ess_threshold=0,
    )  # fmt: skip
    log_weights = np.asarray(particles.log_weights, np.float64)
    weights = np.exp(log_weights - float(law.log_norm.value))
    error = weights.std() / len(weights) ** 0.5
    assert abs(np.mean(weights) - 1) < 5 * np.hypot(error, law.log_norm.error)
    # E[w]^2 / E[w^2] by the delta method.
    ratio = weights.mean() ** 2 / np.mean(weights**2)
    influence = 2 * weights / weights.mean() - weights**2 / np.mean(weights**2)
    error = ratio * influence.std() / len(weights) ** 0.5
    assert abs(ratio - law.ess.value) < 5 * np.hypot(error, law.ess.error)
    # The spread over runs, to leading order in 1 / num.
    log_norms = np.logaddexp.reduce(log_weights.reshape(sets, num), axis=1) - np.log(num)
    centered = (log_norms - log_norms.mean()) ** 2
    error = centered.std() / sets**0.5 / (2 * log_norms.std())
    predicted = law.spread(num)
    beyond = predicted.value / num**0.5
    assert abs(log_norms.std() - predicted.value) < 5 * np.hypot(error, predicted.error) + beyond


def test_refusals_say_why():
    case = tj.problems.get("gaussian")
    weigh = lambda scale=1.0, field=DPS, **given: theory.weight_law(
        case.prior, case.reward, scale, field, **{"times": TIMES, **given}
    )
    with pytest.raises(TypeError, match="PlugInDraws"):
        weigh(field=theory.dps_denoiser)
    with pytest.raises(ValueError, match="eta > 0"):
        weigh(solver=tj.Ancestral(0.0))
    with pytest.raises(ValueError, match="complete only at t = 1"):
        weigh(times=TIMES[:-1])
    with pytest.raises(ValueError, match="outside of jit"):
        jax.jit(lambda scale: weigh(scale).ess.value)(1.0)
    with pytest.raises(ValueError, match="no finite mass"):
        theory.weight_law(case.prior, -1 * case.reward, 3.0, DPS, times=TIMES)
