r"""The laws of guided flows on Gaussian mixtures in any dimension, inside modes and between them.

A guided flow moves by a guided denoiser `M_t(x) = D_t(x) + (sigma^2 / alpha) ∇ log h`. With
`kappa = alpha / sigma` (the root of the signal-to-noise ratio) and `u = x / sigma`,

    du/dkappa = M(u),    u ~ N(0, I) at kappa = 0,    X_1 = lim u / kappa,

so the law of the samples is the push-forward of N(0, I) by one flow, which does not depend on the
interpolant. In the limit of small steps this also holds for a guidance with fresh draws of X_1: the
flow then follows the mean of M. `plug_in_law` treats each mode alone; this module does not. Each
denoiser below is a function of the posterior `p(X_1 | x)`, a mixture with weights p_k, means m_k
and covariances P_k. D and P are its mean and covariance, `H = -∇^2 r / 2`:

| denoiser | M | law |
|---|---|---|
| `plug_in_denoiser` | `D + scale Cov(X_1, r(X_1) \| x)` | `PlugIn` with fresh draws, k = 1 |
| `dps_denoiser` | `D + scale P ∇ r(D)` | `dps` |
| `laplace_denoiser` | `D + P (I + 2 scale H P)^-1 scale ∇ r(D)` | `Laplace` |
| `doob_denoiser` | `E[X_1 e^(scale r) \| x] / E[e^(scale r) \| x]` | the tilt |

In the plug-in denoiser
`Cov(X_1, r(X_1) | x) = sum_k p_k (P_k E_k[∇r] + (m_k - D) E_k[r])`, where a quadratic reward has
`E_k[∇r] = ∇r(m_k)` and `E_k[r] = r(m_k) - tr(H P_k)`. The second term moves mass between modes.
`Conjugate` has Doob's denoiser for conjugate rewards (linear, isotropic quadratic, and their sums),
so its law is the tilt. For any other reward its law is no push-forward of the state alone: where
its fit has several solutions, the fit follows one of them from the start of the run, and the noise
of a few draws moves mass between modes. Its law is then one of complete runs: `theory.run_law` with
`ConjugateFit`.

**Clock.** Let c be the prior's mean, s the root of the mean variance of its coordinates,
`kappa s = sinh(tau)` and `y = (u - kappa c) / cosh(tau)`. Then y has about unit variance and moves
from N(0, I) at tau = 0 to `(X_1 - c) / s`,

    dy/dtau = (M - c) / s - tanh(tau) y.

No term grows. A direction without variance, in which y follows the vanishing noise `1 / cosh(tau)`,
decays at the rate 1, so singular covariances are not stiff. The flow ends at `cosh(tau) = 1e6` (1e3
in single precision) with a jump to M. What the jump leaves out is the square of this noise, in
units of a component's variance.

**Points.** Moments, masses and distances use randomized quasi-Monte Carlo: eight independent
scramblings of a Sobol sequence (Owen 1998), mapped to N(0, I) and carried by the flow. The spread
over the scramblings is the standard error.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from theory._solve import end_of
from theory.flow_laws import check_domain
from theory.mean_drift import has_step, strength_at
from theory.tilts import Tilt, check_mass, is_quadratic, quadratic_form
from tiltjax import _checks, _linalg, _pytree, _repr, rewards, scales
from tiltjax.mixtures import GaussianMixture, check_mixture, check_state

_SCRAMBLINGS = 8
# On the way back the flow is frozen beyond this value, in units of s: guidance that contracts
# strongly would otherwise carry points outside of the law to infinity.
_FAR = 1e4
_REACH = 8  # standard deviations of a quadrature
_BLUR = 1e-3  # the noise at which the mode of a point is determined, in units of s
_FINE, _COARSE = 1.0, 1e3  # factors of the tolerance, for single points and for the set of points

GuidedDenoiser = Callable[[GaussianMixture, rewards.Reward, Array], Array]


def plug_in_denoiser(
    posterior: GaussianMixture, reward: rewards.Reward, scale: Array, *, nodes: int = 2
) -> Array:
    """`D + scale Cov(X_1, r(X_1) | x)`, the mean of plug-in guidance with one fresh draw, `(d,)`.

    The covariance has a closed form for quadratic rewards. For other rewards it is computed by
    quadrature, with `nodes` nodes in each standard deviation of each component.

    **Raises:** `ValueError` for other rewards in more than two dimensions.
    """
    if not is_quadratic(reward):
        x, mass = _quadrature(posterior, nodes)
        r = jax.vmap(reward)(x)
        return (mass * (1 + scale * (r - mass @ r))) @ x
    form = quadratic_form(reward, posterior.dim)
    p, base = posterior.weights, posterior.mean()
    value = jax.vmap(reward)(posterior.means) - jnp.einsum("ij,kji->k", form.matrix, posterior.covs)
    slope = jax.vmap(jax.grad(reward))(posterior.means)
    within = p @ jnp.einsum("kij,kj->ki", posterior.covs, slope)
    between = (p * value) @ (posterior.means - base[None])
    return base + scale * (within + between)


def dps_denoiser(posterior: GaussianMixture, reward: rewards.Reward, scale: Array) -> Array:
    """`D + scale P ∇ r(D)`, of the guidance `∇ r(D(x))`, for any differentiable reward, `(d,)`."""
    base = posterior.mean()
    return base + scale * posterior.cov() @ jax.grad(reward)(base)


def laplace_denoiser(posterior: GaussianMixture, reward: rewards.Reward, scale: Array) -> Array:
    """`D + P (I + 2 scale H P)^-1 scale ∇ r(D)`, the denoiser of `Laplace` for a concave quadratic
    reward, `(d,)`: the mean under the tilt of one Gaussian with the posterior's moments.
    """
    mean = posterior.mean()[None]
    gaussian = posterior.replace(jnp.zeros_like(mean[:, 0]), mean, posterior.cov()[None])
    return _tilted_mean(gaussian, reward, scale)


def doob_denoiser(
    posterior: GaussianMixture, reward: rewards.Reward, scale: Array, *, nodes: int = 2
) -> Array:
    """The mean of the tilted posterior, `(d,)`. The law of this denoiser is the tilt.

    Quadrature and **Raises:** as `plug_in_denoiser`.
    """
    if not is_quadratic(reward):
        x, mass = _quadrature(posterior, nodes)
        return jax.nn.softmax(jnp.log(mass) + scale * jax.vmap(reward)(x)) @ x
    return _tilted_mean(posterior, reward, scale)


def _tilted_mean(posterior: GaussianMixture, reward: rewards.Reward, scale: Array) -> Array:
    """The mean of the tilt of a posterior by a quadratic reward, as from `theory.tilt`, but
    elementwise, for use inside the flow.
    """
    slope = scale * jax.vmap(jax.grad(reward))(posterior.means)
    bend = 2 * scale * quadratic_form(reward, posterior.dim).matrix
    eye = jnp.eye(posterior.dim, dtype=slope.dtype)

    def component(log_weight: Array, mean: Array, cov: Array, slope: Array) -> tuple:
        root = _linalg.square_root(cov)
        along = root.T @ slope
        solved, half_logdet = _linalg.solve(eye + root.T @ bend @ root, along[:, None])
        moved = solved[:, 0]
        log_weight = log_weight + scale * reward(mean) - half_logdet + along @ moved / 2
        return log_weight, mean + root @ moved

    parts = posterior.log_weights, posterior.means, posterior.covs, slope
    log_weights, means = jax.vmap(component)(*parts)
    return jax.nn.softmax(log_weights) @ means


def _quadrature(posterior: GaussianMixture, nodes: int) -> tuple[Array, Array]:
    """Points `(n, d)` and masses `(n,)` of the trapezoidal rule in all components of a posterior in
    one or two dimensions.
    """
    dim, dtype = posterior.dim, posterior.means.dtype
    if dim > 2:
        raise ValueError(
            "the mean of a reward that is not quadratic is computed in one or two dimensions, got "
            f"{dim}: use a quadratic reward, or simulate"
        )
    axis = np.linspace(-_REACH, _REACH, 2 * _REACH * nodes + 1)
    z = np.stack(np.meshgrid(*[axis] * dim, indexing="ij"), axis=-1).reshape(-1, dim)
    mass = np.exp(-np.sum(z**2, axis=1) / 2)
    z, mass = jnp.asarray(z, dtype), jnp.asarray(mass / mass.sum(), dtype)
    place = lambda mean, cov: mean[None] + z @ _linalg.square_root(cov).T
    x = jax.vmap(place)(posterior.means, posterior.covs)
    return x.reshape(-1, dim), jnp.outer(posterior.weights, mass).reshape(-1)


class Measured(NamedTuple):
    """A number, or an array of numbers, and an estimate of its error, of the same shape."""

    value: Array
    error: Array


class PointLaw(_repr.Report):
    """A law as `points` `(8, n, d)`, eight independent sets of points of it; `prior` has the modes.

    Everything but `wasserstein` compiles, vectorizes and has reverse-mode derivatives, those of
    the points.
    """

    prior: GaussianMixture
    points: Array

    def _title(self) -> str:
        sets, num, dim = self.points.shape
        return f"{type(self).__name__}: {sets} sets of {num} points in R^{dim}"

    def _rows(self) -> dict[str, str]:
        return {}

    @property
    def dim(self) -> int:
        """The dimension d."""
        return self.prior.dim

    def estimate(self, statistic: Callable[[Array], Array]) -> Measured:
        """A statistic of a set of points `(n, d)`, its mean over the eight sets and the standard
        error of this mean. The error of the solver is a thousandth of typical standard errors.
        """
        return _over_sets(jax.vmap(statistic)(self.points))

    def mean(self) -> Array:
        """`E[X]`, shape `(d,)`."""
        return self.estimate(lambda x: jnp.mean(x, axis=0)).value

    def cov(self) -> Array:
        """`Cov(X)`, shape `(d, d)`."""
        return self._moments()[1].value

    def error(self) -> tuple[Array, Array]:
        """The standard errors of `mean` and `cov`."""
        mean, cov = self._moments()
        return mean.error, cov.error

    def _moments(self) -> tuple[Measured, Measured]:
        center = self.mean()
        outer = lambda x: jnp.einsum("ni,nj->ij", x - center[None], x - center[None]) / len(x)
        return self.estimate(lambda x: jnp.mean(x, axis=0)), self.estimate(outer)

    def modes(self, x: Array) -> Array:
        """The probabilities `(K,)` of the prior's components at a point x, observed with noise of
        a thousandth of the prior's width, so that components without variance have modes too.
        """
        _, width = _center_and_width(self.prior)
        return self.prior.condition(jnp.ones_like(width), _BLUR * width, x).weights

    def masses(self, modes: Callable[[Array], Array] | None = None) -> Measured:
        """The masses of modes: `E[modes(X)]`, for a function of one point that returns the
        probability of each mode; by default the method `modes`. The error includes the mass of one
        point.

        The modes are places, not origins: guidance may carry particles of one component to the
        other side of another component.
        """
        modes = self.modes if modes is None else modes
        _checks.function(modes, "modes")
        found = self.estimate(lambda x: jnp.mean(jax.vmap(modes)(x), axis=0))
        return found._replace(error=found.error + 1 / (self.points.size // self.dim))

    def wasserstein(self, other: "PointLaw | GaussianMixture | Tilt") -> Measured:
        """W2 to another law, by exact transport between sets of points of both laws.

        With the same number of points in each set, W2^2 between sets of the same law is not zero.
        Half of it is subtracted for each of the two laws (as in the Sinkhorn divergence; Chizat et
        al., arXiv 2006.08172). The error is the standard error over the eight pairs of sets plus
        the change with half of the points. The result has no derivative.

        **Raises:** `ValueError` for laws of different dimensions, `TypeError` for any other law.
        """
        theirs = _points_of(other, self.points.shape[1])
        num = min(self.points.shape[1], theirs.shape[1])
        if theirs.shape[2] != self.dim:
            raise ValueError(
                f"laws need the same dimension for a distance, got {self.dim} and {theirs.shape[2]}"
            )
        dtype = self.points.dtype
        shape = jax.ShapeDtypeStruct((), dtype)
        sets = self.points[:, :num], theirs[:, :num]
        found = jax.pure_callback(_distance, (shape, shape), *sets, vmap_method="sequential")
        return Measured(*found)


class FlowLaw(PointLaw):
    """The law of the samples of a guided flow; built by `flow_law`.

    `transport`, `sample` and `log_prob` solve the flow for their points. All other methods use
    `points`, as those of a `PointLaw`. Everything compiles and vectorizes. Everything but
    `wasserstein` has reverse-mode derivatives, those of the solver. What moves between modes is in
    the derivatives of the few points near the parting of the flow, so derivatives of moments and
    masses need many points.
    """

    reward: rewards.Reward
    scale: scales.Scale
    denoiser: GuidedDenoiser = eqx.field(static=True)

    def transport(self, z: Array) -> Array:
        """The point of this law, `(d,)`, to which the guided flow carries the point z of
        N(0, I).
        """
        start = jnp.asarray(z, self.points.dtype)
        check_state(start, self.dim)
        return _ends(self, start[None], _FINE)[0]

    def sample(self, key: Array, num: int) -> Array:
        """`num` independent draws, `(num, d)`."""
        shape = _checks.count(num, "num"), self.dim
        start = jax.random.normal(_checks.key(key), shape, self.points.dtype)
        return _ends(self, start, _COARSE)

    def log_prob(self, x: Array) -> Array:
        """The log-density at one point `(d,)`, from the flow traced back and the integral of its
        divergence.

        **Raises:** `ValueError` for a prior without a density.
        """
        x = jnp.asarray(x, self.points.dtype)
        check_state(x, self.dim)
        if _checks.concrete(self.prior.covs):
            covs = np.asarray(self.prior.covs, np.float64)
            if np.any(np.linalg.matrix_rank(covs, hermitian=True) < self.dim):
                raise ValueError("a law of singular components has no density")
        return _traced_back(self, x)


def flow_law(
    prior: GaussianMixture,
    reward: Callable,
    scale: float | Array | scales.Scale,
    *,
    denoiser: GuidedDenoiser = plug_in_denoiser,
    num: int = 512,
) -> FlowLaw:
    """The law of a guided flow in the limit of small steps, for a mixture in any dimension.

    For one Gaussian, a quadratic reward and `plug_in_denoiser` this is `plug_in_law`; on the line
    it is `mean_drift_law`, whose quantiles are more accurate. With fresh draws, a run of N steps
    approaches this law slowly, because the drift that moves mass between modes comes from rare and
    very large draws of the guidance.

    **Arguments:** `prior`, covariances may be singular; `reward`, quadratic, or for
    `plug_in_denoiser` and `doob_denoiser` any smooth reward in one or two dimensions, for
    `dps_denoiser` in any dimension; `scale`, a number or `Damped`; `denoiser`, one of this module
    or a function `(posterior, reward, scale) -> (d,)`; `num`, a power of two, the number of points
    in each of the eight sets.

    **Raises:** `ValueError` for a prior that is one point, for a scale law that does not depend on
    time alone, for `StepReward`, whose gradient is zero, and for a reward that the denoiser does
    not take. `RuntimeError` from the solver where the flow is too stiff.
    """
    check_mixture(prior, "prior")
    if isinstance(denoiser, eqx.Module):
        raise TypeError(
            f"flow_law takes a denoiser of the posterior alone, got {type(denoiser).__name__}: the "
            "fields of run_law may have draws and a memory, and have a law after N steps only. Use "
            "theory.run_law."
        )
    _checks.function(denoiser, "denoiser")
    num = _checks.count(num, "num")
    if num < 4 or num & (num - 1):
        raise ValueError(f"num must be a power of two and at least 4, got {num}")
    if prior.width == 0:
        raise ValueError("the prior is one point, and no flow moves it")
    law = _pytree.cast(scales.as_scale(scale), prior.means.dtype)
    if not isinstance(law, scales.Constant | scales.Damped):
        raise ValueError(f"the scale must be a number or Damped, got {type(law).__name__}")
    reward = _pytree.cast(rewards.as_reward(reward), prior.means.dtype)
    _check_reward(denoiser, prior, reward, law)
    start = jnp.asarray(normal_points(num, prior.dim), prior.means.dtype)
    unsolved = FlowLaw(prior, start, reward, law, denoiser)
    ends = _ends(unsolved, start.reshape(-1, prior.dim), _COARSE)
    return FlowLaw(prior, ends.reshape(start.shape), reward, law, denoiser)


def _check_reward(
    denoiser: GuidedDenoiser, prior: GaussianMixture, reward: rewards.Reward, law: scales.Scale
) -> None:
    """Raise a `ValueError` for a reward that a denoiser does not take."""
    if has_step(reward):
        raise ValueError(
            "StepReward has gradient zero almost everywhere: guidance by fresh draws and DPS do "
            "not change the prior. Use theory.best_of_n for selection."
        )
    if denoiser is laplace_denoiser:
        if not is_quadratic(reward):
            raise ValueError(
                f"laplace_denoiser takes quadratic rewards, got {type(reward).__name__}: use "
                "another denoiser, or simulate"
            )
        check_domain(prior, quadratic_form(reward, prior.dim), law.final)
    if denoiser is doob_denoiser and is_quadratic(reward):
        check_mass(prior, quadratic_form(reward, prior.dim), law.final)
    by_quadrature = denoiser in (plug_in_denoiser, doob_denoiser) and not is_quadratic(reward)
    if by_quadrature and _checks.concrete((prior, reward, law)):
        # The prior is the widest posterior: nodes that resolve it resolve the posterior.
        usual, fine = (_denoised(denoiser, prior, reward, law.final, n) for n in (2, 4))
        _, width = _center_and_width(prior)
        if not np.max(np.abs(usual - fine)) < 1e-3 * width:
            raise ValueError(
                "quadrature does not resolve this reward: pass "
                f"denoiser=functools.partial(theory.{denoiser.__name__}, nodes=8), or lower the "
                "scale"
            )


@eqx.filter_jit
def _denoised(
    denoiser: Any, prior: GaussianMixture, reward: rewards.Reward, scale: Array, nodes: int
) -> Array:
    return denoiser(prior, reward, scale, nodes=nodes)


def _center_and_width(prior: GaussianMixture) -> tuple[Array, Array]:
    return prior.mean(), jnp.sqrt(jnp.trace(prior.cov()) / prior.dim)


class _Flow(eqx.Module):
    """The differential equation of a law."""

    prior: GaussianMixture
    reward: rewards.Reward
    scale: scales.Scale
    center: Array
    width: Array
    denoiser: GuidedDenoiser = eqx.field(static=True)

    @classmethod
    def of(cls, law: FlowLaw) -> "_Flow":
        prior = law.prior.decomposed()
        return cls(prior, law.reward, law.scale, *_center_and_width(prior), law.denoiser)

    def denoise(self, tau: Array, y: Array) -> Array:
        """The guided denoiser `(M - c) / s`."""
        cos, sin = 1 / jnp.cosh(tau), jnp.tanh(tau)
        alpha = sin / self.width
        posterior = self.prior.condition(alpha, cos, y + alpha * self.center)
        strength = strength_at(self.scale, cos, alpha)
        return (self.denoiser(posterior, self.reward, strength) - self.center) / self.width

    def velocity(self, tau: Array, y: Array) -> Array:
        return self.denoise(tau, y) - jnp.tanh(tau) * y


def _precision(dtype: Any) -> tuple[float, float]:
    """The tolerance of the solver, and the end of the flow."""
    double = dtype == jnp.float64
    return (1e-9, np.arccosh(1e6)) if double else (1e-6, np.arccosh(1e3))


def _ends(law: FlowLaw, start: Array, tolerance_factor: float) -> Array:
    tolerance, _ = _precision(start.dtype)
    # An argument, so that points of any tolerance share one program.
    return _solved_ends(law, start, jnp.asarray(tolerance * tolerance_factor, start.dtype))


@eqx.filter_jit
def _solved_ends(law: FlowLaw, start: Array, tolerance: Array) -> Array:
    """The points `(n, d)` of the law to which the flow carries points `(n, d)`."""
    flow, (_, end) = _Flow.of(law), _precision(start.dtype)
    times = jnp.zeros((), start.dtype), jnp.asarray(end, start.dtype)
    field = lambda tau, y, args: flow.velocity(tau, y)

    def one(start: Array) -> Array:
        y = end_of(field, start, *times, tolerance, tolerance)
        return flow.center + flow.width * flow.denoise(times[1], y)

    return jax.vmap(one)(start)


@eqx.filter_jit
def _traced_back(law: FlowLaw, x: Array) -> Array:
    flow, (tolerance, end) = _Flow.of(law), _precision(x.dtype)
    times = jnp.asarray(end, x.dtype), jnp.zeros((), x.dtype)

    def field(tau: Array, state: tuple[Array, Array], args: None) -> tuple[Array, Array]:
        velocity = lambda y: flow.velocity(tau, y)
        y = jnp.clip(state[0], -_FAR, _FAR)
        return velocity(y), jnp.trace(jax.jacfwd(velocity)(y))

    start = (x - flow.center) / flow.width, jnp.zeros((), x.dtype)
    tolerance = jnp.asarray(tolerance, x.dtype)
    z, growth = end_of(field, start, *times, tolerance, tolerance)
    # `growth` is the integral of the divergence from the end to the start, minus log |dx/dz|.
    normal = -z @ z / 2 - law.dim * float(np.log(2 * np.pi)) / 2
    return normal + growth - law.dim * jnp.log(flow.width)


@functools.cache
def uniform_points(num: int, dim: int) -> np.ndarray:
    """Eight scramblings of a Sobol sequence, `(8, num, dim)`, inside the unit cube."""
    from scipy.stats import qmc  # a fifth of a second

    sets = [
        qmc.Sobol(dim, rng=np.random.default_rng((dim, i))).random(num) for i in range(_SCRAMBLINGS)
    ]
    return np.clip(np.stack(sets), 1e-12, 1 - 1e-12)


def normal_points(num: int, dim: int) -> np.ndarray:
    """Eight sets of points of N(0, I), `(8, num, dim)`."""
    from scipy.special import ndtri

    return ndtri(uniform_points(num, dim))


def _points_of(law: Any, num: int) -> Array:
    """Points `(8, num, d)` of a law, independent of those of a `PointLaw`."""
    law = law.mixture if isinstance(law, Tilt) else law
    if isinstance(law, PointLaw):
        # Another pairing of the sets, so that no set meets the set of the same starts.
        return jnp.roll(law.points, 1, axis=0)
    check_mixture(law, "the other law")
    return mixture_points(law, num)


def mixture_points(mixture: GaussianMixture, num: int) -> Array:
    """Eight sets of quasi-random points of a mixture, `(8, num, d)`."""
    dim, dtype = mixture.dim + 1, mixture.means.dtype
    level, z = uniform_points(num, dim)[..., 0], normal_points(num, dim)[..., 1:]
    return _mixture_points(mixture, jnp.asarray(level, dtype), jnp.asarray(z, dtype))


@jax.jit
def _mixture_points(mixture: GaussianMixture, level: Array, z: Array) -> Array:
    edges = jnp.cumsum(mixture.weights)
    component = jnp.searchsorted(edges / edges[-1], level)
    roots = jax.vmap(_linalg.square_root)(mixture.covs)
    return mixture.means[component] + jnp.einsum("snij,snj->sni", roots[component], z)


def _over_sets(values: Array) -> Measured:
    error = jnp.std(values, axis=0, ddof=1) / np.sqrt(len(values)).astype(values.dtype)
    return Measured(jnp.mean(values, axis=0), error)


def _distance(ours: np.ndarray, theirs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """W2 and its error, between laws given by sets of points `(8, n, d)`."""
    dtype, (ours, theirs) = ours.dtype, (np.asarray(part, np.float64) for part in (ours, theirs))
    half = ours.shape[1] // 2
    squares = _debiased(ours, theirs)
    coarse = _debiased(ours[:, :half], theirs[:, :half])
    error = np.std(squares, ddof=1) / np.sqrt(len(squares))
    error += abs(np.mean(squares) - np.mean(coarse))
    # The larger of the two changes of the root.
    low, value, high = (
        np.sqrt(max(np.mean(squares) + change, 0.0)) for change in (-error, 0.0, error)
    )
    return value.astype(dtype), max(value - low, high - value).astype(dtype)


def _debiased(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Squares of W2 between pairs of sets, minus half of those within each law."""
    costs = lambda one, other: np.array([_cost(*pair) for pair in zip(one, other, strict=True)])
    within = costs(ours, np.roll(ours, 1, axis=0)) + costs(theirs, np.roll(theirs, 1, axis=0))
    return costs(ours, theirs) - within / 2


def _cost(x: np.ndarray, y: np.ndarray) -> float:
    """W2^2 between two sets of as many points."""
    if x.shape[1] == 1:
        return float(np.mean((np.sort(x[:, 0]) - np.sort(y[:, 0])) ** 2))
    from scipy.optimize import linear_sum_assignment
    from scipy.spatial.distance import cdist

    costs = cdist(x, y, "sqeuclidean")
    return float(np.mean(costs[linear_sum_assignment(costs)]))
