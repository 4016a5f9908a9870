"""Can steering make a small language model write sentences that are rare in its data?

A transformer of two layers learns sentences of an artificial language by masked diffusion. Subjects
and verbs agree in number. One sentence in twelve is glad and one is grim, as some of its
adjectives, verbs and adverbs show. The wanted attribute is glad. The reward is the log-odds of a
logistic regression on words, learned from 3,000 labeled sentences. The evaluation uses the true
language: a sentence is glad if its probability to be glad is above one half under the true law of
its words. Nats per word, the log of a perplexity, are those of an interpolated trigram model of
50,000 other sentences.

Every row evaluates the network equally often, once per token for each of n samples or particles.
The rows are best of n and softmax of n of unguided samples; gradient-free Feynman-Kac steering,
with four completions per state and the potentials `Difference` and `Max` (every fourth step); and
steering whose proposals are shifted towards completions of high reward. `best` is the sentence of
largest reward of the n. `draw` is a draw by weight, whose law tends to the tilt.

    python -m benchmarks.text.text [--quick]
"""

import argparse
import functools
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import tiltjax as tj
from benchmarks import common

TONES = ("dull", "glad", "grim")
SHARES = (10 / 12, 1 / 12, 1 / 12)
OWN = 0.7  # probability that a word with a tone shows it
WORDS = {
    "adjective": ("gray plain quiet old small slow", "bright kind merry", "bitter cold cruel"),
    "verb": ("see meet follow find hear", "love cheer hug", "hate hit fear"),
    "adverb": ("today slowly again there", "gladly sweetly", "grimly sadly"),
}
DETERMINERS = ("a the this", "the these some")
NOUNS = ["dog", "cat", "king", "sailor", "child", "teacher"]
PREPOSITIONS = ["near", "behind", "with"]
LENGTH, SCALE = 12, 1.0


def vocabulary() -> list[str]:
    words = [word for lists in WORDS.values() for one in lists for word in one.split()]
    words += [word + "s" for one in WORDS["verb"] for word in one.split()]
    words += (
        sorted({word for one in DETERMINERS for word in one.split()})
        + NOUNS
        + [noun + "s" for noun in NOUNS]
    )
    return [*words, *PREPOSITIONS, "."]


VOCABULARY = vocabulary()
INDEX = {word: i for i, word in enumerate(VOCABULARY)}


def sentence(rng: np.random.Generator) -> tuple[list[int], int]:
    """One sentence, padded by full stops, and its tone."""
    tone = rng.choice(3, p=SHARES)
    pick = lambda words: words[rng.integers(len(words))]
    toned = lambda kind: pick(WORDS[kind][tone if rng.random() < OWN else 0].split())

    def phrase(plural: int) -> list[str]:
        adjective = [toned("adjective")] if rng.random() < 0.7 else []
        return [pick(DETERMINERS[plural].split()), *adjective, pick(NOUNS) + "s" * plural]

    subject = int(rng.integers(2))
    words = [*phrase(subject), toned("verb") + "s" * (1 - subject), *phrase(int(rng.integers(2)))]
    if rng.random() < 0.5:
        words += [pick(PREPOSITIONS), *phrase(int(rng.integers(2)))]
    if len(words) < LENGTH - 1 and rng.random() < 0.7:
        words.append(toned("adverb"))
    return [INDEX[word] for word in words] + [INDEX["."]] * (LENGTH - len(words)), int(tone)


