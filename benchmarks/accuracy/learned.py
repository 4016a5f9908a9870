"""How much of a method's error comes from the learned network?

A velocity network (3 x 256) is trained on the two-mode `quadratic` prior by flow matching. `Tilted`
and `Conjugate` run with the network and with the exact model, for targets inside and outside of the
data. Reported are W2 to the exact tilt over the floor, and the mean along the target's direction. A
second table compares the calibrated variance v(snr) of both models with the exact posterior
variance.

    python -m benchmarks.accuracy.learned [--quick]
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import theory
import tiltjax as tj
from benchmarks import common

CASES = (
    ((0.0, 2.5), 0.3),
    ((0.0, 2.5), 1.0),
    ((0.0, 2.5), 3.0),
    ((0.0, 2.5), 10.0),
    ((1.5, 0.5), 3.0),
    ((0.0, 5.0), 3.0),
)


class Velocity(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(n, width, rngs=rngs) for n in (3, width, width)])
        self.last = nnx.Linear(width, 2, rngs=rngs)

    def __call__(self, t, x):
        hidden = jnp.concatenate([x, t[:, None]], axis=1)
        for layer in self.layers:
            hidden = nnx.gelu(layer(hidden))
        return self.last(hidden)


def trained(
    prior: tj.GaussianMixture, key: jax.Array, steps: int, batch: int = 512
) -> tuple[Velocity, float]:
    """The network after `steps` of Adam on a cosine schedule, and its last losses."""
    graph, parameters = nnx.split(Velocity(256, nnx.Rngs(0)))
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-3, steps))

    def loss(parameters, key):
        key_data, key_noise, key_time = jax.random.split(key, 3)
        x1, x0 = prior.sample(key_data, batch), jax.random.normal(key_noise, (batch, 2))
        t = jax.random.uniform(key_time, (batch,))
        x = t[:, None] * x1 + (1 - t[:, None]) * x0
        return jnp.mean((nnx.merge(graph, parameters)(t, x) - (x1 - x0)) ** 2)

    def step(carry, key):
        parameters, state = carry
        value, slope = jax.value_and_grad(loss)(parameters, key)
        updates, state = optimizer.update(slope, state)
        return (optax.apply_updates(parameters, updates), state), value

    run = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys))
    (parameters, _), losses = run(
        (parameters, optimizer.init(parameters)), jax.random.split(key, steps)
    )
    return nnx.merge(graph, parameters), float(losses[-200:].mean())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="500 training steps, 500 samples")
    args = parser.parse_args()
    steps, num, seeds = (500, 500, 1) if args.quick else (6000, 2000, 3)
    prior = tj.problems.quadratic().prior
    network, loss = trained(prior, jax.random.key(0), steps)
    models = {
        "exact": tj.Analytic(prior),
        "network": tj.from_velocity(network, shape=(2,), batched=True),
    }
    print(f"loss of the last 200 of {steps} steps {loss:.4f}")

    data = prior.sample(jax.random.key(1), 8192)
    tables = {
        name: tj.calibrate(jax.random.key(2), model, budget=2**18, data=data)
        for name, model in models.items()
    }
    ratio = np.exp(np.asarray(tables["network"].log_variance - tables["exact"].log_variance))
    snr = np.exp(np.asarray(tables["exact"].log_snr))
    between = (snr > 1e-4) & (snr < 1e4)
    print(
        "v(snr) of the network over the exact model's, snr in [1e-4, 1e4]: "
        f"{ratio[between].min():.3f} to {ratio[between].max():.3f}\n"
    )

    rows = []
    print(
        "| target | scale | floor | "
        + " | ".join(f"{m}, {n}" for m in ("Tilted", "Conjugate") for n in models)
        + " |"
    )
    print("|---|---|---|" + "---|" * 4)
    for target, scale in CASES:
        reward = tj.rewards.Quadratic(target)
        truth = theory.tilt(prior, reward, scale)
        exact = [truth.sample(jax.random.key(100 + s), num) for s in range(seeds)]
        floor = np.mean(
            [
                tj.metrics.wasserstein(x, truth.sample(jax.random.key(200 + s), num))
                for s, x in enumerate(exact)
            ]
        )
        row = {
            "target": target,
            "scale": scale,
            "floor": floor,
            "mean": np.asarray(truth.mixture.mean()).tolist(),
        }
        for method in ("Tilted", "Conjugate"):
            for name, model in models.items():
                # As a plain function the reward hides its form, so that Conjugate must fit it.
                hidden = lambda x, reward=reward: reward(x)
                tilted = method == "Tilted"
                guidance = (
                    None if tilted else tj.Conjugate(model, hidden, scale, variance=tables[name])
                )
                source = tj.Tilted(model, reward, scale) if tilted else model
                samples = [
                    tj.sample(jax.random.key(s), source, guidance, num=num, steps=50).x
                    for s in range(seeds)
                ]
                w2 = [tj.metrics.wasserstein(x, y) for x, y in zip(samples, exact, strict=True)]
                mean = np.mean([np.asarray(x).mean(axis=0) for x in samples], axis=0)
                row[f"{method}, {name}"] = {"w2": np.mean(w2), "mean": mean.tolist()}
        rows.append(row)
        cells = [
            f"{row[f'{m}, {n}']['w2'] / floor:.2f} x, mean {row[f'{m}, {n}']['mean'][1]:.2f}"
            for m in ("Tilted", "Conjugate")
            for n in models
        ]
        print(
            f"| {target}, mean {row['mean'][1]:.2f} | {scale} | {floor:.3f} | "
            + " | ".join(cells)
            + " |",
            flush=True,
        )
    if not args.quick:
        variance = {"snr": snr.tolist(), "ratio": ratio.tolist()}
        results = {
            "num": num,
            "seeds": seeds,
            "training_steps": steps,
            "loss": loss,
            "variance": variance,
            "rows": rows,
        }
        common.write("learned", results)


if __name__ == "__main__":
    main()
