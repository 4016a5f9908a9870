"""Many devices: what cannot be divided is refused, and two hosts compute what one does.

That eight devices of one host do is in tests/samplers/test_sample.py and
tests/training/test_fit.py. Tier: exact, to rounding in float64.
"""

import importlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.contracts import on_two_hosts

import tiltjax as tj
from tiltjax import _sharding

KEY = jax.random.key(0)
MODEL = tj.Analytic(
    tj.GaussianMixture([0.5, 0.5], [[-1.0, 0.0], [1.0, 0.0]], jnp.stack([jnp.eye(2)] * 2))
)
GUIDED = tj.dps(MODEL, tj.rewards.Quadratic([0.0, 1.0]), 0.5)
AUTO, EXPLICIT = jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit


def spread(sizes, *spec, kind=AUTO):
    """A sharding over devices that need not exist: what is refused is refused before any is
    asked.
    """
    mesh = jax.sharding.AbstractMesh(
        sizes, ("a", "b")[: len(sizes)], axis_types=(kind,) * len(sizes)
    )
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))


VERBS = {
    "sample": lambda **given: tj.sample(KEY, MODEL, GUIDED, steps=2, **given),
    "smc": lambda **given: tj.smc(KEY, MODEL, GUIDED, steps=2, **given),
    "audit": lambda **given: tj.audit(KEY, MODEL, GUIDED, steps=2, **given),
}


@pytest.mark.parametrize("verb", VERBS)
def test_particles_that_the_devices_do_not_divide_are_refused(verb):
    with pytest.raises(
        ValueError, match=r"num = 100 cannot be divided over 8 devices.*: take 96 or 104$"
    ):
        VERBS[verb](num=100, sharding=spread((8,), "a"))
    with pytest.raises(
        ValueError, match=r"num = 100 cannot be divided over 256 devices.*: take 256$"
    ):
        VERBS[verb](num=100, sharding=spread((32, 8), ("a", "b")))


@pytest.mark.parametrize("verb", VERBS)
def test_axes_that_are_not_the_partitioners_are_refused(verb):
    with pytest.raises(
        ValueError,
        match=r"axes of the mesh must be Auto, got \(.*Explicit.*jax.make_mesh\(\(8,\), \(\"a\",\)",
    ):
        VERBS[verb](num=104, sharding=spread((8,), "a", kind=EXPLICIT))


def test_batches_that_the_devices_do_not_divide_are_refused():
    network = jax.tree_util.Partial(lambda w, t, x: x @ w, jnp.eye(2))
    with pytest.raises(
        ValueError, match=r"batch_size = 12 cannot be divided over 8 devices.*: take 8 or 16$"
    ):
        tj.fit(KEY, network, jnp.ones((5, 2)), steps=1, batch_size=12, sharding=spread((8,), "a"))
    with pytest.raises(
        ValueError, match=r"batch_size = 256 cannot be divided over 3 devices.*: take 255 or 258$"
    ):
        tj.fit(KEY, network, jnp.ones((5, 2)), steps=1, sharding=spread((3,), "a"))


def test_what_divides_is_left_alone():
    _sharding.check_divides(None, (7,), "num")
    _sharding.check_divides(spread((8,)), (7,), "num")  # the same on all of them, as was asked for
    _sharding.check_divides(spread((2, 4), "a"), (6,), "num")
    _sharding.check_divides(spread((2, 4), "a", "b"), (6, 8), "num")
    _sharding.check_divides(jax.sharding.SingleDeviceSharding(jax.devices()[0]), (7,), "num")


def test_axes_of_the_state_that_the_devices_do_not_divide_are_refused():
    """Weights have no such axis at all."""
    with pytest.raises(
        ValueError, match=r"an array of shape \(6, 2\) cannot be divided by NamedSharding"
    ):
        tj.sample(KEY, MODEL, num=6, steps=2, sharding=spread((2, 4), "a", "b"))
    with pytest.raises(
        ValueError, match=r"an array of shape \(8,\) cannot be divided by NamedSharding"
    ):
        tj.smc(KEY, MODEL, GUIDED, num=8, steps=2, sharding=spread((2, 4), "a", "b"))


def test_an_array_of_one_host_is_addressable_as_a_whole():
    array = jnp.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(_sharding.addressable(array), np.arange(6.0))
    np.testing.assert_array_equal(_sharding.gathered(array), array)


