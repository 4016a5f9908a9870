"""On the toys of DAS with learned networks, how much of a method's error comes from the network?

The toys are the two mixtures of `toys.py` and the swiss roll,
`(s cos s / 2, s sin s / 2, z) + N(0, .3^2 I)` with s uniform on 3 pi [1/2, 3/2] and z on [-3, 3],
with the reward `-x^2 / 100 - y^2 / 100 - z^2`. For each, a network of the published size (two
layers of 64 units) is trained from scratch to predict the noise at 1,000 levels. Every method runs
twice, with the exact denoiser and with the network. Reported are the mean reward with its standard
error (over runs of 100 particles, of which ten are used, or over points if there are no runs), and
the earth mover's distance of 500 points to 500 of the target, mean and standard deviation over
twenty subsets. The floor is that of the target itself. There are 100 ancestral steps at scale 1;
`published` is as in `toys.py`.

The roll is a product of a curve in the plane and an interval. Both are approximated by small
Gaussians of the roll's own noise, closer to each other than their width, so that the denoiser and
the tilt have closed forms. A second table has the reports of `tj.audit` for two guidances with
either model.

    python -m benchmarks.weighted.toys_learned [--quick]
"""

import argparse
import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import theory
import tiltjax as tj
from benchmarks import common
from benchmarks.weighted import toys

WIDTH, DEPTH, BATCH = 64, 2, 1024
NOISE, SPACING = 0.3, 0.25


class Clamped(tj.rewards.Reward):
    """A quadratic reward whose squares, and their gradients, are clipped at 10,000, as in the
    notebooks. Diverged samples need the clip.
    """

    reward: tj.rewards.Quadratic

    def __call__(self, x: jax.Array) -> jax.Array:
        return -jnp.sum(self.reward.weight * jnp.minimum((x - self.reward.target) ** 2, 1e4))


class Toy(NamedTuple):
    """A data law: `prior`, a mixture; the exact model; a sampler of clean states; and the width of
    a mode.
    """

    prior: tj.GaussianMixture
    exact: tj.Model
    draw: Callable
    reward: tj.rewards.Quadratic
    width: float

    @property
    def clamped(self) -> Clamped:
        return Clamped(self.reward)


def mixture(means: list, reward: tj.rewards.Quadratic, path: tj.DiscreteVP) -> Toy:
    # Eight modes are written as nine, with one mode in two halves, so that both mixtures share one
    # compiled program.
    extra = 9 - len(means)
    weights = np.repeat([0.5, 1.0], [2 * extra, 9 - 2 * extra])
    prior = tj.GaussianMixture(weights, means[:extra] + means, 0.3 * np.stack([np.eye(2)] * 9))
    return Toy(
        prior, tj.Analytic(prior, path), lambda key: prior.sample(key, BATCH), reward, 0.3**0.5
    )


