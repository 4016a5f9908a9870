"""What objects print: in a few lines, of any leaves, and without an exception."""

import functools
import logging
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.contracts import (
    TARGET,
    all_guidances,
    all_posteriors,
    all_rewards,
    all_scales,
    all_solvers,
    gaussian,
    paths,
    planar,
)

import theory
import tiltjax as tj
from tiltjax import _repr
from tiltjax.particles import CAUSES, Failures, Mixing, Trace, unweighted
from tiltjax.weighted import SMC, potentials, proposals

MODEL = tj.Analytic(planar())
REWARD = tj.rewards.Quadratic([0.0, 2.5])
PLUG_IN = tj.PlugIn(tj.Glass(MODEL), REWARD, 3.0)
ANALYTIC = "Analytic(GaussianMixture of 2 in R^2)"
LOG_WEIGHTS = np.log([0.5, 0.25, 0.25])


class Banded(tj.rewards.Reward):
    """A reward of a user, with settings of other kinds."""

    dtype: np.dtype = eqx.field(static=True)
    bands: tuple = eqx.field(static=True)
    orders: list = eqx.field(static=True)


def velocity(params, t, x):
    return params["bias"] + x


def network(**options):
    params = {"weight": jnp.zeros((1000, 1000)), "bias": jnp.zeros(2), "count": jnp.zeros(9, int)}
    return tj.from_velocity(velocity, params, shape=(2,), **options)


def trace(failed=(), steps=4):
    flags = np.isin(np.arange(steps), failed)
    resampled = np.arange(steps) < 2
    return Trace(
        np.linspace(0, 1, steps + 1), Failures.of(shift=flags), None, np.arange(5.0, 5 + steps),
        np.ones(steps), resampled, np.arange(3),
    )  # fmt: skip


def weighted(**fields):
    return tj.Particles(jnp.zeros((3, 2)), jnp.asarray(LOG_WEIGHTS), jnp.asarray(-1.5), **fields)