@pytest.fixture(scope="module")
def one_device():
    mesh = jax.make_mesh((1,), ("particles",), axis_types=(AUTO,))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("particles"))


def test_weighted_runs_on_a_mesh_of_one_device(one_device):
    run = lambda **how: tj.smc(KEY, MODEL, GUIDED, num=8, steps=3, ess_threshold=1.0, **how)
    spread, alone = run(sharding=one_device), run()
    assert spread.x.sharding.is_equivalent_to(one_device, spread.x.ndim)
    np.testing.assert_allclose(spread.x, alone.x, rtol=1e-12)
    np.testing.assert_allclose(spread.log_norm, alone.log_norm, rtol=1e-12)
    np.testing.assert_array_equal(spread.trace.roots, alone.trace.roots)


def test_training_on_a_mesh_of_one_device(one_device):
    network = jax.tree_util.Partial(lambda w, t, x: x @ w, jnp.eye(2))
    data = jax.random.normal(jax.random.key(1), (10, 2))
    train = lambda **how: tj.fit(KEY, network, data, steps=3, batch_size=8, **how)
    spread, alone = train(sharding=one_device), train()
    (weights,) = spread.average.args
    assert weights.sharding.is_equivalent_to(_sharding.replicated(one_device), 2)
    np.testing.assert_allclose(weights, alone.average.args[0], rtol=1e-12)
    np.testing.assert_allclose(spread.curve.loss, alone.curve.loss, rtol=1e-6)


@pytest.mark.nightly
@pytest.mark.slow
def test_two_hosts_compute_what_one_does(tmp_path):
    """One of them, in turn, also runs the same by itself, on one of its devices, and compares."""
    script = f"""
        import jax, jax.numpy as jnp, numpy as np
        jax.config.update("jax_enable_x64", True)
        jax.distributed.initialize(ADDRESS, 2, HOST, initialization_timeout=200)
        import tiltjax as tj
        from tiltjax import _sharding
        from jax.experimental.multihost_utils import process_allgather
        assert (jax.device_count(), jax.local_device_count()) == (4, 2)
        mesh = jax.make_mesh((4,), ("particles",), axis_types=(jax.sharding.AxisType.Auto,))
        spec = jax.sharding.PartitionSpec("particles")
        four = {{"sharding": jax.sharding.NamedSharding(mesh, spec)}}
        prior = tj.GaussianMixture([.5, .5], [[-1., 0.], [1., 0.]], np.stack([np.eye(2)] * 2))
        model = tj.Analytic(prior)
        guidance = tj.dps(model, tj.rewards.Quadratic([0., 1.]), .5)
        key, settings = jax.random.key(0), {{"num": 8, "steps": 3}}

        def same(spread, alone, host):
            for array in jax.tree.leaves(spread):
                if isinstance(array, jax.Array) and array.ndim and not array.is_fully_replicated:
                    rows = {{shard.data.shape[0] for shard in array.addressable_shards}}
                    assert rows == {{len(array) // 4}}
            arrays = [leaf for leaf in jax.tree.leaves(spread) if isinstance(leaf, jax.Array)]
            assert any(not array.is_fully_addressable for array in arrays)
            spread = jax.tree.map(_sharding.gathered, spread)
            if HOST == host:
                for a, b in zip(jax.tree.leaves(spread), jax.tree.leaves(alone()), strict=True):
                    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)

        draw = lambda **given: tj.sample(key, model, guidance, **settings, **given)
        drawn = draw(progress=True, **four)
        same(drawn, draw, 0)
        everything = process_allgather(drawn.x, tiled=True)
        np.testing.assert_array_equal(everything, _sharding.gathered(drawn.x))

        weighted = settings | {{"ess_threshold": 1., "proposal": tj.weighted.proposals.Children(2)}}
        weigh = lambda **given: tj.smc(key, model, guidance, **weighted, **given)
        weighed = weigh(**four)
        assert np.any(weighed.trace.resampled)
        same(weighed, weigh, 1)
        weighed.save("{tmp_path}/particles.npz" if HOST == 0 else "{tmp_path}/not written")

        last = {{"num": 8, "times": [.9, 1.]}}
        go_on = lambda start, **given: tj.sample(key, model, start=start, **last, **given)
        load = lambda: tj.Particles.load("{tmp_path}/particles.npz")
        same(go_on(weighed.x, **four), lambda: go_on(load().x), 0)

        network = jax.tree_util.Partial(lambda w, t, x: x @ w, jnp.eye(2))
        data = jax.random.normal(jax.random.key(1), (10, 2))
        train = lambda **given: tj.fit(key, network, data, steps=3, batch_size=8, **given)
        saved = {{"checkpoint": "{tmp_path}/run.npz", "checkpoint_every": 2}}
        # The second one is what the first one left.
        fit, again = train(**four, **saved), train(**four, **saved)
        both = lambda one: (one.average.args, one.network.args)
        same((fit.average.args, again.network.args), lambda: both(train()), 1)
        # From the parameters of an earlier run, which no host holds as a whole.
        more = lambda start, **given: tj.fit(key, start, data, steps=2, batch_size=8, **given)
        same(more(fit.network, **four).network.args, lambda: more(train().network).network.args, 0)
        try:
            train(**four, checkpoint="{tmp_path}/run.npz" if HOST else "{tmp_path}/none.npz")
        except RuntimeError as error:
            assert "different steps, [0, 3]: use a file in a folder that all" in str(error), error
        else:
            raise AssertionError("two hosts continued from different steps")

        judge = lambda **given: tj.audit(key, model, guidance, num=100, steps=2, **given)
        report = judge(**four)
        if HOST == 0:
            np.testing.assert_allclose(report.path_kl, judge().path_kl, rtol=1e-6, atol=1e-9)
        print("equal")
    """
    hosts = on_two_hosts(script)
    for status, out, err in hosts:
        assert (status, out.splitlines()[-1:]) == (0, ["equal"]), err[-3000:]
    assert ["sampling:" in err for _, _, err in hosts] == [True, False]
    assert {path.name for path in tmp_path.iterdir()} == {"particles.npz", "run.npz"}
    assert tj.Particles.load(tmp_path / "particles.npz").x.shape == (8, 2)


