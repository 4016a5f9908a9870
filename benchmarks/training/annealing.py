"""How close do fine-tuning, LoRA scaling and annealing come to the best trade-off between reward
and
divergence?

The data are the mixtures of the DAS toys and its swiss roll. For each, a network of 3 x 128 units
is trained from scratch and fine-tuned on the reward through all steps of its chain: with the
divergence, at several scales; and without it, as in DRaFT (adapters of rank 4), stopped early. LoRA
scaling (a share c of the adapters at all times) and annealing (a share g(t) of the tuned denoiser)
interpolate between the base and the network tuned without the divergence. Weighted annealing
samples the geometric mean of the two laws at the end.

Each method is judged by the law of its flow (60 Heun steps): the mean reward; the divergence
`KL(q | data)` in nats, from the density of its own samples; and the coverage of the data by as many
samples. Of all laws with one mean reward, the exact tilt is nearest to the data, so that no point
lies above the tilt's curve, up to the errors shown. The divergence of a weighted run comes from its
normalizing constants. For `p^(1 - g) q^g` it is `g (log Z)' - log Z`; the divergence of the base
network is not included.

The second table follows fine-tuning without a divergence over its steps: the reward tends to its
maximum, the entropy to minus infinity.

    python -m benchmarks.training.annealing [--quick]
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import optax
from flax import nnx

import theory
import tiltjax as tj
from benchmarks import common
from benchmarks.weighted import toys, toys_learned

FIGURES = Path(__file__).parents[2] / "docs"
SCALES = (0.1, 0.3, 1.0, 3.0)
SHARES = (0.25, 0.5, 0.75, 1.0)
SCHEDULES = {"t": 1.0, "t^2": 2.0, "t^4": 4.0}
LENGTHS = (10, 30, 100, 300)


def frontier(toy, base_scale: float = 1.0) -> np.ndarray:
    """The mean rewards and minus the divergences of the exact tilts, by increasing scale."""
    points = []
    for scale in np.concatenate([[0.0], np.geomspace(0.01, 30.0, 40)]):
        tilt = theory.tilt(toy.prior, toy.reward, float(scale))
        mean = float(theory.expected_reward(tilt.mixture, toy.reward))
        points.append((mean, float(tilt.log_norm) - scale * mean))
    return np.asarray(points)


def judge(toy, model: tj.Model, base_draws: jax.Array, num: int) -> dict:
    """The mean reward, the divergence and the coverage of the law of a model's flow."""
    x, log_prob = tj.sample_with_log_prob(jax.random.key(5), model, num=num, steps=60)
    error = lambda values: float(np.std(values, ddof=1) / math.sqrt(num))
    rewards = np.asarray(jax.vmap(toy.reward)(x), np.float64)
    gaps = np.asarray(
        log_prob - jax.lax.map(toy.prior.log_prob, x.astype(toy.prior.means.dtype), batch_size=500),
        np.float64,
    )
    return {
        "reward": (float(rewards.mean()), error(rewards)),
        "divergence": (float(gaps.mean()), error(gaps)),
        "coverage": float(tj.metrics.coverage(x, base_draws.astype(x.dtype))),
        "entropy": float(tj.metrics.truncated_entropy(x, x.shape[1])),
    }


def weighted(toy, base: tj.Model, tuned: tj.Model, share: float, num: int, runs: int) -> dict:
    """The geometric mean of the two laws: its reward, and its divergence from the normalizing
    constants, over runs.
    """
    step = 0.05

    def one(key: jax.Array, share: float) -> tuple[jax.Array, jax.Array]:
        run = tj.smc(key, base, tj.Tuned(base, tuned, share), num=num, steps=100)
        return run.mean(toy.reward), run.log_norm

    keys = jax.random.split(jax.random.key(6), runs)
    (rewards, middle), (_, below), (_, above) = (
        jax.lax.map(lambda key, s=s: one(key, s), keys) for s in (share, share - step, share + step)
    )
    gaps = np.asarray(share * (above - below) / (2 * step) - middle, np.float64)
    rewards = np.asarray(rewards, np.float64)
    error = lambda values: float(values.std(ddof=1) / math.sqrt(runs))
    return {
        "reward": (float(rewards.mean()), error(rewards)),
        "divergence": (float(gaps.mean()), error(gaps)),
    }