EXACT = {
    "guidance": (
        PLUG_IN,
        f"PlugIn(Glass({ANALYTIC}, inner_steps=20), Quadratic([0, 2.5]), scale=3, k=1)",
    ),
    "wrapper": (
        tj.guidance.wrappers.Window(tj.dps(MODEL, REWARD), 0.2, 0.8),
        f"Window(PlugIn(Tweedie({ANALYTIC}), Quadratic([0, 2.5]), k=1), start=0.2, stop=0.8)",
    ),
    "scale law": (
        tj.PlugIn(tj.Exact(MODEL), tj.rewards.DoubleWell(), tj.Damped(3.0, 0.7), k=2),
        f"PlugIn(Exact({ANALYTIC}), DoubleWell(), scale=Damped(scale=3, sigma=0.7), k=2)",
    ),
    "constant": (tj.scales.Constant(3.0), "Constant(3)"),
    "sum": (
        2 * tj.rewards.Quadratic(TARGET, [2.0, 0.5]) - tj.rewards.LinearReward([1.0, 2.0]),
        "2 * Quadratic([0.5, 1], weight=[2, 0.5]) - 1 * LinearReward([1, 2])",
    ),
    "settings": (
        Banded(np.dtype("float32"), tuple(range(20)), [0.5, None]),
        "Banded(dtype=float32, bands=(0, 1, ..., 18, 19), orders=[0.5, None])",
    ),
    "scaled sum": (3 * (REWARD + REWARD), "3 * (Quadratic([0, 2.5]) + Quadratic([0, 2.5]))"),
    "function": (tj.rewards.as_reward(velocity), "velocity"),
    "model": (MODEL, f"{ANALYTIC} on Linear(), states (2,) float64"),
    "interpolant": (
        tj.Exact(tj.Analytic(planar(), tj.VP())),
        "Exact(Analytic(GaussianMixture of 2 in R^2, interpolant=VP()))",
    ),
    "tilted": (
        tj.Tilted(MODEL, REWARD, 3.0),
        f"Tilted({ANALYTIC}, natural=[0, 15], precision=6) on Linear(), states (2,) float64",
    ),
    "table": (tj.DiscreteVP([0.9, 0.5, 0.1]), "DiscreteVP(levels=3)"),
    "solver": (tj.Ancestral(0.5), "Ancestral(eta=0.5)"),
    "children": (proposals.Children(3), "Children(m=3)"),
    "schedule": (potentials.ResampleFractions(0.2, 0.5), "ResampleFractions(0.2, 0.5)"),
    "tokens": (
        tj.tokens.MarkovChain([0.5, 0.5], [[0.5, 0.5], [0.1, 0.9]], 8),
        "MarkovChain(length=8, vocab=2) on Masking(), states (8,) int32",
    ),
    "long vector": (
        tj.rewards.LinearReward(np.arange(100.0)),
        "LinearReward([0, 1, ..., 98, 99])",
    ),
    "image": (tj.rewards.Quadratic(np.zeros((8, 8, 3))), "Quadratic(float64[8,8,3])"),
    "unweighted": (
        unweighted(jnp.zeros((3, 2), jnp.bfloat16)),
        "Particles: 3 of shape (2,), bfloat16",
    ),
    "one state": (unweighted(jnp.zeros((3, 5), int)), "Particles: 3 of shape (5,), int64"),
    "weighted": (
        weighted(trace=trace(), log_prob=jnp.asarray([1.0, 2.0, 3.0]), mixing=Mixing(20, 0.125)),
        """
Particles: 3 of shape (2,), float64
effective sample size  2.667 of 3 (88.9%)
log Z                  -1.5
log_prob               1 to 3
mixing                 20 sweeps, correlation 0.12
initial particles      3 of 3 have descendants
trace                  4 steps from t = 0 to 1, resampling after 2 of 4 steps""",
    ),
    "trace": (
        trace(),
        """
Trace: 4 steps from t = 0 to 1
failures                      none
resampling                    after 2 of 4 steps
lowest effective sample size  5""",
    ),
    "failed": (
        Trace(np.linspace(0, 1, 5), Failures.of(shift=np.arange(4) > 1), jnp.zeros((5, 3, 2))),
        f"""
Trace: 4 steps from t = 0 to 1
failures    step 2 of 4, from t = 0.5: {CAUSES["shift"]}
trajectory  saved, (5, 3, 2)""",
    ),
    "tilt": (
        theory.Tilt(planar(), jnp.asarray(-6.5)),
        """
Tilt: GaussianMixture of 2 in R^2
log Z        -6.5
log-weights  [-1.204, -0.3567]""",
    ),
    "log h": (
        theory.log_h(planar(), REWARD, 3.0),
        "LogH(GaussianMixture of 2 in R^2, Quadratic([0, 2.5]), scale=3, interpolant=Linear())",
    ),
    "tilt on a grid": (
        theory.quadrature.GridTilt(
            *(planar(), REWARD, jnp.asarray(3.0), jnp.zeros((2500, 2)), jnp.zeros(2500)),
            *(jnp.ones(2), jnp.asarray(-6.5)),
        ),
        """
GridTilt: 2500 cells in R^2
log Z  -6.5""",
    ),
    "law of points": (
        theory.push_forward.PointLaw(planar(), jnp.zeros((8, 16, 2))),
        "PointLaw: 8 sets of 16 points in R^2",
    ),
    "law of tokens": (
        theory.tokens.TokenLaw(jnp.zeros((4, 2), int), jnp.ones(4) / 4, jnp.asarray(-0.5)),
        "TokenLaw: 4 sequences of length 2, log Z = -0.5",
    ),
    "training": (
        tj.training.Fit(None, None, tj.training.Curve(np.array([2.0, 0.5]), np.ones(2))),
        "Fit: NoneType, 2 steps, loss 2 to 0.5",
    ),
    "number": (tj.weighted._audit.Estimated(-1.25, 0.011), "-1.25 ± 0.011"),
}


