"""One right call of every public function and class that takes arguments, small enough to be made.

`CALLS` maps a name to the callable and all of its arguments by name; `test_arguments` replaces them
one at a time.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from helpers import contracts

import theory
import tiltjax as tj
from tiltjax import rewards
from tiltjax.particles import unweighted

FILE = "particles.npz"
KEY = jax.random.key(0)
MIXTURE = contracts.planar()
NORMAL = contracts.gaussian([0.5], [[0.8]])
MODEL = tj.Analytic(MIXTURE)
LINE = tj.Analytic(NORMAL)
REWARD = rewards.Quadratic(contracts.TARGET)
ON_LINE = rewards.Quadratic([1.0])
GUIDED = tj.dps(MODEL, REWARD, 1.0)
POINTS = unweighted(jnp.asarray(np.random.default_rng(0).normal(size=(6, 2))))
TIMES = jnp.asarray([0.1, 0.5, 1.0])
CHAIN = tj.tokens.MarkovChain([0.4, 0.6], [[0.7, 0.3], [0.2, 0.8]], 3)
TOKENS = theory.tokens.token_tilt(CHAIN, lambda x: jnp.sum(x, dtype=float))
FIELD = theory.plug_in_field(NORMAL, ON_LINE, 1.0)
GRID = {"steps": None, "times": TIMES}


def velocity(t, x):
    return -x


def logits(t, x):
    return jnp.zeros((3, 2))


def count(x):
    return jnp.sum(x, dtype=float)


def network():
    return tj.training.networks.Velocity(
        (1,), width=4, depth=1, param_dtype=jnp.float64, rngs=nnx.Rngs(0)
    )


def host(x):
    return np.zeros(len(x))


SETTINGS = {
    "params": None,
    "shape": (2,),
    "batched": False,
    "interpolant": tj.Linear(),
    "dtype": jnp.float64,
}
DESCENT = {
    "steps": 1,
    "rate": 1e-3,
    "optimizer": None,
    "ema": 0.9,
    "checkpoint": None,
    "every": None,
    "progress": False,
}
RUN = {"num": 2, "solver": None, "batch": 2, "sharding": None}
THREE = {"model": MODEL, "reward": REWARD, "scale": 1.0}
TILT = {"prior": NORMAL, "reward": ON_LINE, "scale": 1.0}
X, Y = np.asarray(POINTS.x), np.asarray(POINTS.x)[::-1] + 1

CALLS = {
    # models
    "Analytic": (tj.Analytic, {"mixture": MIXTURE, "interpolant": tj.Linear()}),
    "GaussianMixture": (
        tj.GaussianMixture,
        {"weights": [1.0], "means": [[0.0]], "covs": [[[1.0]]]},
    ),
    "Checkerboard": (tj.models.Checkerboard, {"interpolant": tj.Linear(), "dtype": jnp.float64}),
    "from_velocity": (tj.from_velocity, {"fn": velocity, **SETTINGS}),
    "from_noise": (tj.from_noise, {"fn": velocity, **SETTINGS}),
    "from_denoiser": (tj.from_denoiser, {"fn": velocity, **SETTINGS}),
    "MarkovChain": (
        tj.tokens.MarkovChain,
        {
            "initial": [0.4, 0.6],
            "transition": [[0.7, 0.3], [0.2, 0.8]],
            "length": 3,
            "prompt": None,
        },
    ),
    "from_logits": (
        tj.tokens.from_logits,
        {
            "fn": logits,
            "params": None,
            "length": 3,
            "vocab": 2,
            "batched": False,
            "prompt": None,
            "dtype": jnp.float64,
        },
    ),
    "Tilted": (tj.Tilted, THREE),
    "Rescheduled": (tj.models.Rescheduled, {"model": MODEL, "interpolant": tj.VP()}),
    "Annealed": (tj.Annealed, {"base": MODEL, "tuned": tj.Tilted(MODEL, REWARD), "weight": 0.5}),
    "Linear": (tj.Linear, {"base_scale": 1.0}),
    "VP": (tj.VP, {"beta_min": 0.1, "beta_max": 20.0}),
    "DiscreteVP": (tj.DiscreteVP, {"alphas_cumprod": [0.9, 0.5, 0.1]}),
    "annealed.power": (tj.models.power, {"p": 2.0}),
    "annealed.step": (tj.models.step, {"at": 0.6}),
    "lora.init": (
        tj.training.lora.init,
        {"key": KEY, "network": network(), "rank": 2, "only": None},
    ),
    # training
    "fit": (
        tj.fit,
        {
            "key": KEY,
            "network": network(),
            "data": np.zeros((4, 1)),
            "batch": 2,
            "target": tj.models.from_velocity,
        }
        | {
            "interpolant": tj.Linear(),
            "times": tj.training.uniform,
            "batched": False,
            "sharding": None,
            **DESCENT,
        },
    ),
    "finetune": (
        tj.finetune,
        {
            "key": KEY,
            "network": network(),
            "base": LINE,
            "reward": ON_LINE,
            "scale": 1.0,
            "objective": None,
            "batch": 2,
        }
        | {"model": lambda net: tj.from_velocity(net, shape=(1,)), "times": TIMES, **DESCENT},
    ),
    "training.adamw": (
        tj.training.adamw,
        {"rate": 1e-3, "steps": 3, "warmup": 1, "clip": 1.0, "weight_decay": 0.0},
    ),
    "finetuning.reparametrized": (tj.training.reparametrized, {"through": 2}),
    # rewards
    "rewards.Quadratic": (rewards.Quadratic, {"target": [0.0, 1.0], "weight": [1.0, 2.0]}),
    "rewards.Linear": (rewards.LinearReward, {"direction": [0.0, 1.0]}),
    "rewards.Bump": (rewards.Bump, {"target": [0.0, 1.0], "width": 1.0}),
    "rewards.Step": (rewards.StepReward, {"height": 1.0, "normal": [1.0], "offset": 0.0}),
    "rewards.as_reward": (rewards.as_reward, {"reward": count}),
    "External": (
        tj.external.External,
        {
            "fn": host,
            "value_and_grad": None,
            "batched": True,
            "batch": 2,
            "timeout": 1.0,
            "retries": 1,
            "backoff": 1.0,
        }
        | {"record": None, "name": "host"},
    ),
    "from_torch": (tj.external.from_torch, {"fn": host, "device": "cpu"}),
    "Record": (tj.external.Record, {"path": None, "every": 60.0}),
    "ValueOnly": (tj.rewards.ValueOnly, {"reward": REWARD}),
    "objectives.weighted": (
        tj.rewards.objectives.weighted,
        {"objectives": [REWARD, REWARD], "weights": [1.0, 2.0]},
    ),
    "objectives.Constraint": (tj.rewards.objectives.Constraint, {"bound": count, "penalty": 1.0}),
    "objectives.values": (tj.rewards.objectives.values, {"objectives": [REWARD, REWARD], "x": X}),
    "objectives.front": (tj.rewards.objectives.front, {"values": X}),
    "objectives.hypervolume": (
        tj.rewards.objectives.hypervolume,
        {"values": X, "reference": np.full(2, -9.0)},
    ),
    # what a guidance is made of
    "Exact": (tj.Exact, {"model": MODEL}),
    "Glass": (tj.Glass, {"model": MODEL, "steps": 2, "order": 1}),
    "FlowMap": (tj.FlowMap, {"model": MODEL, "steps": 2, "floor": 1e-3}),
    "Renoise": (tj.posteriors.Renoise, {"model": MODEL, "snr_factor": 2.0, "steps": 2}),
    "Tweedie": (tj.Tweedie, {"model": MODEL}),
    "Constant": (tj.scales.Constant, {"scale": 1.0}),
    "Damped": (tj.Damped, {"scale": 1.0, "sigma": 0.7}),
    "SelfDamped": (tj.SelfDamped, {"scale": 1.0, "model": MODEL}),
    "Doob": (tj.Doob, {"model": MODEL, "log_h": lambda t, x: x[0]}),
    "PlugIn": (tj.PlugIn, {"posterior": tj.Exact(MODEL), "reward": REWARD, "scale": 1.0, "k": 1}),
    "Laplace": (tj.Laplace, THREE),
    "dps": (tj.dps, THREE),
    "fmrg": (tj.fmrg, THREE | {"steps": 2}),
    "Conjugate": (
        tj.Conjugate,
        THREE
        | {
            "iterations": 1,
            "draws": 2,
            "keep": 0.3,
            "variance": lambda snr: 1.0,
            "anisotropic": False,
        },
    ),
    "calibrate": (
        tj.calibrate,
        {"model": MODEL, "key": KEY, "num": 8, "levels": 4, "data": X, "batch": 2},
    ),
    "toward": (tj.guidance.toward, THREE | {"tilted": tj.Tilted(MODEL, REWARD)}),
    "Tuned": (
        tj.Tuned,
        {
            "base": MODEL,
            "tuned": tj.Tilted(MODEL, REWARD),
            "weight": 0.5,
            "reward": REWARD,
            "scale": 1.0,
        },
    ),
    "Completions": (
        tj.tokens.Completions,
        {"model": CHAIN, "reward": count, "scale": 1.0, "k": 2, "lean": 0.0},
    ),
    "Clipped": (tj.guidance.wrappers.Clipped, {"guidance": GUIDED, "limit": 1.0}),
    "Normalized": (tj.guidance.wrappers.Normalized, {"guidance": GUIDED, "length": 1.0}),
    "Unscaled": (tj.guidance.wrappers.Unscaled, {"guidance": GUIDED}),
    "Capped": (tj.guidance.wrappers.GainCapped, {"guidance": GUIDED, "limit": 1.0}),
    "Shortened": (tj.guidance.wrappers.NormDamped, {"guidance": GUIDED, "sigma": 1.0}),
    "Averaged": (tj.guidance.wrappers.Averaged, {"guidance": GUIDED, "k": 2}),
    "Window": (tj.guidance.wrappers.Window, {"guidance": GUIDED, "start": 0.1, "stop": 0.9}),
    # verbs
    "sample": (
        tj.sample,
        {
            "key": KEY,
            "model": MODEL,
            "guidance": GUIDED,
            **RUN,
            **GRID,
            "start": X[:2],
            "save_path": False,
        }
        | {"progress": False},
    ),
    "smc": (
        tj.smc,
        {
            "key": KEY,
            "model": MODEL,
            "guidance": GUIDED,
            **RUN,
            **GRID,
            "twist": None,
            "proposal": None,
        }
        | {
            "potential": None,
            "tempering": None,
            "resample": tj.resampling.systematic,
            "schedule": None,
        }
        | {"ess_threshold": 0.5, "progress": False},
    ),
    "audit": (
        tj.audit,
        {
            "key": KEY,
            "model": MODEL,
            "guidance": GUIDED,
            **RUN,
            **GRID,
            "num": 100,
            "progress": False,
        },
    ),
    "density": (
        tj.samplers.density,
        {
            "key": KEY,
            "model": MODEL,
            "guidance": GUIDED,
            "num": 2,
            **GRID,
            "solver": None,
            "batch": 2,
        },
    ),
    "das": (tj.das, {"gamma": 0.01}),
    "proposals.Children": (
        tj.weighted.proposals.Children,
        {"m": 2, "proposal": tj.weighted.proposals.Base()},
    ),
    "Every": (tj.weighted.potentials.ResampleSchedule, {"n": 1, "start": 0, "stop": 4}),
    "tempering.Exponential": (tj.weighted.tempering.Exponential, {"gamma": 0.1}),
    "tempering.Polynomial": (tj.weighted.tempering.Polynomial, {"power": 1.0, "gamma": 0.1}),
    "tempering.Adaptive": (tj.weighted.tempering.AdaptiveTempering, {"ess": 0.7}),
    **{
        f"resampling.{scheme.__name__}": (
            scheme,
            {"key": KEY, "log_weights": jnp.zeros(3), "num": 3},
        )
        for scheme in (
            tj.resampling.multinomial,
            tj.resampling.stratified,
            tj.resampling.systematic,
            tj.resampling.residual,
            tj.resampling.ssp,
        )
    },
    "gibbs": (tj.gibbs, {"key": KEY, **THREE, "num": 2, "steps": 2, "max_sweeps": 8}),
    "flow": (
        tj.flow,
        {
            "model": MODEL,
            "x": X[0],
            "t0": 0.1,
            "t1": 1.0,
            "guidance": GUIDED,
            "key": KEY,
            "solver": tj.Adaptive(),
        },
    ),
    "Heun": (tj.Heun, {"share_draw": False}),
    "Ancestral": (tj.Ancestral, {"eta": 1.0}),
    "Adaptive": (tj.Adaptive, {"rtol": 1e-5, "atol": 1e-6, "max_steps": 500, "floor": 1e-3}),
    "Unmask": (tj.tokens.Unmask, {"even": True}),
    "best_of_n": (tj.best_of_n, {"particles": POINTS, "reward": REWARD, "n": 2}),
    "softmax_of_n": (
        tj.softmax_of_n,
        {"key": KEY, "particles": POINTS, "reward": REWARD, "n": 2, "scale": 1.0},
    ),
    "optimize": (
        tj.optimize,
        {
            "key": KEY,
            "model": MODEL,
            "query": host,
            "surrogate": None,
            "scale": 1.0,
            "rounds": 1,
            "batch": 2,
            "num": 2,
        }
        | {"guide": tj.dps, "earlier": None, "progress": False},
    ),
    "GaussianProcess": (tj.search.surrogates.GaussianProcess, {"bonus": 2.0}),
    "Bootstrap": (
        tj.search.surrogates.Bootstrap,
        {"heads": 2, "width": 4, "steps": 2, "rate": 1e-3},
    ),
    "save": (tj.particles.save, {"particles": POINTS, "file": FILE}),
    "load": (tj.particles.load, {"file": FILE}),
    # metrics
    "wasserstein": (tj.metrics.wasserstein, {"x": X, "y": Y, "weights_x": None, "weights_y": None}),
    "sliced_wasserstein": (
        tj.metrics.sliced_wasserstein,
        {"key": KEY, "x": X, "y": Y, "num_projections": 2},
    ),
    "mmd": (tj.metrics.mmd, {"x": X, "y": Y, "bandwidth": 1.0}),
    "mode_weights": (tj.metrics.mode_weights, {"x": X, "mixture": MIXTURE}),
    "pairwise_diversity": (tj.metrics.pairwise_diversity, {"x": X}),
    "cosine_diversity": (tj.metrics.cosine_diversity, {"x": X}),
    "spectral_diversity": (tj.metrics.spectral_diversity, {"x": X}),
    "truncated_entropy": (tj.metrics.truncated_entropy, {"x": X, "k": 2}),
    "spectral_distance": (tj.metrics.spectral_distance, {"x": X, "y": Y}),
    "recall": (tj.metrics.recall, {"x": X, "base": Y, "k": 2}),
    "coverage": (tj.metrics.coverage, {"x": X, "base": Y, "k": 2}),
    "standard_error": (tj.metrics.standard_error, {"values": X, "axis": 0}),
    "bootstrap": (tj.metrics.bootstrap, {"key": KEY, "statistic": jnp.mean, "x": X, "num": 2}),
    "problems.get": (tj.problems.get, {"name": "gaussian"}),
    # theory
    "theory.tilt": (theory.tilt, TILT),
    "theory.bures": (
        theory.bures,
        {
            "mean": jnp.zeros(2),
            "cov": jnp.eye(2),
            "other_mean": jnp.ones(2),
            "other_cov": jnp.eye(2),
        },
    ),
    "theory.expected_reward": (theory.expected_reward, {"mixture": NORMAL, "reward": ON_LINE}),
    "theory.quadratic_form": (theory.quadratic_form, {"reward": ON_LINE, "dim": 1}),
    "theory.w2_bounds": (theory.w2_bounds, {"one": NORMAL, "other": NORMAL}),
    "theory.overlap": (theory.overlap, {"mixture": MIXTURE}),
    "theory.thermodynamic_integral": (
        theory.thermodynamic_integral,
        {"expected_reward": lambda scale: scale, "scale": 1.0, "nodes": 2, "start": 0.0},
    ),
    "theory.thermodynamic_bracket": (
        theory.thermodynamic_bracket,
        {"scales": [0.0, 1.0], "expected_rewards": [0.0, 1.0], "standard_errors": [0.1, 0.1]},
    ),
    "theory.log_h": (theory.log_h, TILT | {"interpolant": tj.Linear()}),
    "theory.marginal": (theory.marginal, {"mixture": NORMAL, "t": 0.5, "interpolant": tj.Linear()}),
    "theory.plug_in_law": (theory.plug_in_law, TILT | {"k": 1}),
    "theory.fmrg_law": (theory.fmrg_law, TILT | {"interpolant": tj.Linear()}),
    "theory.sde_law": (theory.sde_law, TILT),
    "theory.mean_drift_law": (
        theory.mean_drift_law,
        TILT | {"drift": theory.dps_drift, "nodes": 9},
    ),
    "theory.discrete_law": (
        theory.discrete_law,
        {"field": FIELD, "times": TIMES, "solver": tj.Euler()},
    ),
    **{
        f"theory.{make.__name__}": (make, TILT | {"interpolant": tj.Linear()})
        for make in (theory.plug_in_field, theory.dps_field, theory.doob_field, theory.fmrg_field)
    },
    "theory.best_of_n": (
        theory.best_of_n,
        {"prior": NORMAL, "reward": ON_LINE, "n": 2, "cells": None},
    ),
    "theory.softmax_of_n": (theory.softmax_of_n, TILT | {"n": 2, "cells": None}),
    "theory.matching_n": (theory.matching_n, TILT | {"most": 64}),
    "theory.path_law": (
        theory.path_law,
        {"field": FIELD, "times": TIMES, "solver": tj.Ancestral()},
    ),
    "theory.path_limit": (theory.path_limit, TILT | {"fresh": False}),
    "theory.recommend": (
        theory.recommend,
        TILT | {"budget": 10.0, "conjugate": False, "inner": 2, "pullback": 2.0},
    ),
    "theory.matching_k": (
        theory.matching_k,
        {"prior": NORMAL, "reward": ON_LINE, "law": tj.Damped(1.0, 0.5), "most": 2},
    ),
    "theory.token_tilt": (
        theory.token_tilt,
        {"chain": CHAIN, "reward": count, "scale": 1.0, "given": None},
    ),
    "theory.token_log_h": (
        theory.token_log_h,
        {"chain": CHAIN, "reward": count, "scale": 1.0, "x": jnp.asarray([2, 2, 1], jnp.int32)},
    ),
    "theory.pair_log_norm": (
        theory.pair_log_norm,
        {"chain": CHAIN, "single": jnp.zeros((3, 2)), "pair": jnp.zeros((2, 2)), "scale": 1.0},
    ),
    "theory.tokens.token_states": (theory.tokens.token_states, {"vocab": 2, "length": 3}),
    "theory.tokens.token_marginals": (theory.tokens.token_marginals, {"law": TOKENS, "vocab": 2}),
    "theory.tokens.independent": (theory.tokens.independent, {"law": TOKENS, "vocab": 2}),
    "theory.quadrature.tilt": (theory.quadrature.tilt, TILT | {"cells": 400, "reach": 9.0}),
    "theory.quadrature.log_norm": (
        theory.quadrature.log_norm,
        {"mixture": NORMAL, "reward": ON_LINE, "scale": 1.0, "nodes": 9, "reach": 8.0},
    ),
}

# Runs, which compile for seconds: what they make of right values is tested elsewhere.
SLOW = {
    "fit", "finetune", "calibrate", "sample", "smc", "audit", "density", "gibbs", "flow", "optimize", "recall", "wasserstein",
    "theory.tilt", "theory.plug_in_law", "theory.fmrg_law", "theory.mean_drift_law", "theory.best_of_n", "theory.softmax_of_n",
    "theory.matching_n", "theory.path_limit", "theory.path_law", "theory.recommend", "theory.matching_k", "theory.quadrature.tilt",
}  # fmt: skip