# What is exchanged, as benchmarks/speed/devices.py counts it.


@pytest.fixture(scope="module")
def benchmark():
    return importlib.import_module("benchmarks.speed.devices")


ROOT = Path(__file__).parent.parent
PROGRAM = (
    """HloModule run, num_partitions=4

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  ROOT %sum = f32[] add(%a, %b)
}

%renew (p: (f32[2,3])) -> f32[8,3] {
  %x = f32[2,3]{1,0} get-tuple-element(%p), index=0
  ROOT %all-gather.1 = f32[8,3]{1,0} all-gather(%x), channel_id=1, dimensions={0}
}

%body (p: (s32[], f32[2,3])) -> (s32[], f32[2,3]) {
  %both = (f32[3]{0}, /*index=1*/pred[]) all-reduce(%u, %v), channel_id=2, to_apply=%add
  %next = f32[8,3]{1,0} conditional(%i, %p, %p), branch_computations={%renew, %keep}
}

ENTRY %main (p: f32[2,3]) -> f32[] {
  %loop = (s32[], f32[2,3]) while(%t), condition=%cond, body=%body, """
    """\
backend_config={"known_trip_count":{"n":"5"}}"""
    """
  ROOT %last = bf16[4]{0} collective-permute(%w), channel_id=3, source_target_pairs={{0,1}}
}
"""
)


def test_collective_operations_are_counted_as_often_as_their_loop_turns(benchmark):
    found = sorted(benchmark.exchanges(PROGRAM))
    assert found == [
        ("all-gather", 8 * 3 * 4, 5),
        ("all-reduce", 3 * 4 + 1, 5),
        ("collective-permute", 4 * 2, 1),
    ]
    assert [one.received(4) for one in found] == [5 * 96 * 3 / 4, 5 * 13 * 2 * 3 / 4, 8]


def test_an_exchange_goes_between_the_groups_and_then_in_them(benchmark):
    chip = benchmark.Chip(1.0, link=4.0, group=8, network=0.5, source="")
    assert chip.seconds(64, 8) == 7 / 8 * 64 / 4
    assert chip.seconds(64, 32) == 3 / 4 * 64 / (8 * 0.5) + 7 / 8 * 64 / 4
    assert chip.seconds(64, 32, 2) == 2 * chip.seconds(64, 32)


def test_the_predictions_on_record_follow_from_the_counts_on_record(benchmark):
    found = json.loads((ROOT / "benchmarks" / "results" / "devices.json").read_text())
    shares = benchmark.predicted(found["rows"])
    assert json.loads(json.dumps(shares)) == found["predicted"]