@pytest.mark.parametrize("name", EXACT)
def test_what_is_printed(name):
    value, text = EXACT[name]
    assert repr(value) == text.lstrip()
    assert str(value) == text.lstrip()


@functools.cache
def everything():
    """Objects by name: all guidances, posteriors, rewards, scales, solvers, interpolants."""
    target = tj.rewards.Quadratic(TARGET)
    found = {name: make(MODEL, target, 1.5) for name, make in all_guidances().items()}
    found |= {name: make(MODEL) for name, make in all_posteriors().items()}
    found |= {f"scale {name}": make(2.0) for name, make in all_scales().items()}
    return found | all_rewards() | all_solvers() | paths()


@pytest.mark.parametrize("name", everything())
def test_one_line_of_anything(name, monkeypatch):
    value = everything()[name]
    text = value._text()  # `repr` would hide an exception
    assert repr(value) == text
    assert len(text) <= 300
    assert "\n" not in text
    # A placeholder in every leaf, as in JAX's own error messages.
    for leaf in (True, None, object(), jax.ShapeDtypeStruct((3,), jnp.float32)):
        assert len(repr(jax.tree.map(lambda _, leaf=leaf: leaf, value))) <= 300


def test_a_network_is_one_number():
    model = network(dtype=jnp.float32)
    made = "from_velocity(velocity of 1 M parameters"
    assert repr(model) == f"{made}) on Linear(), states (2,) float32"
    guidance = tj.PlugIn(tj.Glass(network(interpolant=tj.VP())), REWARD, 3.0)
    assert f"{made}, interpolant=VP())" in repr(guidance)
    assert len(repr(guidance)) <= 300
    assert repr(tj.rewards.as_reward(eqx.nn.MLP(2, "scalar", 3, 1, key=jax.random.key(0)))) == (
        "MLP of 13 parameters"
    )


@pytest.mark.parametrize(
    ("number", "text"),
    [(1, "1"), (999, "999"), (1000, "1 k"), (999_949, "999.9 k"), (999_950, "1 M"),
     (7_080_000, "7.1 M"), (11_900_000_000, "11.9 B"), (2e12, "2000 B")],
)  # fmt: skip
def test_counts_of_parameters(number, text):
    assert _repr._count(number) == text


def test_long_ones_are_cut():
    reward = sum(tj.rewards.LinearReward([float(i), 1.0]) for i in range(40))
    assert len(repr(reward)) <= 300
    assert " ... " in repr(reward)


def test_traced_and_vmapped():
    printed = []

    @jax.jit
    def inside(particles, guidance):
        printed.extend([repr(particles), repr(particles.trace), repr(guidance)])
        return particles.x

    single = weighted(trace=trace([2]))
    several = jax.tree.map(lambda *leaves: jnp.stack(leaves), single, single)
    inside(several, PLUG_IN)
    assert printed[:2] == [
        "Particles: 2 runs of 3 of shape (2,), float64\nlog Z  float64[2]\ntrace  4 steps",
        "Trace: 4 steps",
    ]
    assert "scale=float64[]" in printed[2]
    other = weighted(trace=trace([1]))
    other = eqx.tree_at(lambda p: p.log_weights, other, jnp.asarray([0.0, -jnp.inf, -jnp.inf]))
    several = jax.tree.map(lambda *leaves: jnp.stack(leaves), single, other)
    text = repr(several)
    assert "effective sample size  1 to 2.667 of 3 (33.3% to 88.9%)" in text
    assert f"in step 1 of 4, from t = 0.25: {CAUSES['shift']}" in text
    with pytest.raises(ValueError, match="several runs"):
        several.trace.check()
    batch = jax.vmap(lambda scale: tj.PlugIn(tj.Exact(MODEL), REWARD, scale))(jnp.arange(3.0))
    assert "scale=[0, 1, 2]" in repr(batch)