def sentences(seed: int, num: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    tokens, tones = zip(*(sentence(rng) for _ in range(num)), strict=True)
    return np.array(tokens, np.int32), np.array(tones)


def glad(tokens: np.ndarray) -> np.ndarray:
    """The probability that each sentence is glad, under the true law of its words."""
    table = np.zeros((3, len(VOCABULARY)))
    for lists in WORDS.values():
        for tone in range(3):
            for own, one in enumerate(lists):
                for word in one.split():
                    share = (OWN * (own == tone) + (1 - OWN) * (own == 0)) / len(one.split())
                    for form in (word, word + "s") if word + "s" in INDEX else (word,):
                        table[tone, INDEX[form]] = np.log(max(share, 1e-12))
    odds = table[:, tokens].sum(-1) + np.log(SHARES)[:, None]
    return np.exp(odds[1] - np.logaddexp.reduce(odds, axis=0))


class Trigrams:
    """An interpolated model of the next word given two words."""

    def __init__(self, tokens: np.ndarray):
        n = len(VOCABULARY)
        rows = np.pad(tokens, ((0, 0), (2, 0)), constant_values=INDEX["."])
        a, b, c = rows[:, :-2].ravel(), rows[:, 1:-1].ravel(), rows[:, 2:].ravel()
        self.one, self.two, self.three = np.zeros(n), np.zeros((n, n)), np.zeros((n, n, n))
        np.add.at(self.one, c, 1)
        np.add.at(self.two, (b, c), 1)
        np.add.at(self.three, (a, b, c), 1)

    def nats(self, tokens: np.ndarray) -> np.ndarray:
        """The log of the perplexity of each sentence, per word."""
        rows = np.pad(tokens, ((0, 0), (2, 0)), constant_values=INDEX["."])
        a, b, c = rows[:, :-2], rows[:, 1:-1], rows[:, 2:]
        law = (self.one[c] + 1) / (self.one.sum() + len(VOCABULARY))
        # The law of the shorter context has the weight of five observations of the longer one.
        law = (self.two[b, c] + 5 * law) / (self.two[b].sum(-1) + 5)
        law = (self.three[a, b, c] + 5 * law) / (self.three[a, b].sum(-1) + 5)
        return -np.log(law).mean(1)


def critic(tokens: np.ndarray, is_glad: np.ndarray) -> tj.rewards.Reward:
    """The log-odds of a logistic regression on the counts of words."""
    counts = np.zeros((len(tokens), len(VOCABULARY)), np.float32)
    np.add.at(counts, (np.arange(len(tokens))[:, None], tokens), 1)
    labels = jnp.asarray(is_glad, jnp.float32)

    def loss(weights):
        logits = counts @ weights[:-1] + weights[-1]
        return optax.sigmoid_binary_cross_entropy(logits, labels).mean() + 1e-4 * jnp.sum(
            weights**2
        )

    weights, optimizer = jnp.zeros(len(VOCABULARY) + 1), optax.adam(0.05)
    state = optimizer.init(weights)
    step = jax.jit(lambda w, s: optimizer.update(jax.grad(loss)(w), s))
    for _ in range(400):
        update, state = step(weights, state)
        weights = weights + update
    return tj.rewards.as_reward(jax.tree_util.Partial(lambda w, x: jnp.sum(w[x]) + w[-1], weights))


class Block(nnx.Module):
    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        self.up, self.down = (
            nnx.Linear(width, 4 * width, rngs=rngs),
            nnx.Linear(4 * width, width, rngs=rngs),
        )

    def __call__(self, y):
        y = y + self.attention(self.norms[0](y))
        return y + self.down(jax.nn.gelu(self.up(self.norms[1](y))))


class Transformer(nnx.Module):
    """A network from `t` `(B,)`, which is not used, and tokens `(B, LENGTH)`, to logits."""

    def __init__(self, rngs: nnx.Rngs, width: int = 64, layers: int = 2, heads: int = 4):
        self.words = nnx.Embed(len(VOCABULARY) + 1, width, rngs=rngs)
        self.places = nnx.Embed(LENGTH, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, heads, rngs) for _ in range(layers)])
        self.norm, self.out = (
            nnx.LayerNorm(width, rngs=rngs),
            nnx.Linear(width, len(VOCABULARY), rngs=rngs),
        )

    def __call__(self, t, x):
        y = self.words(x) + self.places(jnp.arange(LENGTH))[None]
        for block in self.blocks:
            y = block(y)
        return self.out(self.norm(y))


def train(tokens: np.ndarray, steps: int, batch: int = 256) -> tuple[Transformer, float]:
    """The network, and its last mean loss: the bound of nats per word,
    `E[mean over the hidden of -log D]`, where any number of hidden tokens from one to all is
    equally likely.
    """
    network = Transformer(nnx.Rngs(0))
    optimizer = nnx.Optimizer(
        network, optax.adamw(optax.cosine_decay_schedule(3e-3, steps)), wrt=nnx.Param
    )
    data = jnp.asarray(tokens)

    def loss(network, key):
        key_rows, key_order, key_number = jax.random.split(key, 3)
        x = data[jax.random.randint(key_rows, (batch,), 0, len(data))]
        order = jnp.argsort(jax.random.uniform(key_order, x.shape), axis=1)
        number = jax.random.randint(key_number, (batch, 1), 1, LENGTH + 1)
        hidden = order < number
        logits = network(None, jnp.where(hidden, len(VOCABULARY), x))
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits, x)
        return jnp.mean(jnp.sum(jnp.where(hidden, entropy, 0.0), axis=1) / number[:, 0])

    @nnx.jit
    def step(network, optimizer, key):
        value, slope = nnx.value_and_grad(loss)(network, key)
        optimizer.update(network, slope)
        return value

    losses = [float(step(network, optimizer, jax.random.key(k))) for k in range(steps)]
    return network, float(np.mean(losses[-100:]))


