"""Every public function with every argument wrong, one at a time: a sentence that names the
argument.

The right calls are those of `calls.CALLS`; what is put in place of an argument is `WRONG`. Either
it is refused by a `ValueError` or `TypeError` that names the argument, or it is among `ACCEPTED`,
which says what such a value means. Tier: exact.
"""

import inspect
import re
import warnings

import jax
import numpy as np
import pytest
from helpers import calls

import theory
import tiltjax as tj

WRONG = {
    "nothing": None,
    "text": "text",
    "nan": float("nan"),
    "rank": np.ones((1, 2, 1, 2)),
    "negative": -1,
    "true": True,
    "object": object(),
}
# What takes no arguments, or is called by the library and not by its user: bases, results, and
# tables of what a run returns.
UNCALLED = {
    "Model", "Masked", "Interpolant", "Reward", "Posterior", "Scale", "Guidance", "Solver", "Surrogate", "Euler", "Probe", "Estimate",
    "Audit", "Density", "Flow", "Search", "Particles", "failures", "fk_steering", "tds", "theory.Tilt", "theory.W2Bounds", "theory.LogNorm",
    "theory.DrawsLaw", "theory.MeanDriftLaw", "theory.AffineField", "theory.Selected", "theory.PathLaw", "theory.Plan", "theory.Option",
    "theory.TokenLaw", "theory.is_quadratic", "theory.plug_in_drift", "theory.dps_drift", "theory.doob_drift",
}  # fmt: skip

# Wrong values that are right somewhere: "call.argument", "argument", or a kind of value for all
# arguments of a kind.
ANY_SIGN = {
    "rewards.Quadratic.weight", "rewards.Linear.direction", "rewards.Bump.target", "rewards.Step.height", "rewards.Step.normal",
    "rewards.Step.offset", "Tuned.weight", "Completions.scale", "theory.token_tilt.scale", "theory.token_log_h.scale",
    "theory.pair_log_norm.scale", "theory.quadrature.log_norm.scale", "standard_error.axis",
}  # fmt: skip
ANY_SHAPE = {"rewards.Linear.direction", "rewards.Bump.target", "rewards.Step.normal"}
ANY_TEXT = {"External.name", "fit.checkpoint", "finetune.checkpoint", "save.file", "load.file"}
# Where the sentence is another's: that of the function that the user gave, or of the states that
# meet a reward or a network.
ALIASES = {
    "fit.data": "expected x of shape",
    "finetune.network": "fn",
    "objectives.values.x": "a sample of shape",
    "problems.get.name": "unknown problem",
}
FLAGS = {
    "progress",
    "batched",
    "save_path",
    "share_draw",
    "even",
    "anisotropic",
    "conjugate",
    "fresh",
}


def cases():
    for name, (fn, arguments) in calls.CALLS.items():
        parameters = inspect.signature(fn).parameters
        for argument in arguments:
            for kind in WRONG:
                # What stands as the default is right, whatever it is.
                if kind == "nothing" and (
                    arguments[argument] is None or parameters[argument].default is None
                ):
                    continue
                yield name, argument, kind


def accepted(name, argument, kind):
    """Whether the documentation allows the value."""
    place = f"{name}.{argument}"
    match kind:
        case "nothing":
            return place in {"das.gamma"}
        case "negative":
            return place in ANY_SIGN
        case "rank":
            return place in ANY_SHAPE
        case "text":
            return place in ANY_TEXT
        # Truth is one of the numbers of every kind that become floating leaves; where shapes are
        # decided it is refused.
        case "true":
            return argument in FLAGS or not isinstance(calls.CALLS[name][1][argument], int)
    return False


CASES = list(cases())


@pytest.mark.parametrize("name", calls.CALLS)
def test_a_wrong_argument_is_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a name of a file may be any text
    fn, arguments = calls.CALLS[name]
    problems = []
    for _, argument, kind in (case for case in CASES if case[0] == name):
        allowed = accepted(name, argument, kind)
        if allowed and name in calls.SLOW:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore"
                )  # Equinox warns of arrays that are to be static before we refuse them
                fn(**arguments | {argument: WRONG[kind]})
        except (ValueError, TypeError) as error:
            said, alias = str(error), ALIASES.get(f"{name}.{argument}")
            named = re.search(rf"\b{argument}\b", said) or (alias is not None and alias in said)
            if not named or isinstance(error, jax.errors.JAXTypeError):
                problems.append(f"{argument} = {WRONG[kind]!r}: {type(error).__name__}: {said}")
        except FileNotFoundError:
            assert allowed
        except Exception as error:
            problems.append(f"{argument} = {WRONG[kind]!r}: {type(error).__name__}: {error}")
        else:
            if not allowed:
                problems.append(f"{argument} = {WRONG[kind]!r} was taken")
    assert not problems, f"{name}\n" + "\n".join(problems)


@pytest.mark.parametrize("name", [name for name in calls.CALLS if name not in calls.SLOW])
def test_the_right_call_is_taken(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tj.particles.save(calls.POINTS, calls.FILE)
    fn, arguments = calls.CALLS[name]
    fn(**arguments)


def test_every_public_callable_and_argument_is_in_the_table():
    public = {name: getattr(tj, name) for name in tj.__all__} | {
        f"theory.{name}": getattr(theory, name) for name in theory.__all__
    }
    callables = {name for name, value in public.items() if callable(value)}
    called = {fn for fn, _ in calls.CALLS.values()}
    assert {name for name in callables - UNCALLED if public[name] not in called} == set()
    assert {name for name in UNCALLED if name not in callables or public[name] in called} == set()
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    for name, (fn, arguments) in calls.CALLS.items():
        taken = {
            key
            for key, value in inspect.signature(fn).parameters.items()
            if value.kind not in variadic
        }
        # What as_reward calls the argument in its message is not the user's.
        assert taken - set(arguments) == ({"name"} if fn is tj.rewards.as_reward else set()), name
