"""Networks outside of JAX against the same ones in JAX. Tier: parity (1e-10 in float64)."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import onnx_files

import tiltjax as tj

KEY = jax.random.key(0)
MEANS = np.array([[-1.0, 0.5], [1.5, 0.0]])
MIXTURE = tj.GaussianMixture([0.4, 0.6], MEANS, [0.3 * jnp.eye(2)] * 2)
NATIVE = tj.Analytic(MIXTURE)
REWARD = tj.rewards.Quadratic([0.0, 1.0])
TIMES, STATES = np.linspace(0.1, 0.9, 6), np.random.default_rng(0).normal(size=(6, 2))


class Denoiser(torch.nn.Module):
    """The denoiser of the mixture, of a batch."""

    def __init__(self):
        super().__init__()
        self.means = torch.nn.Parameter(torch.as_tensor(MEANS))
        self.log_weights = torch.nn.Parameter(
            torch.log(torch.tensor([0.4, 0.6], dtype=torch.float64))
        )

    def forward(self, t, x):
        t = t[:, None, None]
        variance = 0.3 * t**2 + (1 - t) ** 2
        off = x[:, None] - t * self.means
        logits = self.log_weights - (off**2 / variance).sum(-1) / 2
        posterior = self.means + 0.3 * t / variance * off
        return (torch.softmax(logits, 1)[..., None] * posterior).sum(1)


def in_numpy(t, x):
    t = t[:, None, None]
    variance = 0.3 * t**2 + (1 - t) ** 2
    off = x[:, None] - t * MEANS
    logits = np.log([0.4, 0.6]) - (off**2 / variance).sum(-1) / 2
    weights = np.exp(logits - logits.max(1, keepdims=True))
    posterior = MEANS + 0.3 * t / variance * off
    return ((weights / weights.sum(1, keepdims=True))[..., None] * posterior).sum(1)


def close(got, expected, tolerance):
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance)


def as_model(network, batched=True):
    return tj.from_denoiser(network, shape=(2,), batched=batched)


@pytest.fixture(scope="module")
def denoiser():
    return tj.external.from_torch(Denoiser().eval())


@pytest.mark.parametrize("batched", [True, False])
def test_a_module_is_a_denoiser(denoiser, batched):
    model = as_model(denoiser, batched)
    x = jnp.asarray(STATES)
    run = lambda model: jax.jit(jax.vmap(model.denoise))(jnp.asarray(TIMES), x)
    close(run(model), run(NATIVE), 1e-12)

    def pulled(model):
        both = lambda t, x: jnp.sum(jnp.sin(model.denoise(t, x)))
        return jax.jit(jax.vmap(jax.grad(both, (0, 1))))(jnp.asarray(TIMES), x)

    for got, expected in zip(pulled(model), pulled(NATIVE), strict=True):
        close(got, expected, 1e-10)


GUIDED = {
    "unguided": lambda model: None,
    "dps": lambda model: tj.dps(model, REWARD, 2.0),
    "plug-in": lambda model: tj.PlugIn(tj.Glass(model, 3), REWARD, 2.0, k=2),
    "fmrg": lambda model: tj.fmrg(model, REWARD, 2.0),
}


SLOW = ("plug-in", "fmrg")
RUNS = [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in GUIDED]


@pytest.mark.parametrize("guidance", RUNS)
def test_a_run_is_that_of_the_native_model(denoiser, guidance):
    run = lambda model: tj.sample(KEY, model, GUIDED[guidance](model), num=5, steps=4).x
    close(run(as_model(denoiser)), run(as_model(_native)), 1e-10)


def _native(t, x):
    return jax.vmap(NATIVE.denoise)(t, x)


def test_one_call_has_the_whole_batch_and_the_program_is_traced_once():
    module, sizes = Denoiser().eval(), []

    def fn(t, x):
        sizes.append((len(t), len(x)))
        return module(t, x)

    traces, counts = [], []
    network = tj.external.from_torch(fn)

    def counted(t, x):
        traces.append(1)
        return network(t, x)

    model = as_model(counted)
    for scale in (1.0, 2.0):
        guidance = tj.PlugIn(tj.Glass(model, 3), REWARD, scale, k=2)
        tj.sample(KEY, model, guidance, num=5, steps=4)
        counts.append(len(traces))
    assert counts[0] == counts[1]
    assert set(sizes) == {(5, 5), (10, 10)}


def test_a_function_of_numpy_with_its_derivative():
    jacobian = jax.vmap(jax.jacrev(NATIVE.denoise, 1))
    vjp = lambda t, x, c: np.einsum("ni,nij->nj", c, np.asarray(jacobian(t, x)))
    network = tj.external.from_numpy(in_numpy, vjp=vjp)
    t, x = jnp.asarray(TIMES), jnp.asarray(STATES)
    close(network(t, x), _native(t, x), 1e-12)
    loss = lambda f: lambda t, x: jnp.sum(f(t, x) ** 2)
    close(jax.grad(loss(network), 1)(t, x), jax.grad(loss(_native), 1)(t, x), 1e-10)
    assert np.isnan(jax.grad(loss(network))(t, x)).all()  # not returned: not known


def test_a_decoder_has_a_shape_of_its_own():
    matrix = np.random.default_rng(1).normal(size=(2, 3))
    decode = tj.external.from_torch(lambda z: z @ torch.as_tensor(matrix), output_shape=(3,))
    reward = lambda z: jnp.sum(jnp.tanh(decode(z)))
    close(
        jax.vmap(jax.grad(reward))(jnp.asarray(STATES)),
        jax.vmap(jax.grad(lambda z: jnp.sum(jnp.tanh(z @ matrix))))(jnp.asarray(STATES)),
        1e-12,
    )


@pytest.mark.parametrize("batch", ["n", 4])
def test_a_file_is_a_denoiser(tmp_path, batch):
    path = onnx_files.denoiser(tmp_path / "denoiser.onnx", MEANS, [0.4, 0.6], 0.3, batch)
    network = tj.external.from_onnx(path, inputs=("level", "noisy"), output="denoised")
    run = lambda model: tj.sample(KEY, model, num=6, steps=4).x
    close(run(as_model(network)), run(as_model(_native)), 1e-10)
    with pytest.raises(ValueError, match=r"'denoised' has no derivative.*Conjugate"):
        tj.sample(KEY, as_model(network), tj.dps(as_model(network), REWARD, 1.0), num=2, steps=2)


def test_what_a_file_must_have(tmp_path):
    path = onnx_files.denoiser(tmp_path / "denoiser.onnx", MEANS, [0.4, 0.6], 0.3, "n")
    with pytest.raises(ValueError, match=r"\['level', 'noisy'\].*got \['t', 'x'\]"):
        tj.external.from_onnx(path, inputs=("t", "x"))
    with pytest.raises(ValueError, match=r"one of \['denoised'\], got 'noise'"):
        tj.external.from_onnx(path, inputs=("level", "noisy"), output="noise")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        tj.external.from_onnx(tmp_path / "none.onnx", inputs="x")


def raises(t, x):
    raise RuntimeError("out of memory on the device")


WRONG = {
    "raises": (raises, RuntimeError, "out of memory on the device"),
    "NaN": (lambda t, x: x * np.nan, FloatingPointError, "an output with NaN or infinity for 3"),
    "shape": (lambda t, x: x[:, :1], ValueError, r"shape \(3, 1\), expected \(3, 2\)"),
    "one": (lambda t, x: x[0], ValueError, r"shape \(2,\), expected \(3, 2\)"),
    "dtype": (lambda t, x: x.astype(complex), TypeError, "dtype complex128, expected real"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_network_is_named(name):
    fn, error, message = WRONG[name]
    model = as_model(tj.external.from_numpy(fn, name="unet"))
    with pytest.raises(error, match=message) as caught:
        tj.sample(KEY, model, num=3, steps=2)
    assert any("the external network 'unet'" in note for note in caught.value.__notes__)


def test_a_network_that_hangs_is_stopped():
    wait = threading.Event()
    network = tj.external.from_numpy(lambda t, x: wait.wait(20), timeout=0.1)
    with pytest.raises(TimeoutError, match=r"network .* did not return within 0\.1 s"):
        tj.sample(KEY, as_model(network), num=3, steps=2)
    wait.set()


def test_what_a_network_refuses(denoiser):
    with pytest.raises(ValueError, match=r"times of shape \(n,\) and n samples.*\(3,\), \(2,\)"):
        denoiser(jnp.ones(3), jnp.ones(2))
    with pytest.raises(TypeError, match=r"tiltjax\.external\.from_torch"):
        as_model(Denoiser().eval())
    with pytest.raises(ValueError, match=r"training mode.*\.eval\(\)"):
        tj.external.from_torch(Denoiser())
    network = tj.external.from_numpy(in_numpy, record=tj.external.Record())
    with pytest.raises(ValueError, match="a Record stores rewards"):
        network(jnp.asarray(0.5), jnp.ones(2))
    gradient = jax.grad(lambda x: jnp.sum(denoiser(jnp.asarray(0.5), x) ** 2))
    with pytest.raises(ValueError, match="no second derivatives"):
        jax.grad(lambda x: jnp.sum(gradient(x)))(jnp.ones(2))
    stopped = tj.external.from_torch(lambda t, x: x.detach())
    with pytest.raises(ValueError, match=r"PyTorch network .* has no gradient"):
        tj.sample(KEY, as_model(stopped), tj.dps(as_model(stopped), REWARD, 1.0), num=2, steps=2)
