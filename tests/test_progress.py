"""The progress bar: silent when off, complete when on, under every transformation. Tier: exact."""

import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import contracts

import tiltjax as tj
from tiltjax import _progress

MODEL = tj.Analytic(contracts.planar())


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(_progress, "_DELAY", 0.0)
    monkeypatch.setattr(_progress, "_INTERVAL", 0.0)


def scan(ticker, steps):
    def body(carry, step):
        ticker.tick(step)
        return carry + 1, None

    return jax.lax.scan(body, 0, jnp.arange(steps))[0]


TRANSFORMS = {
    "plain": lambda f: f,
    "jit": jax.jit,
    "vmap": lambda f: lambda x: jax.vmap(f)(jnp.stack([x] * 3)),
    "jit of vmap": lambda f: jax.jit(lambda x: jax.vmap(f)(jnp.stack([x] * 3))),
    "grad": lambda f: jax.grad(lambda x: jnp.sum(f(x))),
    "remat": lambda f: jax.grad(lambda x: jnp.sum(jax.checkpoint(f)(x))),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_bar_reaches_its_total(name, at_once, capfd):
    with _progress.bar("working", 5, enabled=True) as ticker:
        TRANSFORMS[name](lambda x: x * scan(ticker, 5))(jnp.asarray(1.0))
    err = capfd.readouterr().err
    done = [int(number) for number in re.findall(r"(\d+)/5 ", err)]
    assert done[-1] == 5
    assert done == sorted(done)
    assert err.split("\r")[-1].startswith("working: 100%")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert not _progress._running


def test_nothing_is_printed_when_off_or_quick(capfd):
    with _progress.bar("working", 5, enabled=False) as ticker:
        scan(ticker, 5)
    with _progress.bar("working", 5, enabled=True) as ticker:  # over before the delay
        scan(ticker, 5)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


def test_off_costs_no_callback():
    with _progress.bar("working", 5, enabled=False) as ticker:
        assert "callback" not in str(jax.make_jaxpr(lambda: scan(ticker, 5))())
    with _progress.bar("working", 5, enabled=True) as ticker:
        assert "callback" in str(jax.make_jaxpr(lambda: scan(ticker, 5))())


def test_an_error_inside_closes_the_bar(at_once, capfd):
    def fail():
        with _progress.bar("working", 5, enabled=True) as ticker:
            jax.block_until_ready(scan(ticker, 3))
            jax.effects_barrier()
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        fail()
    assert not _progress._running
    err = capfd.readouterr().err
    assert "3/5" in err
    assert err.endswith("\n")
    _progress._advance(np.asarray(10**6), np.asarray(1))  # a tick after the end is ignored


def test_two_bars_keep_apart(at_once, capfd):
    with (
        _progress.bar("first", 2, enabled=True) as a,
        _progress.bar("second", 3, enabled=True) as b,
    ):
        scan(a, 2)
        scan(b, 3)
    err = capfd.readouterr().err
    assert "2/2" in err
    assert "3/3" in err


def test_the_verb_shows_it_and_does_not_change_its_numbers(at_once, capfd):
    run = lambda progress, seed=0: (
        tj.sample(jax.random.key(seed), MODEL, num=3, steps=4, progress=progress).x
    )
    quiet = run(False)
    assert capfd.readouterr().err == ""
    np.testing.assert_array_equal(run(True), quiet)
    err = capfd.readouterr().err
    assert "sampling" in err
    assert "4/4" in err
    run(True, seed=1)  # a second bar, the same compiled loop
    assert "4/4" in capfd.readouterr().err


def test_a_meter_shows_its_note_and_no_time_left_from_compilation(capfd):
    with _progress.meter("training", 100) as meter:
        time.sleep(_progress._DELAY + 0.1)  # compilation
        meter.update(1, "loss 2")
        time.sleep(_progress._INTERVAL + 0.01)
        meter.update(50, "loss 1")
    first, second, last = capfd.readouterr().err.split("\r")[-3:]
    assert "1/100" in first
    assert "[00:00<?" in first
    assert "loss 2" in first
    assert "50/100" in second
    assert "<00:00" in second  # 0.7 s of compilation for one step would be half a minute more
    assert "loss 1" in last


def test_of_a_cluster_the_first_process_shows_it(at_once, capfd, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with _progress.bar("working", 5, enabled=True) as ticker:
        scan(ticker, 5)
    assert capfd.readouterr().err == ""


def test_redraws_are_throttled(monkeypatch, capfd):
    monkeypatch.setattr(_progress, "_DELAY", 0.0)
    with _progress.meter("working", 1000) as meter:
        for done in range(1000):
            meter.update(done + 1)
    assert capfd.readouterr().err.count("working") < 100


def test_a_last_tick_that_comes_first_does_not_complete_the_bar(at_once, capfd):
    with _progress.bar("working", 5, enabled=True) as ticker:
        ticker.tick(jnp.asarray(4))
        ticker.tick(jnp.asarray(1))
        jax.effects_barrier()
        assert "5/5" not in capfd.readouterr().err
    assert "5/5" in capfd.readouterr().err