def test_keys_and_no_weight():
    keys = jax.random.split(jax.random.key(0), 5)
    assert repr(unweighted(keys)) == "Particles: 5 of shape (), key<fry>"
    nothing = tj.Particles(jnp.zeros((3, 2)), jnp.asarray([0.0, jnp.nan, -jnp.inf]))
    assert "effective sample size  nan of 3" in repr(nothing)
    assert repr(tj.Particles(jnp.zeros((3, 2)), jnp.full(3, -jnp.inf))) == (
        "Particles: 3 of shape (2,), float64"
    )


def test_a_deleted_array_is_not_read():
    particles = weighted()
    particles.log_weights.delete()
    assert repr(particles) == "Particles: 3 of shape (2,), float64\nlog Z  -1.5"


def test_nothing_is_compiled(caplog):
    particles, guidance = weighted(trace=trace()), PLUG_IN
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for value in (particles, particles.trace, guidance, MODEL):
            repr(value)
        particles._repr_html_()
    assert not [record for record in caplog.records if "ompil" in record.message]


def test_the_effective_sample_size_is_that_of_jax():
    np.testing.assert_allclose(
        tj.particles.effective_numpy(LOG_WEIGHTS), weighted().ess, rtol=1e-12
    )


def test_a_run_by_its_parts():
    run = SMC(MODEL, tj.Laplace(MODEL, REWARD, 3.0), num=100, steps=20, ess_threshold=0.3)
    assert repr(run).splitlines() == [
        "SMC: 100 particles, 20 steps, t = 0.001 to 1",
        f"model       {ANALYTIC}",
        f"guidance    Laplace({ANALYTIC}, Quadratic([0, 2.5]), scale=3)",
        "proposal    Guided()",
        "potential   Difference()",
        "solver      Ancestral()",
        "resampling  systematic, below 30% effective sample size, after 20 of 20 steps",
    ]


# --- tables


def audit_of(num=200):
    log_weights = np.random.default_rng(0).normal(size=num) / 4
    particles = tj.Particles(jnp.zeros((num, 2)), jnp.asarray(log_weights))
    return tj.weighted._audit.report(particles, np.zeros(num), "PlugIn on <Heun>")


def plan_of():
    option = theory.planner.Option("PlugIn(Glass(model, 20), reward, 3)", 12, 1380.0, 0.1234, "law")
    other = option._replace(method="dps<>", error=2.0)
    return theory.planner.Plan((option, other), gaussian([0.0], [[1.0]]), 1000.0)


def cells(page):
    return [re.sub("<.*?>", "", cell) for cell in re.findall("<t[hd].*?</t[hd]>", page)]


def test_a_table_holds_what_is_printed():
    for report in (weighted(trace=trace([1])), trace(), audit_of()):
        page = report._repr_html_()
        lines = repr(report).splitlines()
        assert page.count("<tr>") == len(lines) - 1
        assert page.count("<") == page.count(">")  # what is printed is escaped
        assert "http" not in page
        assert "color" not in page
    assert "PlugIn on &lt;Heun&gt;" in audit_of()._repr_html_()
    broken = jax.tree.map(lambda _: True, weighted())
    assert broken._repr_html_() == "Particles(...)"


def test_an_audit_prints_its_verdict_first():
    report = audit_of()
    lines = str(report).splitlines()
    assert lines[0] == report.verdict
    assert [line[:22].rstrip() for line in lines[1:]] == [
        "judged", "ESS fraction", "Pareto k of the tail", "log Z", "evidence bound", "path KL",
        "scale * reward",
    ]  # fmt: skip
    assert repr(report) == str(report)


def test_a_plan_is_a_table():
    lines = repr(plan_of()).splitlines()
    assert lines[0].split() == ["method", "steps", "calls", "W2", "basis"]
    assert lines[1] == "PlugIn(Glass(model, 20), reward, 3)     12     1380    0.1234   law"
    page = plan_of()._repr_html_()
    assert cells(page)[5:10] == [
        "PlugIn(Glass(model, 20), reward, 3)", "12", "1380", "0.1234", "law",
    ]  # fmt: skip
    assert "dps&lt;&gt;" in page
    assert "1000 denoiser calls" in page
