"""Models of tokens: the denoiser against enumeration, the law of what is sampled, unbiased weights,
errors that say what to do.

The truth is `theory.token_tilt`. Particles of one run depend on each other and their weighted means
are biased; what has the right expectation is `exp(log_norm)` times the weight in a class of states,
`Z` times its probability, over independent runs.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import theory
import tiltjax as tj
from theory import tokens
from tiltjax.tokens import Reveal
from tiltjax.weighted import potentials, proposals, tempering

INITIAL, LENGTH, VOCAB, SCALE = np.asarray([0.5, 0.3, 0.2]), 4, 3, 0.8
TRANSITION = np.asarray([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.3, 0.1, 0.6]])
MODEL = tj.tokens.MarkovChain(INITIAL, TRANSITION, LENGTH)
LEVEL = 0.01
FEW = {"schedule": tj.weighted.potentials.ResampleSchedule(2)}


def reward(x):
    return jnp.sum(x == 1).astype(float) - 0.5 * jnp.where(x[0] == x[-1], 1.0, 0.0)


TRUTH = theory.token_tilt(MODEL, reward, SCALE)
PRIOR = theory.token_tilt(MODEL, reward, 0.0)
# Classes of states: the reward's value, and whether the first token is the second kind.
_, CLASS = np.unique(
    np.stack(
        [np.asarray(jax.vmap(reward)(TRUTH.states)).round(), np.asarray(TRUTH.states[:, 0] == 1)], 1
    ),
    axis=0,
    return_inverse=True,
)
CLASSES = int(CLASS.max()) + 1


def chi_square(states, law):
    """The p-value of independent draws under an enumerated law; states expected less than five
    times are one class.
    """
    counts = np.bincount(np.asarray(jax.vmap(law.index)(states)), minlength=len(law.probs))
    expected = np.asarray(law.probs) * len(states)
    rare = expected < 5
    pool = lambda values: np.append(values[~rare], values[rare].sum()) if rare.any() else values
    keep = pool(expected) > 0
    return stats.chisquare(pool(counts)[keep], pool(expected)[keep]).pvalue


def unbiased(runs, num, model=MODEL, truth=TRUTH, seed=0, **settings):
    """The p-value of `E[exp(log_norm) weight of a class] = Z P(class)` by Hotelling's T^2, and the
    mean of `exp(log_norm) / Z` with its error.
    """
    guidance = tj.tokens.Completions(
        model, reward, SCALE, k=settings.pop("k", 3), proposal_weight=settings.pop("lean", 0.0)
    )
    classes = jnp.asarray(CLASS, jnp.int32)

    def one(key):
        particles = tj.smc(key, model, guidance, num=num, **settings)
        weights = jnp.exp(particles.log_norm - truth.log_norm) * particles.weights
        return jax.ops.segment_sum(weights, classes[jax.vmap(truth.index)(particles.x)], CLASSES)

    found = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(seed), runs)))
    expected = np.bincount(CLASS, np.asarray(truth.probs), CLASSES)
    off, spread = found.mean(0) - expected, np.cov(found.T) / runs
    square = off @ np.linalg.solve(spread, off)
    total = found.sum(1)
    p = stats.f.sf(square * (runs - CLASSES) / (CLASSES * (runs - 1)), CLASSES, runs - CLASSES)
    return p, total.mean(), total.std(ddof=1) / math.sqrt(runs)


# The denoiser.


def test_the_denoiser_is_enumeration_for_all_patterns():
    length = 3
    model = tj.tokens.MarkovChain(INITIAL, TRANSITION, length)
    prior = theory.token_tilt(model, lambda x: jnp.zeros(()))
    patterns = np.asarray(list(itertools.product(range(VOCAB + 1), repeat=length)))
    found = np.asarray(
        jax.vmap(lambda x: model.denoise(jnp.asarray(0.3), x))(jnp.asarray(patterns, jnp.int32))
    )
    states, probs = np.asarray(prior.states), np.asarray(prior.probs)
    for x, law in zip(patterns, found, strict=True):
        weight = probs * np.all((states == x) | (x == VOCAB), axis=1)
        truth = [[weight[states[:, i] == v].sum() for v in range(VOCAB)] for i in range(length)]
        np.testing.assert_allclose(law, np.asarray(truth) / weight.sum(), atol=1e-12)


def test_a_chain_that_cannot_go_everywhere():
    model = tj.tokens.MarkovChain(
        [0, 1, 1], [[0, 1, 0], [0, 0, 2], [3, 0, 0]], 5, prompt=[3, 3, 0, 3, 3]
    )
    np.testing.assert_array_equal(
        tj.sample(jax.random.key(0), model, num=50).x, np.tile([1, 2, 0, 1, 2], (50, 1))
    )


# Sampling.


def test_one_at_a_time_is_exact():
    particles = tj.sample(jax.random.key(0), MODEL, num=20_000)
    assert particles.x.dtype == jnp.int32
    assert chi_square(particles.x, PRIOR) > LEVEL


def test_all_at_once_is_the_product_of_marginals():
    x = tj.sample(jax.random.key(1), MODEL, num=20_000, steps=1).x
    product = tokens.independent(PRIOR, VOCAB)
    assert chi_square(x, product) > LEVEL
    assert 0.5 * np.abs(np.asarray(product.probs - PRIOR.probs)).sum() == pytest.approx(
        0.380, abs=1e-3
    )
    assert chi_square(x, PRIOR) < 1e-12


def test_random_numbers_of_tokens_are_biased_towards_independence():
    # Two tokens in two steps fall into the same one half of the time, and are independent then.
    model = tj.tokens.MarkovChain(INITIAL, TRANSITION, 2)
    exact = theory.token_tilt(model, lambda x: jnp.zeros(()))
    mixed = exact._replace(probs=(exact.probs + tokens.independent(exact, VOCAB).probs) / 2)
    x = tj.sample(
        jax.random.key(2), model, num=20_000, steps=2, solver=tj.tokens.Unmask(even=False)
    ).x
    assert chi_square(x, mixed) > LEVEL
    assert chi_square(x, exact) < 1e-12
    assert chi_square(tj.sample(jax.random.key(2), model, num=20_000, steps=2).x, exact) > LEVEL


@pytest.mark.parametrize("steps", [3, 4, 7, 8])
def test_every_step_shows_its_fraction(steps):
    path = np.asarray(
        tj.sample(
            jax.random.key(3), MODEL, num=3000, steps=steps, save_trajectory=True
        ).trace.trajectory
    )
    shown = (path != VOCAB).sum(-1)
    assert np.all(np.diff(shown, axis=0) >= 0)
    assert np.all(shown[-1] == LENGTH)
    # What is shown stays.
    assert np.all((path[1:] == path[:-1]) | (path[:-1] == VOCAB))
    expected = LENGTH * np.arange(steps + 1) / steps
    error = shown.std(axis=1) / math.sqrt(shown.shape[1])
    assert np.all(np.abs(shown.mean(1) - expected) <= 5 * error + 1e-12)
    if LENGTH % steps == 0 or steps == LENGTH:
        assert np.all(shown == expected[:, None])


def test_prompts_are_kept_and_conditioned_on():
    prompt = [VOCAB, 2, VOCAB, VOCAB]
    model = tj.tokens.MarkovChain(INITIAL, TRANSITION, LENGTH, prompt=prompt)
    x = tj.sample(jax.random.key(4), model, num=20_000).x
    assert np.all(np.asarray(x)[:, 1] == 2)
    law = theory.token_tilt(model, reward, 0.0)  # given the prompt of the model
    assert chi_square(x, law) > LEVEL
    # As an argument of a compiled program.
    run = jax.jit(
        lambda prompt: (
            tj.sample(
                jax.random.key(4),
                tj.tokens.MarkovChain(INITIAL, TRANSITION, LENGTH, prompt=prompt),
                num=9,
            ).x
        )
    )
    assert np.all(np.asarray(run(jnp.asarray(prompt)))[:, 1] == 2)


# Steering.

ROWS = {
    "difference": {"num": 8, "runs": 2000},
    "difference, many": {"num": 1000, "runs": 40},
    "max": {"num": 16, "runs": 2000, "potential": potentials.Max(), **FEW},
    "sum": {"num": 16, "runs": 2000, "potential": potentials.Sum(), **FEW},
    "immediate": {"num": 16, "runs": 2000, "potential": potentials.Immediate(), **FEW},
    "lean": {"num": 8, "runs": 4000, "lean": 0.5, "proposal": proposals.Guided()},
    "lean, unresampled": {
        "num": 8,
        "runs": 2000,
        "lean": 0.3,
        "proposal": proposals.Guided(),
        "ess_threshold": 0.0,
    },
    "children": {"num": 8, "runs": 2000, "proposal": proposals.Children(2)},
    "children of lean": {
        "num": 8,
        "runs": 2000,
        "lean": 0.3,
        "proposal": proposals.Children(2, proposals.Guided()),
    },
    "tempered": {"num": 8, "runs": 2000, "tempering": tempering.Exponential(1.0)},
    "one particle": {"num": 1, "runs": 8000, "lean": 0.5, "proposal": proposals.Guided()},
}


def _row(name):
    quick = name in ("difference", "lean, unresampled")
    return pytest.param(name, marks=[] if quick else pytest.mark.slow)


@pytest.mark.parametrize("name", [_row(name) for name in ROWS])
def test_weights_are_unbiased_for_every_class_of_states(name):
    settings = {"proposal": proposals.Base(), "ess_threshold": 1.0} | ROWS[name]
    p, ratio, error = unbiased(settings.pop("runs"), settings.pop("num"), **settings)
    assert error < 0.04
    assert abs(ratio - 1) < 4 * error
    assert p > LEVEL


def test_weights_that_forget_the_proposal_are_found():
    class Forgetful(Reveal):
        def propose(self, key, x, denoised, shift):
            return super().propose(key, x, denoised, shift)[0], jnp.zeros((), denoised.dtype)

    class Careless(tj.tokens.Unmask):
        def kernel(self, interpolant, t, u):
            return Forgetful(*super().kernel(interpolant, t, u))

    p, ratio, error = unbiased(2000, 8, lean=0.5, proposal=proposals.Guided(), solver=Careless())
    assert p < 1e-6
    assert abs(ratio - 1) > 6 * error


def test_steps_of_several_tokens_tilt_the_law_of_such_steps():
    truth = theory.token_tilt(MODEL, reward, SCALE)
    product = tokens.independent(PRIOR, VOCAB)
    weight = np.asarray(product.probs) * np.exp(
        SCALE * np.asarray(jax.vmap(reward)(product.states))
    )
    truth = truth._replace(probs=jnp.asarray(weight / weight.sum()), log_norm=jnp.log(weight.sum()))
    p, ratio, error = unbiased(2000, 8, truth=truth, steps=1, lean=0.5, proposal=proposals.Guided())
    assert p > LEVEL
    assert abs(ratio - 1) < 4 * error


@pytest.mark.slow
def test_many_particles_are_the_tilt():
    guidance = tj.tokens.Completions(MODEL, reward, SCALE, k=8, proposal_weight=0.5)
    runs = [tj.smc(jax.random.key(i), MODEL, guidance, num=1000) for i in range(2)]
    for particles in runs:
        assert abs(float(particles.log_norm - TRUTH.log_norm)) < 0.02 + 4 / math.sqrt(
            float(particles.ess)
        )
        mean, error = float(particles.mean(reward)), float(particles.standard_error(reward))
        assert error < 0.1
        assert abs(mean - float(TRUTH.expect(reward))) < 5 * error
    mean = np.mean([np.exp(float(p.log_norm - TRUTH.log_norm)) for p in runs])
    assert abs(np.log(mean)) < 0.05


def test_completions_know_h_on_average():
    guidance = tj.tokens.Completions(MODEL, reward, SCALE, k=2000, proposal_weight=0.25)
    # One token hidden: positions drawn by themselves are the law itself.
    x = jnp.asarray([0, 1, VOCAB, 0], jnp.int32)
    estimate, _ = guidance(jax.random.key(0), jnp.asarray(0.5), x, ())
    assert abs(float(estimate.log_h - theory.token_log_h(MODEL, reward, SCALE, x))) < 0.1
    law = theory.token_tilt(MODEL, reward, SCALE, prompt=x)
    tilted = np.asarray(tokens.token_marginals(law, VOCAB))
    mixture = 0.75 * np.asarray(estimate.denoised) + 0.25 * tilted
    np.testing.assert_allclose(estimate.tilted, mixture, atol=0.25 * 5 * 0.5 / math.sqrt(1000))
    # Complete: nothing is left to know.
    x = jnp.asarray([0, 1, 2, 0], jnp.int32)
    estimate, _ = guidance(jax.random.key(0), jnp.asarray(1.0), x, ())
    np.testing.assert_allclose(estimate.log_h, SCALE * reward(x), atol=1e-12)
    np.testing.assert_allclose(estimate.tilted, jax.nn.one_hot(x, VOCAB), atol=1e-12)


@pytest.mark.slow
def test_a_tilted_chain_as_a_drift():
    """Any guidance with a denoiser of its own proposes; where it is that of the tilt only the last
    token, which is not guided, is weighed.
    """
    single, length = np.asarray([0.0, 1.0, -0.5]), 3
    weigh = lambda x: jnp.sum(jnp.asarray(single)[x])
    model = tj.tokens.MarkovChain(INITIAL, TRANSITION, length)
    law = theory.token_tilt(model, weigh, SCALE)
    # By a reward of the first token the tilt is a chain with another start.
    first = lambda x: jnp.asarray(single)[x[0]]
    drift = tj.tokens.MarkovChain(INITIAL * np.exp(SCALE * single), TRANSITION, length)
    for reward, truth, share in (
        (first, theory.token_tilt(model, first, SCALE), 0.85),
        (weigh, law, 0.3),
    ):
        particles = tj.smc(
            jax.random.key(0),
            model,
            tj.guidance.toward(model, drift, reward, SCALE),
            num=4000,
            ess_threshold=0.0,
        )
        ratio = np.exp(np.asarray(particles.log_weights - truth.log_norm))
        assert abs(ratio.mean() - 1) < 5 * ratio.std() / math.sqrt(len(ratio))
        assert float(particles.ess) > share * len(ratio)


@pytest.mark.slow
def test_exclusions_and_failures_are_told():
    barred = tj.tokens.Completions(
        MODEL, lambda x: jnp.where(x[0] == 1, 0.0, -jnp.inf), proposal_weight=0.5
    )
    particles = tj.smc(jax.random.key(0), MODEL, barred, num=2000)
    np.testing.assert_allclose(particles.mean(lambda x: x[0] == 1), 1)
    assert abs(float(particles.log_norm) - math.log(0.3)) < 0.15
    with pytest.raises(FloatingPointError, match="no particle has a weight"):
        tj.smc(
            jax.random.key(0),
            MODEL,
            tj.tokens.Completions(MODEL, lambda x: jnp.full((), -jnp.inf)),
            num=8,
        )
    with pytest.raises(FloatingPointError, match="the reward's value"):
        tj.smc(
            jax.random.key(0),
            MODEL,
            tj.tokens.Completions(MODEL, lambda x: jnp.full((), jnp.nan)),
            num=8,
        )
    broken = tj.tokens.from_logits(
        lambda t, x: jnp.full((LENGTH, VOCAB), jnp.nan), length=LENGTH, vocab=VOCAB
    )
    with pytest.raises(FloatingPointError, match="the model's denoiser"):
        tj.sample(jax.random.key(0), broken, num=8)


# Networks.


def network(chain, t, x):
    return jnp.log(chain.predict(x))


@pytest.mark.slow
def test_a_network_is_what_it_predicts_batched_or_not():
    build = {
        "single": tj.tokens.from_logits(network, MODEL, length=LENGTH, vocab=VOCAB),
        "batched": tj.tokens.from_logits(
            jax.vmap(network, (None, 0, 0)), MODEL, length=LENGTH, vocab=VOCAB, batched=True
        ),
    }
    truth = tj.sample(jax.random.key(0), MODEL, num=40).x
    weighed = {}
    for name, model in build.items():
        np.testing.assert_array_equal(tj.sample(jax.random.key(0), model, num=40).x, truth)
        guidance = tj.tokens.Completions(model, reward, SCALE, proposal_weight=0.5)
        weighed[name] = tj.smc(jax.random.key(1), model, guidance, num=40, ess_threshold=1.0)
    np.testing.assert_array_equal(weighed["single"].x, weighed["batched"].x)
    np.testing.assert_allclose(
        weighed["single"].log_weights, weighed["batched"].log_weights, atol=1e-10
    )
    in_parts = tj.smc(
        jax.random.key(1),
        model,
        tj.tokens.Completions(model, reward, SCALE, proposal_weight=0.5),
        num=40,
        ess_threshold=1.0,
        chunk_size=7,
    )
    np.testing.assert_array_equal(in_parts.x, weighed["batched"].x)


def test_a_networks_time_is_the_fraction_shown():
    net = lambda t, x: jnp.stack([jnp.zeros(4), jnp.full(4, 1.0) * t], axis=1)
    model = tj.tokens.from_logits(net, length=4, vocab=2)
    law = model.denoise(jnp.asarray(0.9), jnp.asarray([2, 0, 1, 2], jnp.int32))
    np.testing.assert_allclose(law[0, 1], 1 / (1 + math.exp(-0.5)), atol=1e-12)
    np.testing.assert_array_equal(law[1:3], np.eye(2))


def test_single_precision_in_a_double_world():
    zeros = lambda t, x: jnp.zeros((4, 3), jnp.float32)
    model = tj.tokens.from_logits(zeros, length=4, vocab=3, dtype=jnp.float32)
    guidance = tj.tokens.Completions(
        model, lambda x: jnp.sum(x == 1).astype(jnp.float32), 0.5, proposal_weight=0.2
    )
    particles = tj.smc(jax.random.key(0), model, guidance, num=16)
    assert particles.x.dtype == jnp.int32
    assert particles.log_weights.dtype == particles.log_norm.dtype == jnp.float32


# What else takes particles.


@pytest.mark.slow
def test_the_other_verbs_take_tokens(tmp_path):
    guidance = tj.tokens.Completions(MODEL, reward, SCALE, proposal_weight=0.5)
    particles = tj.smc(jax.random.key(0), MODEL, guidance, num=200)
    particles.save(tmp_path / "tokens.npz")
    again = tj.Particles.load(tmp_path / "tokens.npz")
    np.testing.assert_array_equal(again.x, particles.x)
    assert again.x.dtype == jnp.int32
    np.testing.assert_allclose(again.log_norm, particles.log_norm)
    assert particles.mean().shape == (LENGTH,)
    report = tj.audit(jax.random.key(1), MODEL, guidance, num=2000)
    assert abs(report.log_norm.value - float(TRUTH.log_norm)) < 5 * report.log_norm.error
    assert (
        abs(report.tilted_reward.value - SCALE * float(TRUTH.expect(reward)))
        < 5 * report.tilted_reward.error
    )
    base = tj.sample(jax.random.key(2), MODEL, num=64_000)
    values = jax.vmap(reward)(tj.softmax_of_n(jax.random.key(3), base, reward, 32, SCALE).x)
    bias = 1 / 32  # of order 1/n
    assert (
        abs(float(values.mean() - TRUTH.expect(reward)))
        < 5 * float(values.std()) / math.sqrt(2000) + 2 * bias
    )
    assert float(jax.vmap(reward)(tj.best_of_n(base, reward, 32).x).mean()) > float(values.mean())


# Errors.


def test_what_has_no_meaning_for_tokens_is_refused():
    gaussian = tj.Analytic(tj.GaussianMixture([1.0], [[0.0]], [[[1.0]]]))
    sample = lambda guidance=None, model=MODEL, **kw: tj.sample(
        jax.random.key(0), model, guidance, num=4, **kw
    )
    with pytest.raises(ValueError, match=r"MarkovChain has Masking: use Unmask\(\)"):
        sample(solver=tj.Heun())
    with pytest.raises(ValueError, match=r"Analytic has Linear: use Heun\(\)"):
        sample(model=gaussian, solver=tj.tokens.Unmask())
    for build in (
        lambda: tj.dps(MODEL, reward, 1.0),
        lambda: tj.PlugIn(tj.Glass(MODEL), reward, 1.0),
        lambda: tj.PlugIn(tj.posteriors.Renoise(MODEL, 2.0), reward, tj.Damped(1.0, 1.0)),
        lambda: tj.fmrg(MODEL, reward, 1.0),
        lambda: tj.Tilted(MODEL, tj.rewards.LinearReward(np.ones(4)), 1.0),
        lambda: tj.models.Rescheduled(MODEL),
        lambda: tj.flow(MODEL, jnp.zeros(4), 0.1, 0.9),
    ):
        with pytest.raises(TypeError, match="must be a Model, got MarkovChain"):
            build()
    with pytest.raises(ValueError, match=r"no score.*use the proposal Guided"):
        tj.smc(
            jax.random.key(0),
            MODEL,
            tj.tokens.Completions(MODEL, reward),
            num=4,
            proposal=proposals.Shifted(),
        )
    completions = tj.tokens.Completions(MODEL, reward)
    for wrapper in (tj.guidance.Clipped, tj.guidance.Normalized, tj.guidance.GainCapped):
        with pytest.raises(ValueError, match="states of MarkovChain have none: use Window"):
            wrapper(completions, 1.0)
    for method in (tj.das, tj.tds):
        with pytest.raises(TypeError, match=r"MarkovChain have no gradient.*guide=.*Completions"):
            method(jax.random.key(0), MODEL, reward, num=4)


def test_bad_input_says_what_to_do():
    with pytest.raises(ValueError, match="prompt must hold 4 integers, 3 where a token is hidden"):
        tj.tokens.MarkovChain(INITIAL, TRANSITION, LENGTH, prompt=[0, 1])
    with pytest.raises(ValueError, match="prompt must hold 4 integers"):
        tj.tokens.MarkovChain(INITIAL, TRANSITION, LENGTH, prompt=[0.0, 1, 2, 3])
    for prompt in ([0, 1, 2, 4], [-1, 1, 2, 3]):
        with pytest.raises(ValueError, match="integers from 0 to 2, and 3 for a hidden"):
            tj.tokens.MarkovChain(INITIAL, TRANSITION, LENGTH, prompt=prompt)
    with pytest.raises(ValueError, match="transition must have shape"):
        tj.tokens.MarkovChain(INITIAL, np.eye(2), LENGTH)
    for initial, transition in (
        ([0.5, -0.5], np.eye(2)),
        ([0, 0], np.eye(2)),
        ([1, 1], [[1, 0], [0, 0]]),
    ):
        with pytest.raises(ValueError, match=r"nonnegative.*positive sum"):
            tj.tokens.MarkovChain(initial, transition, LENGTH)
    with pytest.raises(ValueError, match="at least one token"):
        tj.tokens.MarkovChain([], np.zeros((0, 0)), LENGTH)
    with pytest.raises(ValueError, match=r"proposal_weight must lie in \[0, 1\)"):
        tj.tokens.Completions(MODEL, reward, proposal_weight=1.0)
    with pytest.raises(TypeError, match="a model of tokens: MarkovChain or from_logits"):
        tj.tokens.Completions(tj.Analytic(tj.GaussianMixture([1.0], [[0.0]], [[[1.0]]])), reward)
    with pytest.raises(ValueError, match="one scalar"):
        tj.smc(
            jax.random.key(0), MODEL, tj.tokens.Completions(MODEL, lambda x: x.astype(float)), num=4
        )
    with pytest.raises(TypeError, match="even must be True or False"):
        tj.tokens.Unmask(3)
    for x in (jnp.zeros(4), jnp.zeros(3, jnp.int32)):
        with pytest.raises(ValueError, match="a state must hold 4 integers, with 3 for a hidden"):
            MODEL.denoise(jnp.asarray(0.5), x)
    with pytest.raises(ValueError, match=r"the shape \(4, 3\)"):
        tj.sample(
            jax.random.key(0),
            tj.tokens.from_logits(lambda t, x: jnp.zeros((4, 4)), length=4, vocab=3),
            num=2,
        )
    with pytest.raises(ValueError, match="floating dtype of at least 32 bits"):
        tj.tokens.from_logits(network, MODEL, length=4, vocab=3, dtype=jnp.bfloat16)
    with pytest.raises(TypeError, match=r"called as fn\(t, x\)"):
        tj.tokens.from_logits(lambda x: x, length=4, vocab=3)
    with pytest.raises(TypeError, match="base must be a Model, got MarkovChain"):
        tj.Annealed(MODEL, MODEL)
    wrong = (
        ([[0.0, 1, 2, 3]], r"start must hold \(1, 4\) integers"),
        ([[0, 9, 3, 3]], "start must hold integers from 0 to 2.* 0 to 9"),
    )
    for start, message in (
        *wrong,
        ([[0, 1, 3]], r"\(1, 4\) integers, 3 where a token is hidden, got shape \(1, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            tj.sample(jax.random.key(0), MODEL, num=1, start=start, times=[0.5, 1.0])
    gapped = tj.tokens.MarkovChain(
        INITIAL, [[0.7, 0.3, 0.0], [0.1, 0.6, 0.3], [0.2, 0.3, 0.5]], LENGTH
    )
    with pytest.raises(ValueError, match="use steps=4"):
        tj.sample(jax.random.key(0), gapped, num=4, steps=2)
    with pytest.raises(ValueError, match="has probability zero"):
        tj.tokens.MarkovChain(
            INITIAL,
            [[0.7, 0.3, 0.0], [0.1, 0.6, 0.3], [0.2, 0.3, 0.5]],
            LENGTH,
            prompt=[0, 2, 3, 3],
        )


@pytest.mark.slow
def test_counts_and_python_functions_are_rewards_of_tokens():
    outside = tj.external.from_numpy(lambda x: 0.5 * (x == 1).sum(axis=1))
    drawn = tj.sample(jax.random.key(1), MODEL, num=40)
    chosen = tj.best_of_n(drawn, lambda x: jnp.sum(x == 1), 4)
    np.testing.assert_array_equal(chosen.x, tj.best_of_n(drawn, outside, 4).x)
    counted = tj.tokens.Completions(MODEL, lambda x: jnp.sum(x == 1), 0.5)
    runs = [
        tj.smc(jax.random.key(2), MODEL, guide, num=50)
        for guide in (counted, tj.tokens.Completions(MODEL, outside))
    ]
    np.testing.assert_array_equal(runs[0].x, runs[1].x)
    np.testing.assert_allclose(runs[0].log_norm, runs[1].log_norm, rtol=1e-12)


def test_probabilities_of_two_dtypes_make_a_chain_of_the_wider_one():
    parts = [0.6, 0.4], [[0.9, 0.1], [0.3, 0.7]]
    mixed = tj.tokens.MarkovChain(np.float32(parts[0]), np.float64(parts[1]), 3)
    usual = tj.tokens.MarkovChain(*parts, 3)
    assert mixed.dtype == jnp.float64
    np.testing.assert_allclose(mixed.predict(mixed.prompt), usual.predict(usual.prompt), atol=1e-7)
