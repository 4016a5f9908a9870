"""`audit` against the closed forms of `theory.path_law`, and against weights whose tails are known.
Tier: statistical.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import theory
import tiltjax as tj

PRIOR, REWARD = tj.problems.get("gaussian").prior, tj.problems.get("gaussian").reward
MODEL = tj.Analytic(PRIOR)
MODULE = sys.modules["tiltjax.weighted._audit"]
STEPS = 25
GUIDANCES = {
    "plug-in": (
        lambda s: tj.PlugIn(tj.Exact(MODEL), REWARD, s),
        lambda s: theory.plug_in_field(PRIOR, REWARD, s),
    ),
    "damped": (
        lambda s: tj.PlugIn(tj.Exact(MODEL), REWARD, tj.Damped(s, 0.5**0.5)),
        lambda s: theory.plug_in_field(PRIOR, REWARD, tj.Damped(s, 0.5**0.5)),
    ),
    "dps": (lambda s: tj.dps(MODEL, REWARD, s), lambda s: theory.dps_field(PRIOR, REWARD, s)),
    "Laplace": (
        lambda s: tj.Laplace(MODEL, REWARD, s),
        lambda s: theory.doob_field(PRIOR, REWARD, s),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "eta"), [(name, 1.0) for name in GUIDANCES] + [("dps", 0.7)])
def test_the_report_is_the_path_law(name, eta):
    build, field = GUIDANCES[name]
    scale, num = 0.3, 20_000
    report = tj.audit(
        jax.random.key(0), MODEL, build(scale), num=num, steps=STEPS, solver=tj.Ancestral(eta)
    )
    law = theory.path_law(
        field(scale), times=jnp.linspace(1e-3, 1, STEPS + 1), solver=tj.Ancestral(eta)
    )
    for measured, exact in (
        (report.log_norm, law.log_norm),
        (report.evidence_bound, law.evidence_bound),
        (report.path_kl, law.kl),
    ):
        assert 0 < measured.error < 0.05
        assert abs(measured.value - float(exact)) < 4 * measured.error
    # The effective share: the delta method for the two means it is made of.
    weights = np.exp(np.asarray(report.particles.log_weights) - float(law.log_norm))
    influence = 2 * weights - float(law.ess) * weights**2
    error = float(law.ess) * np.std(influence) / np.sqrt(num)
    assert abs(report.ess_fraction - float(law.ess)) < 4 * error
    assert report.pareto_k < 0.5
    assert report.reliable
    tilt = theory.tilt(PRIOR, REWARD, scale)
    rewards = report.tilted_reward
    # Steps of 1/25 leave the chain's own tilt away from the continuous one: compare with room for
    # that.
    exact = scale * float(theory.expected_reward(tilt.mixture, REWARD))
    assert abs(rewards.value - exact) < 4 * rewards.error + 0.05


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plug-in", "dps"])
def test_a_tail_without_variance_is_told(name):
    build, field = GUIDANCES[name]
    law = theory.path_law(field(3.0), times=jnp.linspace(1e-3, 1, STEPS + 1))
    assert float(law.ess) == 0
    report = tj.audit(jax.random.key(1), MODEL, build(3.0), num=5000, steps=STEPS)
    assert report.pareto_k > 0.7
    assert not report.reliable
    assert report.verdict.startswith("Not known")
    assert "too heavy" in str(report)


def test_verdicts():
    good = tj.audit(jax.random.key(2), MODEL, tj.Laplace(MODEL, REWARD, 0.3), num=1000, steps=50)
    assert good.verdict.startswith("Tilting")
    fair, bad = (
        tj.audit(jax.random.key(3), MODEL, tj.dps(MODEL, REWARD, s), num=4000, steps=50)
        for s in (0.8, 1.3)
    )
    assert fair.verdict.startswith(f"Nearly: the effective sample size is {fair.ess_fraction:.0%},")
    assert bad.verdict.startswith(
        f"Not tilting: the effective sample size is {bad.ess_fraction:.1%},"
    )
    assert "use a damped scale" in bad.verdict
    text = str(good)
    for part in (
        "Laplace on Ancestral, 50 steps, 1000 particles",
        "ESS fraction",
        "path KL",
        "evidence bound",
        "log Z",
    ):
        assert part in text


@pytest.mark.slow
def test_a_guidance_without_log_h_is_audited_too():
    tilted = tj.guidance.toward(MODEL, tj.Tilted(MODEL, REWARD, 1.0), REWARD, 1.0)
    conjugate = tj.Conjugate(
        MODEL, lambda x: REWARD(x), 1.0, variance=tj.calibrate(jax.random.key(0), MODEL)
    )
    for guidance in (tilted, conjugate):
        report = tj.audit(jax.random.key(3), MODEL, guidance, num=2000, steps=50)
        assert report.ess_fraction > 0.5


@pytest.mark.parametrize("shape", [0.2, 0.6, 1.0])
def test_the_shape_of_a_pareto_tail(shape):
    # Weights that are exactly generalized Pareto: x = (u^-k - 1) / k.
    rng = np.random.default_rng(0)
    shapes = [
        MODULE.pareto_shape(np.log(np.expm1(-shape * np.log(rng.uniform(size=20_000))) / shape + 1))
        for _ in range(40)
    ]
    # The weak prior draws towards 1/2 with the weight of ten in some four hundred points.
    expected = (shape * 424 + 5) / 434
    assert abs(np.mean(shapes) - expected) < 4 * np.std(shapes) / np.sqrt(40) + 0.02


def test_light_and_flat_tails():
    rng = np.random.default_rng(1)
    assert MODULE.pareto_shape(np.log(rng.uniform(size=5000))) < 0
    assert MODULE.pareto_shape(0.1 * rng.normal(size=5000)) < 0.3
    assert MODULE.pareto_shape(np.zeros(1000)) == -np.inf
    with pytest.raises(ValueError, match="25 or more"):
        MODULE.pareto_shape(np.zeros(10))


def test_bad_input_says_what_to_do():
    guidance = tj.dps(MODEL, REWARD, 0.3)
    with pytest.raises(ValueError, match="100 particles or more"):
        tj.audit(jax.random.key(0), MODEL, guidance, num=10)
    with pytest.raises(ValueError, match="has none: use Ancestral"):
        tj.audit(jax.random.key(0), MODEL, guidance, num=100, solver=tj.Heun())
    with pytest.raises(ValueError, match="outside of jit"):
        jax.jit(lambda key: tj.audit(key, MODEL, guidance, num=100, steps=5).ess)(jax.random.key(0))
