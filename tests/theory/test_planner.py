"""`recommend`: costs are what the methods spend, and errors what the laws say. On a mixture they
are measured on points, with an error.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import theory
import tiltjax as tj

BUDGET = 3000  # for any number of draws or candidates

pytestmark = pytest.mark.optimized  # it runs for longer than it compiles


@pytest.fixture(scope="module")
def plan():
    problem = tj.problems.get("gaussian")
    return theory.recommend(problem.prior, problem.reward, problem.scale, BUDGET, inner_steps=5)


def named(plan, start):
    return next(option for option in plan.options if option.method.startswith(start))


@pytest.mark.slow
def test_options_are_within_the_budget_and_in_order(plan):
    errors = [option.error for option in plan.options]
    assert errors == sorted(errors)
    assert all(0 < option.cost <= BUDGET for option in plan.options)
    assert all(option.steps >= 1 and np.isfinite(option.error) for option in plan.options)
    assert plan.best is plan.options[0]
    assert plan.best.method == "Tilted(model, reward, 3)"
    for start in (
        "Conjugate",
        "Laplace",
        "PlugIn",
        "dps",
        "fmrg",
        "best_of_n",
        "softmax_of_n",
        "one of",
        "no guidance",
    ):
        assert named(plan, start)
    draws = [option.method for option in plan.options if "k=" in option.method]
    assert sorted(int(name.rstrip(")").split("k=")[1]) for name in draws) == [2, 8, 32]
    table = str(plan).splitlines()
    assert len(table) == len(plan.options) + 1
    assert table[1].startswith(plan.best.method)


@pytest.mark.slow
def test_an_error_is_the_distance_of_the_law_at_these_steps(plan):
    problem = tj.problems.get("gaussian")
    tilt = theory.tilt(problem.prior, problem.reward, problem.scale).mixture
    fields = {"dps": theory.dps_field, "Tilted": theory.doob_field}
    for start, field in fields.items():
        option = named(plan, start)
        times = jnp.linspace(1e-3, 1, option.steps + 1)
        law = theory.discrete_law(field(problem.prior, problem.reward, problem.scale), times=times)
        square = theory.bures(law.means[0], law.covs[0], tilt.means[0], tilt.covs[0])
        np.testing.assert_allclose(option.error, np.sqrt(square), rtol=1e-6)
    best = named(plan, "best_of_n")
    n = int(best.method.rstrip(")").split()[-1])
    times = jnp.linspace(1e-3, 1, best.steps + 1)
    base = theory.discrete_law(theory.dps_field(problem.prior, problem.reward, 0.0), times=times)
    selected = theory.best_of_n(base, problem.reward, n).mixture()
    square = theory.bures(selected.means[0], selected.covs[0], tilt.means[0], tilt.covs[0])
    np.testing.assert_allclose(best.error, np.sqrt(square), rtol=1e-6)


def counted_calls(build):
    """Denoiser calls and pullbacks through them in one evaluation of a guidance; k draws that are
    made side by side count once.
    """
    calls, pullbacks = [], []

    @jax.custom_vjp
    def denoise(x, t):
        calls.append(t)
        return x / (1 + t)

    def forward(x, t):
        return denoise(x, t), t

    def backward(t, cotangent):
        pullbacks.append(t)
        return cotangent / (1 + t), jnp.zeros_like(t)

    denoise.defvjp(forward, backward)
    model = tj.from_denoiser(lambda t, x: denoise(x, t), shape=(2,), dtype=jnp.float64)
    guidance = build(model)
    with jax.disable_jit():
        x = jnp.array([0.3, -0.2])
        guidance(jax.random.key(0), jnp.asarray(0.4), x, guidance.init(x))
    return len(calls), len(pullbacks)


@pytest.mark.slow
def test_costs_are_what_guidances_spend(plan):
    reward = tj.rewards.Quadratic([0.5, 0.2])
    inner = 3
    for k in (1, 4):
        assert counted_calls(lambda m, k=k: tj.PlugIn(tj.Glass(m, inner), reward, 1.0, k=k)) == (
            inner,
            inner,
        )
    assert counted_calls(lambda m: tj.dps(m, reward, 1.0)) == (1, 1)
    assert counted_calls(lambda m: tj.fmrg(m, reward, 1.0, inner_steps=inner)) == (
        2 * inner + 2,
        2 * inner + 1,
    )
    # Those of the plan: five inner steps, two calls a pullback.
    for start, cost in {
        "PlugIn(Glass(model, 5), reward, 3)": 3 * 5,
        "dps": 1 + 2,
        "fmrg": 12 + 2 * 11,
        "Laplace": 1 + 2 * 2,
    }.items():
        option = named(plan, start)
        assert option.cost == (2 * option.steps - 1) * cost


@pytest.mark.slow
def test_without_conjugate_rewards_the_prediction_falls_back():
    prior = tj.GaussianMixture([1.0], [[0.0]], [[[1.0]]])
    plan = theory.recommend(prior, tj.rewards.Quadratic([1.0]), 0.5, 40, conjugate=False)
    assert not any(option.method.startswith("Tilted") for option in plan.options)
    assert plan.best.method.startswith(("Conjugate", "Laplace"))
    linear = theory.recommend(prior, tj.rewards.LinearReward([1.0]), 0.5, 30)
    assert linear.best.method.startswith("Tilted")
    one = theory.recommend(prior, tj.rewards.Quadratic([1.0]), 0.5, 1)
    assert {option.cost for option in one.options} == {1.0}


@pytest.mark.slow
def test_convex_rewards_leave_the_methods_that_need_no_concave_one():
    prior = tj.GaussianMixture([1.0], [[0.0]], [[[1.0]]])
    plan = theory.recommend(prior, tj.rewards.Quadratic([1.0], -0.1), 1.0, 3, inner_steps=1)
    found = {option.method.split("(")[0] for option in plan.options}
    assert found == {"no guidance", "PlugIn", "dps", "best_of_n", "softmax_of_n"}
    assert not any("Damped" in option.method for option in plan.options)


@pytest.mark.nightly
def test_methods_without_a_prediction_are_left_out():
    # k draws at a strength beyond that of the law of many draws.
    line = tj.GaussianMixture([1.0], [[0.0]], [[[1.0]]])
    methods = lambda prior, scale, budget: [
        option.method
        for option in theory.recommend(
            prior, tj.rewards.Quadratic(jnp.ones(prior.dim)), scale, budget, inner_steps=1
        ).options
    ]
    assert any("k=2" in method for method in methods(line, 3.0, 24))
    assert not any("k=" in method for method in methods(line, 3e4, 24))
    # Weighted paths whose weights have no variance.
    wide = tj.GaussianMixture([1.0], [[0.0, 0.0]], [np.diag([0.1, 10.0])])
    assert any("weighted" in method for method in methods(wide, 0.01, 80))
    assert not any("weighted" in method for method in methods(wide, 50.0, 80))


@pytest.mark.slow
def test_mixtures_and_anisotropic_rewards():
    problem = tj.problems.get("quadratic")
    reward = tj.rewards.Quadratic([0.5, 1.5], weight=np.diag([2.0, 0.5]))
    plan = theory.recommend(problem.prior, reward, 1.0, 60, inner_steps=5)
    assert not any(option.method.startswith("Tilted") for option in plan.options)
    assert {option.basis for option in plan.options} == {"points at these steps"}
    for option in plan.options:
        found = option.law.wasserstein(theory.tilt(problem.prior, reward, 1.0))
        # Other points of the tilt.
        assert abs(found.value - option.error) < 5 * (found.error + option.spread)
        assert option.spread > 0
    methods = [option.method for option in plan.options]
    assert sum("PlugIn" in method for method in methods) == 3  # k = 1, damped or not, and k = 2
    assert "±" in str(plan).splitlines()[1]
    assert not any("weighted" in method for method in methods)  # fewer than two
    one_call = theory.recommend(problem.prior, reward, 1.0, 1, inner_steps=5)
    assert [option.method for option in one_call.options] == ["no guidance"]


@pytest.mark.slow
def test_weighted_paths_on_a_mixture():
    """One of n is chosen by weight: the law is that of weighted runs in groups of n."""
    problem = tj.problems.get("quadratic")
    plan = theory.recommend(problem.prior, problem.reward, 0.3, 260, inner_steps=5)
    options = {o.method: o for o in plan.options if o.method.startswith("one of")}
    assert set(options) == {
        "one of 3 weighted paths, Conjugate(model, reward, 0.3)",
        "one of 2 weighted paths, Laplace(model, reward, 0.3)",
        "one of 3 weighted paths, dps(model, reward, 0.3)",
    }
    model = tj.Analytic(problem.prior)
    particles = tj.smc(
        jax.random.key(0), model, tj.dps(model, problem.reward, 0.3), num=30_000, steps=25,
        ess_threshold=0,
    )  # fmt: skip
    chosen = jax.random.categorical(jax.random.key(1), particles.log_weights.reshape(-1, 3))
    x = particles.x.reshape(-1, 3, 2)[jnp.arange(len(chosen)), chosen]
    option = options["one of 3 weighted paths, dps(model, reward, 0.3)"]
    law, error = option.law, np.asarray(option.law.error()[0])
    error = np.hypot(error, np.std(x, axis=0) / len(x) ** 0.5)
    assert np.all(np.abs(law.mean() - np.mean(x, axis=0)) < 5 * error)
    assert option.cost == 3 * 25 * 3


@pytest.mark.nightly
def test_the_least_k_that_beats_one_damped_draw():
    prior, reward = tj.GaussianMixture([1.0], [[0.0]], [[[0.5]]]), tj.rewards.Quadratic([2.5])
    law = tj.Damped(3.0, 0.3)
    k = theory.matching_k(prior, reward, law, maximum=32)
    tilt = theory.tilt(prior, reward, 3.0).mixture
    damped_distance = theory.plug_in_law(prior, reward, law)
    distance = lambda mean, cov: float(theory.bures(mean, cov, tilt.means[0], tilt.covs[0]))
    damped_distance = distance(damped_distance.means[0], damped_distance.covs[0])
    before, after = (theory.plug_in_law(prior, reward, 3.0, k=n) for n in (k - 1, k))
    assert (
        distance(after.mean(), after.cov())
        < damped_distance
        <= distance(before.mean(), before.cov())
    )
    assert theory.matching_k(prior, reward, tj.Damped(3.0, 0.5**0.5), maximum=8) is None
    # Damping by far too large a width is worse than none.
    assert theory.matching_k(prior, reward, tj.Damped(0.01, 10.0), maximum=8) == 1
    # Little is worth two draws, and a search that starts at one must end there.
    assert theory.matching_k(prior, reward, tj.Damped(3.0, 0.05), maximum=8) in (1, 2)


def test_bad_input_says_what_to_use():
    problem = tj.problems.get("gaussian")
    plan_of = lambda reward=problem.reward, scale=1.0, budget=10, **kw: theory.recommend(
        problem.prior, reward, scale, budget, **kw
    )
    with pytest.raises(ValueError, match=r"budget must lie in \[1, inf\), got 0\.5"):
        plan_of(budget=0.5)
    with pytest.raises(ValueError, match="tilt by the reward Bump has no closed form"):
        plan_of(reward=tj.rewards.Bump([0.0, 0.0], 1.0))
    with pytest.raises(ValueError, match="pullback must lie in"):
        plan_of(pullback=-1.0)
    with pytest.raises(ValueError, match="inner"):
        plan_of(inner_steps=0)
    with pytest.raises(ValueError, match="outside of jit"):
        jax.jit(lambda scale: plan_of(scale=scale).best.error)(1.0)
    with pytest.raises(TypeError, match="Damped"):
        theory.matching_k(problem.prior, problem.reward, tj.scales.Constant(1.0))


@pytest.mark.slow
def test_a_flow_whose_steps_overflow_has_an_infinite_error():
    prior = tj.GaussianMixture([1.0], [[0.0]], [[[1.0]]])
    plan = theory.recommend(prior, tj.rewards.Quadratic([1.0]), 3e4, 1100, inner_steps=1)
    errors = np.asarray([option.error for option in plan.options])
    assert not np.any(np.isnan(errors))
    assert np.isinf(errors).any()
    assert errors[0] == errors.min() < 0.1