def roll(path: tj.DiscreteVP) -> Toy:
    """The swiss roll. The centers of its Gaussians have equal steps along the curve, weighted by
    the range of s in each step.
    """
    point = lambda s: np.stack([s * np.cos(s), s * np.sin(s)], axis=-1) / 2
    fine = np.linspace(1.5 * np.pi, 4.5 * np.pi, 100_001)
    length = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(point(fine), axis=0), axis=1))])
    num = int(length[-1] / SPACING)
    # Edges and middles alternate.
    at = np.interp(np.arange(2 * num + 1) / (2 * num) * length[-1], length, fine)
    curve, shares = point(at[1::2]), np.diff(at[::2]) / np.ptp(fine)
    count = int(6 / SPACING)
    line = -3 + 6 * (np.arange(count) + 0.5) / count
    means = np.concatenate([np.repeat(curve, count, axis=0), np.tile(line, num)[:, None]], axis=1)
    covs = np.broadcast_to(NOISE**2 * np.eye(3), (len(means), 3, 3))
    prior = tj.GaussianMixture(np.repeat(shares, count), means, covs)

    def mean(t, x, centers, weights):
        alpha, spread = path.alpha(t), path.alpha(t) ** 2 * NOISE**2 + path.sigma(t) ** 2
        off = jnp.sum((x[None] - alpha * centers) ** 2, axis=1) / (2 * spread)
        center = jax.nn.softmax(jnp.log(weights) - off) @ centers
        return center + alpha * NOISE**2 / spread * (x - alpha * center)

    plane = jnp.asarray(curve), jnp.asarray(shares)
    height = jnp.asarray(line[:, None]), jnp.full(count, 1 / count)
    denoise = lambda t, x: jnp.concatenate([mean(t, x[:2], *plane), mean(t, x[2:], *height)])

    def draw(key):
        key_s, key_z, key_noise = jax.random.split(key, 3)
        s = 3 * jnp.pi * (0.5 + jax.random.uniform(key_s, (BATCH,)))
        z = 6 * jax.random.uniform(key_z, (BATCH,)) - 3
        on = jnp.stack([s * jnp.cos(s) / 2, s * jnp.sin(s) / 2, z], axis=1)
        return on + NOISE * jax.random.normal(key_noise, on.shape)

    reward = tj.rewards.Quadratic([0.0, 0.0, 0.0], weight=[0.01, 0.01, 1.0])
    return Toy(prior, tj.from_denoiser(denoise, shape=(3,), interpolant=path), draw, reward, NOISE)