def study(name: str, toy, args) -> dict:
    shape = toy.exact.shape
    train, tune, num, runs = (300, 20, 500, 3) if args.quick else (4000, 300, 3000, 6)
    network = tj.training.networks.Velocity(shape, width=128, depth=3, rngs=nnx.Rngs(0))
    network = tj.fit(
        jax.random.key(0), network, toy.draw, steps=train, learning_rate=2e-3, batched=True
    ).average
    build = lambda network: tj.from_velocity(network, shape=shape)
    adapted = jax.tree_util.Partial(
        lambda network, adapters: build(tj.training.lora.merge(network, adapters)), network
    )
    base = build(network)
    draws = toy.prior.sample(jax.random.key(4), num)
    rows: list[dict] = []

    def row(title: str, setting: str, result: dict) -> None:
        rows.append({"method": title, "setting": setting, **result})
        shown = " ".join(f"{key} {value}" for key, value in result.items())
        print(f"{name}: {title} {setting}: {shown}", flush=True)

    def tuned(trained, scale: float, model: Callable, steps: int, **settings):
        return tj.finetune(
            jax.random.key(1),
            trained,
            base,
            toy.reward,
            scale,
            model=model,
            steps=steps,
            **settings,
        )

    row("base network", "", judge(toy, base, draws, num))
    for scale in SCALES:
        fit = tuned(network, scale, build, tune, rate=1e-3)
        row(
            "fine-tuned with the divergence",
            f"scale {scale:g}",
            judge(toy, build(fit.average), draws, num),
        )

    adapters = tj.training.lora.init(jax.random.key(2), network, 4)
    early = tuned(adapters, math.inf, adapted, tune // 2, rate=1e-3).average
    tip = adapted(early)
    for share in SHARES:
        model = build(tj.training.lora.merge(network, early, share))
        row("LoRA scaling", f"c = {share:g}", judge(toy, model, draws, num))
    for share in SHARES[:-1]:
        row(
            "constant share of the denoiser",
            f"g = {share:g}",
            judge(toy, tj.Annealed(base, tip, share), draws, num),
        )
    for label, p in SCHEDULES.items():
        row(
            "annealed",
            f"g = {label}",
            judge(toy, tj.Annealed(base, tip, tj.models.power(p)), draws, num),
        )
    row("annealed", "step .6", judge(toy, tj.Annealed(base, tip, tj.models.step(0.6)), draws, num))
    flow = lambda model: np.asarray(tj.sample(jax.random.key(3), model, num=500).x)
    same = bool(np.array_equal(flow(tj.Annealed(base, base, tj.models.power(2.0))), flow(base)))
    for share in SHARES[:-1]:
        row("weighted annealing", f"g = {share:g}", weighted(toy, base, tip, share, num, runs))

    collapse, trained, done = [{"steps": 0, **judge(toy, base, draws, num)}], network, 0
    for length in LENGTHS[: 2 if args.quick else None]:
        trained = tuned(
            trained,
            math.inf,
            build,
            length - done,
            optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)),
            ema=0.0,
        ).network
        done = length
        try:
            collapse.append({"steps": length, **judge(toy, build(trained), draws, num)})
        except (
            FloatingPointError
        ) as error:  # the flow of a collapsed network cannot be inverted in single precision
            print(f"{name}: after {length} steps: {error}")
            break
        print(f"{name}: {length} steps without the divergence: {collapse[-1]}", flush=True)
    return {
        "identical_models_to_the_last_bit": same,
        "rows": rows,
        "collapse": collapse,
        "frontier": frontier(toy).tolist(),
    }


def figure(name: str, result: dict) -> None:
    marks = [
        tj.plotting.Mark(
            row["method"],
            row["reward"][0],
            -row["divergence"][0],
            row["reward"][1],
            row["divergence"][1],
        )
        for row in result["rows"]
    ]
    curve = np.asarray(result["frontier"])
    lowest = min(-row["divergence"][0] for row in result["rows"])
    axes = {"reward": "mean reward", "diversity": "minus the divergence to the data (nats)"}
    drawn = tj.plotting.frontier(marks, curve[curve[:, 1] > lowest - 0.5], suptitle=name, **axes)
    drawn.savefig(FIGURES / f"annealing_{name.replace(' ', '_')}.png", dpi=110)


def beyond(row: dict, curve: np.ndarray) -> float:
    """The height of a point above the frontier, in its standard errors: those of the divergence,
    and those of the reward times the curve's slope.
    """
    best = np.interp(row["reward"][0], curve[:, 0], curve[:, 1])
    slope = np.interp(
        row["reward"][0],
        (curve[1:, 0] + curve[:-1, 0]) / 2,
        np.diff(curve[:, 1]) / np.diff(curve[:, 0]),
    )
    return float(
        (-row["divergence"][0] - best) / np.hypot(row["divergence"][1], slope * row["reward"][1])
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="short trainings, few samples; nothing is written"
    )
    args = parser.parse_args()
    path = tj.Linear()
    laws = {
        name: toys_learned.mixture(means, reward, path)
        for name, (means, reward) in toys.TOYS.items()
    }
    laws["swiss roll"] = toys_learned.roll(path)
    results = {name: study(name, toy, args) for name, toy in laws.items()}
    for name, result in results.items():
        curve = np.asarray(result["frontier"])
        print(
            f"\n{name}\n\n| method | | mean reward | divergence to the data | the tilt's at this "
            "reward | coverage |\n|---|---|---|---|---|---|"
        )
        for row in result["rows"]:
            row["tilt"] = float(-np.interp(row["reward"][0], curve[:, 0], curve[:, 1]))
            row["beyond"] = beyond(row, curve)
            covered = f"{row['coverage']:.2f}" if "coverage" in row else ""
            print(
                f"| {row['method']} | {row['setting']} | {row['reward'][0]:.3f} ± "
                f"{row['reward'][1]:.3f} | {row['divergence'][0]:.3f} ± "
                f"{row['divergence'][1]:.3f} | {row['tilt']:.3f} | {covered} |"
            )
        print(
            "\n| steps without the divergence | mean reward | divergence | entropy | coverage "
            "|\n|---|---|---|---|---|"
        )
        for row in result["collapse"]:
            print(
                f"| {row['steps']} | {row['reward'][0]:.3f} | {row['divergence'][0]:.2f} | "
                f"{row['entropy']:.2f} | {row['coverage']:.2f} |"
            )
        print(
            "\nAnnealing between two equal models is the base sampler to the last bit: "
            f"{result['identical_models_to_the_last_bit']}"
        )
        if not args.quick:
            figure(name, result)
    if not args.quick:
        common.write("annealing", results)


if __name__ == "__main__":
    main()