def pick(key, x, log_weights, reward):
    """The sample of largest reward, and a draw by weight, from one population."""
    values = jax.vmap(reward)(x)
    return x[jnp.argmax(values)], x[jax.random.categorical(key, log_weights)]


def weigh(key, model, reward, *, scale, num, guide, **settings):
    """The particles of `smc` with its default settings."""
    return tj.smc(key, model, guide(model, reward, scale), num=num, **settings)


def steer(model, reward, n: int, runs: int, lean: float, method=weigh, **settings):
    guide = functools.partial(tj.tokens.Completions, k=4, proposal_weight=lean)

    def one(key):
        key_run, key_pick = jax.random.split(key)
        found = method(key_run, model, reward, scale=SCALE, num=n, guide=guide, **settings)
        return pick(key_pick, found.x, found.log_weights, reward)

    return jax.lax.map(one, jax.random.split(jax.random.key(n), runs), batch_size=50)


def select(model, reward, n: int, runs: int):
    x = tj.sample(jax.random.key(100 + n), model, num=n * runs).x.reshape(runs, n, LENGTH)
    one = lambda key, x: pick(key, x, SCALE * jax.vmap(reward)(x), reward)
    return jax.vmap(one)(jax.random.split(jax.random.key(n), runs), x)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="hardly any training, few runs")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "the effective sample size")
    steps, runs = (30, 20) if args.quick else (2000, 400)
    learned, _ = sentences(0, 20_000)
    labeled, tones = sentences(1, 3_000)
    other, other_tones = sentences(2, 50_000)
    judge, reward = Trigrams(other), critic(labeled, tones == 1)
    network, bound = train(learned, steps)
    model = tj.tokens.from_logits(network, length=LENGTH, vocab=len(VOCABULARY), batched=True)
    truth = {
        "glad": float(np.mean(glad(other) > 0.5)),
        "nats": float(judge.nats(sentences(3, 5_000)[0]).mean()),
        "reward_right": float(
            np.mean((np.asarray(jax.vmap(reward)(other)) > 0) == (other_tones == 1))
        ),
    }
    print(f"bound {bound:.3f} nats a word; of the language itself: {truth}")
    window = tj.weighted.potentials.ResampleSchedule(4, start=3)
    methods = {
        "selection": functools.partial(select, model, reward),
        "steering": lambda n, runs: steer(
            model, reward, n, runs, 0.0, proposal=tj.weighted.proposals.Base()
        ),
        "steering, Max": lambda n, runs: steer(
            model, reward, n, runs, 0.0, tj.fk_steering, schedule=window
        ),
        "steering, leaning": lambda n, runs: steer(model, reward, n, runs, 0.5),
    }
    rows = []
    print(
        "| | n | glad: best | draw | reward: best | draw | nats a word: best | draw "
        "|\n|---|---|---|---|---|---|---|---|"
    )
    for name, method in methods.items():
        for n in (1, 4, 8, 16):
            best, draw = (np.asarray(x) for x in method(n, runs))
            row: dict = {"method": name, "n": n, "calls": n * LENGTH}
            for which, x in (("best", best), ("draw", draw)):
                values = np.asarray(jax.vmap(reward)(x)), glad(x) > 0.5, judge.nats(x)
                row[which] = {
                    key: [float(v.mean()), float(v.std(ddof=1) / math.sqrt(len(v)))]
                    for key, v in zip(("reward", "glad", "nats"), values, strict=True)
                }
            rows.append(row)
            cell = lambda which, key, row=row: "{:.2f} ± {:.2f}".format(*row[which][key])
            cells = [
                cell(which, key) for key in ("glad", "reward", "nats") for which in ("best", "draw")
            ]
            print(f"| {name} | {n} | " + " | ".join(cells) + " |", flush=True)
        print("   e.g.", " / ".join(" ".join(VOCABULARY[i] for i in x) for x in draw[:3]))
    if not args.quick:
        common.write("text", {"runs": runs, "bound": bound, "truth": truth, "rows": rows})


if __name__ == "__main__":
    main()