def trained(toy: Toy, path: tj.DiscreteVP, steps: int) -> tuple[tj.Model, float]:
    """The model of a network after `steps` steps, and the mean loss of its last tenth."""
    shape = toy.exact.shape
    network = tj.training.networks.Velocity(shape, width=WIDTH, depth=DEPTH, rngs=nnx.Rngs(0))
    levels = lambda key: path.clock(jax.random.randint(key, (), 0, len(toys.LEVELS)))
    settings: dict[str, Any] = {"interpolant": path, "batched": True}
    fit = tj.fit(
        jax.random.key(0),
        network,
        toy.draw,
        steps=steps,
        target=tj.from_noise,
        time_sampler=levels,
        learning_rate=3e-3,
        **settings,
    )
    return tj.from_noise(fit.average, shape=shape, **settings), float(
        fit.curve.loss[-steps // 10 :].mean()
    )


@eqx.filter_jit
def weighed(
    keys: jax.Array,
    method: Callable,
    model: tj.Model,
    steered: tj.guidance.Guidance | tj.rewards.Reward,
    times: jax.Array,
    settings: dict,
) -> jax.Array:
    """Points `(runs, n, d)`, each run of 100 weighted particles: from `smc` with a guidance, or
    from a published method with a reward.
    """

    def one(key):
        key_run, key_keep = jax.random.split(key)
        particles = method(key_run, model, steered, num=100, times=times, **settings)
        return particles.resample(key_keep, toys.KEPT)

    return jax.lax.map(one, keys, batch_size=50)


@eqx.filter_jit
def faulty(
    keys: jax.Array, model: tj.Model, reward: tj.rewards.Reward, times: jax.Array
) -> jax.Array:
    """Points `(runs, n, d)` of the published loop with its faults."""

    def one(key):
        key_run, key_keep = jax.random.split(key)
        particles = toys.notebook(
            key_run, model, reward, times, 100, descends=False, weighs_last=False
        )
        return particles.resample(key_keep, toys.KEPT)

    return jax.lax.map(one, keys, batch_size=50)


def methods(toy: Toy, model: tj.Model, times: jax.Array, runs: int) -> dict[str, Callable]:
    """Functions of a key that return points `(runs, n, d)`."""
    reward, total = toy.clamped, runs * toys.KEPT
    dps, laplace = tj.dps(model, reward, 1.0), tj.Laplace(model, reward, 1.0)
    conjugate = tj.Conjugate(
        model, reward, 1.0, variance=tj.calibrate(jax.random.key(0), model, budget=2**18)
    )
    glass = tj.Glass(model, inner_steps=5, order=2)
    # GLASS evaluates the network at lower noise than that of its time, but the network is trained
    # only down to level 0. The jump therefore comes ten levels earlier.
    inner = jnp.delete(times, -2)

    def sampled(guidance=None, times=times, solver=None):
        solver = tj.Ancestral() if solver is None else solver
        return lambda key: tj.sample(key, model, guidance, num=total, times=times, solver=solver).x[
            :, None
        ]

    def shifted(proposal):
        settings = {"num": total, "times": times, "ess_threshold": 0.0}
        return lambda key: tj.smc(key, model, dps, proposal=proposal, **settings).x[:, None]

    def weighted(method, steered, times=times, **settings):
        return lambda key: weighed(
            jax.random.split(key, runs), method, model, steered, times, settings
        )

    many = lambda key: tj.sample(key, model, num=16 * total, times=times, solver=tj.Ancestral())
    plug_in = lambda k, scale=1.0: sampled(tj.PlugIn(glass, reward, scale, k=k))
    return {
        "base": sampled(),
        "guided, no weights": shifted(tj.weighted.proposals.Shifted()),
        "guided by ∇ r(D), no weights": shifted(toys.Unscaled()),
        "FMRG": sampled(tj.fmrg(model, reward, 1.0, inner_steps=3), solver=tj.Heun()),
        "plug-in, k = 1": plug_in(1),
        "plug-in, k = 8": plug_in(8),
        "damped plug-in": plug_in(1, tj.Damped(1.0, toy.width)),
        "Laplace": sampled(laplace),
        "Conjugate": sampled(conjugate, times=inner),
        "Gibbs": lambda key: tj.gibbs(
            key, model, toy.reward, 1.0, num=total // 4, steps=20, max_sweeps=500
        ).x[:, None],
        "best-of-16": lambda key: tj.best_of_n(many(key), reward, 16).x[:, None],
        "softmax-of-16": lambda key: tj.softmax_of_n(
            jax.random.key(6), many(key), reward, 16, 1.0
        ).x[:, None],
        "DAS, both faults": lambda key: faulty(jax.random.split(key, runs), model, reward, times),
        "DAS": weighted(tj.das, reward, gamma=toys.GAMMA),
        "TDS": weighted(tj.tds, reward),
        "FK steering": weighted(tj.fk_steering, reward),
        "Laplace twist": weighted(tj.smc, laplace),
        "Conjugate, Laplace twist": weighted(tj.smc, conjugate, times=inner, twist=laplace),
    }


def slope(model: tj.Model, path: tj.DiscreteVP) -> float:
    """The root mean square of the entries of `∂D/∂x` at the noisiest level, where the network's
    error in the noise is multiplied by sigma / alpha.
    """
    t = path.clock(jnp.asarray(len(toys.LEVELS) - 1.0))
    x = jax.random.normal(jax.random.key(7), (1000, *model.shape))
    return float(jnp.sqrt(jnp.mean(jax.vmap(jax.jacrev(lambda x: model.denoise(t, x)))(x) ** 2)))


def audits(toy: Toy, model: tj.Model, times: jax.Array, num: int) -> dict:
    """The reports of `tj.audit` for two guidances, with log Z compared with the tilt's."""
    log_norm = float(theory.tilt(toy.prior, toy.reward, 1.0).log_norm)
    guidances = {
        "DPS": tj.dps(model, toy.clamped, 1.0),
        "Laplace": tj.Laplace(model, toy.clamped, 1.0),
    }
    rows = {}
    for name, guidance in guidances.items():
        report = tj.audit(jax.random.key(5), model, guidance, num=num, times=times)
        rows[name] = {
            "share": report.ess_fraction,
            "pareto_k": report.pareto_k,
            "path_kl": list(report.path_kl),
            "log_norm_off": [report.log_norm.value - log_norm, report.log_norm.error],
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="500 training steps, few runs; nothing is written"
    )
    quick = parser.parse_args().quick
    warnings.filterwarnings("ignore", "the effective sample size")
    runs, steps = (20, 500) if quick else (200, 8000)
    path = tj.DiscreteVP(toys.LEVELS)
    times = toys.grid(path)
    problems = {name: mixture(*law, path) for name, law in toys.TOYS.items()} | {
        "swiss roll": roll(path)
    }
    began, table, seen, losses, slopes = common.cpu_seconds(), {}, {}, {}, {}
    for place, (name, toy) in enumerate(problems.items()):
        start = common.cpu_seconds()
        network, losses[name] = trained(toy, path, steps)
        print(
            f"\n{name}: loss {losses[name]:.4f} after {steps} steps, "
            f"{common.cpu_seconds() - start:.0f} CPU-s",
            flush=True,
        )
        truth = theory.tilt(toy.prior, toy.reward, 1.0)
        target = np.asarray(truth.sample(jax.random.key(1), 10_000))
        judge = functools.partial(
            toys.judged, reward=toy.clamped, target=target, rng=np.random.default_rng(0)
        )
        floor = judge(truth.sample(jax.random.key(2), 10_000)[:, None])
        floor["reward"] = [float(theory.expected_reward(truth.mixture, toy.reward)), 0.0]
        models = {"exact": toy.exact, "learned": network}
        slopes[name] = {which: slope(model, path) for which, model in models.items()}
        print(f"slope of the denoiser at the noisiest level: {slopes[name]}", flush=True)
        rows: dict[str, dict] = {"target (floor)": dict.fromkeys(models, floor)}
        for which, model in models.items():
            for method, run in methods(toy, model, times, runs).items():
                start = common.cpu_seconds()
                try:
                    row = judge(run(jax.random.key(3)))
                except FloatingPointError as error:
                    row = {"failed": "not finite", "why": str(error)}
                except RuntimeError as error:  # of Gibbs, which raises if its chain has not mixed
                    row = {"failed": "not mixed", "why": str(error)}
                rows.setdefault(method, {})[which] = row
                print(
                    f"{which} {method}: {' '.join(cells(row))} ({common.cpu_seconds() - start:.1f} "
                    "CPU-s)",
                    flush=True,
                )
            seen.setdefault(name, {})[which] = audits(toy, model, times, 400 if quick else 2000)
        for method, row in rows.items():
            row["published"] = toys.PUBLISHED[method][place] if method in toys.PUBLISHED else None
        table[name] = rows
        show(name, rows, seen[name])
    cpu = common.cpu_seconds() - began
    print(f"\n{cpu:.0f} CPU-s in all")
    if not quick:
        settings = {
            "runs": runs,
            "training_steps": steps,
            "batch": BATCH,
            "width": WIDTH,
            "depth": DEPTH,
        }
        results = {
            "settings": settings,
            "cpu_seconds": cpu,
            "loss": losses,
            "slope": slopes,
            "table": table,
            "audits": seen,
        }
        common.write("toys_learned", results)


def cells(row: dict) -> list[str]:
    """The mean reward and EMD of a row, or a note if the run failed."""
    if "failed" in row:
        return [row["failed"]] * 2
    return ["{:.3f} ± {:.3f}".format(*row["reward"]), "{:.2f} ± {:.2f}".format(*row["emd"])]


def show(name: str, rows: dict, reports: dict) -> None:
    """Print the tables of one toy."""
    print(
        f"\n| {name} | reward, exact | learned | EMD, exact | learned | published "
        "|\n|---|---|---|---|---|---|"
    )
    for method, row in rows.items():
        rewards, distances = zip(
            *(cells(row[which]) for which in ("exact", "learned")), strict=True
        )
        published = "" if row["published"] is None else f"{row['published']:.2f}"
        print(f"| {method} | {' | '.join(rewards + distances)} | {published} |")
    print(
        "\n| audit | model | effective share | Pareto k | path KL | log Z off "
        "|\n|---|---|---|---|---|---|"
    )
    for which, report in reports.items():
        for method, row in report.items():
            kl, off = ("{:.3f} ± {:.3f}".format(*row[key]) for key in ("path_kl", "log_norm_off"))
            print(
                f"| {method} | {which} | {row['share']:.3f} | {row['pareto_k']:.2f} | {kl} | "
                f"{off} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
