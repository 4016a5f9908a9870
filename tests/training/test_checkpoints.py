"""Checkpoints: runs that were stopped or killed against runs that were not. Tier: exact (bits)."""

import json
import signal
import subprocess
import sys
import textwrap
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.contracts import same_bits

import tiltjax as tj
from tiltjax import _progress, training
from tiltjax.training import _checkpoints, _loop

KEY = jax.random.key(0)


def network(width=16):
    return tj.training.networks.Velocity(
        (1,), width=width, depth=2, param_dtype=jnp.float64, rngs=nnx.Rngs(0)
    )


def gaussian(num):
    return 0.7 + 0.6 * jax.random.normal(KEY, (num, 1))


def stopping(file, steps, every, at):
    """A run that stops, by an error in its progress bar, as soon as `at` steps are done."""

    class Stop(Exception):
        pass

    def update(self, done, note=""):
        if done >= at:
            raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_progress._Bar, "update", update)
        with pytest.raises(Stop):
            run(file, steps=steps, every=every, progress=True)


def run(file=None, steps=40, every=None, **settings):
    return training.fit(
        KEY,
        network(),
        gaussian(50),
        **(
            {"steps": steps, "batch_size": 8, "checkpoint": file, "checkpoint_every": every}
            | settings
        ),
    )


@pytest.mark.slow
def test_a_run_that_was_interrupted_continues_to_the_same_bits(tmp_path):
    file, whole = tmp_path / "run.npz", run()
    stopping(file, 40, 7, at=20)
    assert step_of(file) in (14, 21)
    assert same_bits(run(file, every=7), whole)
    # Complete: nothing is left to do, and it is the same again.
    assert same_bits(run(file, every=7), whole)
    assert [path.name for path in tmp_path.iterdir()] == ["run.npz"]


def test_the_length_of_a_dispatch_changes_no_bit(monkeypatch):
    whole = run()
    monkeypatch.setattr(_loop, "_MAX_STEPS", 3)
    assert same_bits(run(), whole)


def late(key):
    return jnp.sqrt(jax.random.uniform(key))


@pytest.mark.slow
def test_the_checkpoint_of_another_run_is_refused(tmp_path):
    file = tmp_path / "run.npz"
    run(file, steps=2)
    for match, again in (
        ("steps is 2 in the file and 3 here", lambda: run(file, steps=3)),
        (
            "time_sampler is uniform in the file and late here; batch_size is 8 in the file",
            lambda: run(file, steps=2, batch_size=9, time_sampler=late),
        ),
        ("ema is", lambda: run(file, steps=2, ema=0.5)),
        (
            "learning_rate is 0.001 in the file and 0.002 here",
            lambda: run(file, steps=2, learning_rate=0.002),
        ),
        (
            "target is from_velocity in the file and from_noise",
            lambda: run(file, steps=2, target=tj.from_noise),
        ),
        ("interpolant is Linear", lambda: run(file, steps=2, interpolant=tj.Linear(2.0))),
        (
            "key is",
            lambda: training.fit(
                jax.random.key(1), network(), gaussian(50), steps=2, batch_size=8, checkpoint=file
            ),
        ),
        (
            "data is",
            lambda: training.fit(
                KEY, network(), gaussian(49), steps=2, batch_size=8, checkpoint=file
            ),
        ),
        (
            r"layers\.0\.kernel is float64\(17, 16\) in the file and float64\(17, 8\) here",
            lambda: training.fit(
                KEY, network(width=8), gaussian(50), steps=2, batch_size=8, checkpoint=file
            ),
        ),
    ):
        with pytest.raises(ValueError, match=match):
            again()
    for content in (b"", b"not a checkpoint"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="is not a checkpoint"):
            run(file, steps=2)
    np.savez(file, x=np.ones(3))
    with pytest.raises(ValueError, match="is not a checkpoint"):
        run(file, steps=2)


def test_leaves_of_every_kind_come_back(tmp_path):
    tree = {
        "half": jnp.asarray([1.5, -2.0], jnp.bfloat16),
        "count": jnp.asarray(3, jnp.int32),
        "key": jax.random.key(5),
        "numpy": np.arange(3.0),
        "empty": jnp.zeros((0, 2)),
    }
    file = tmp_path / "tree.npz"
    _checkpoints.write_checkpoint(file, {"a": [1, 2]}, tree, 4)
    back, step = _checkpoints.read_checkpoint(file, {"a": (1, 2)}, tree)
    assert step == 4
    assert (
        jax.random.key_data(back.pop("key")).tolist()
        == jax.random.key_data(tree.pop("key")).tolist()
    )
    assert same_bits(back, tree)
    back["numpy"][0] = 7.0
    with pytest.raises(ValueError, match=r"count is int32\(\) in the file and nothing here"):
        _checkpoints.read_checkpoint(file, {"a": (1, 2)}, {"half": tree["half"]})


def test_networks_with_leaves_that_are_no_arrays_are_saved(tmp_path):
    file, mlp = tmp_path / "run.npz", eqx.nn.MLP(2, 1, 4, 1, key=KEY)
    net = jax.tree_util.Partial(lambda mlp, t, x: mlp(jnp.append(x, t)), mlp)
    assert not all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(net))
    train = lambda: training.fit(KEY, net, gaussian(50), steps=2, checkpoint=file)
    first = train()
    assert step_of(file) == 2
    arrays = lambda fit: eqx.filter((fit.network, fit.average, fit.curve), eqx.is_array_like)
    assert same_bits(arrays(train()), arrays(first))


PROGRAM = """
    import sys
    import jax, jax.numpy as jnp, numpy as np
    from flax import nnx
    import tiltjax as tj

    board = tj.models.Checkerboard()
    network = tj.training.networks.Velocity((2,), width=32, depth=2, rngs=nnx.Rngs(0))
    settings = {"steps": 800, "batched": True, "interpolant": board.interpolant}

    def run(**more):
        data = lambda key: board.sample(key, 256)
        got = tj.fit(jax.random.key(0), network, data, **settings, **more)
        leaves = jax.tree.leaves((got.network, got.average, got.curve))
        return b"".join(np.asarray(leaf).tobytes() for leaf in leaves)

    continued = run(checkpoint=sys.argv[1], checkpoint_every=50)
    assert continued == run(), "other bits"
    print(len(continued), "equal bytes")
"""


@pytest.mark.slow
def test_a_run_that_was_killed_continues_to_the_same_bits(tmp_path):
    """SIGKILL, half-way, in single precision, under the compiler's full optimization: as users
    train.
    """
    file = tmp_path / "run.npz"
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(file)]
    victim, limit = subprocess.Popen(command, stdout=subprocess.DEVNULL), time.monotonic() + 100
    while not (file.exists() and 200 <= step_of(file) < 800):
        assert victim.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.02)
    victim.send_signal(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL
    assert 200 <= step_of(file) < 800
    again = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "equal bytes" in again.stdout, again.stderr[-2000:]


def step_of(file):
    with np.load(file) as archive:
        return json.loads(archive["header"].tobytes())["step"]
