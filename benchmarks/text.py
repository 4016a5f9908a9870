r"""Does steering make a small language model write what it rarely writes?

A transformer of three layers, which starts from counts of neighbouring tokens, is trained for minutes, as masked diffusion, on English that ships with Python: four parts of docstrings of the standard library,
one part of the language reference (`pydoc_data`). The attribute is to *read like the reference*. Documents are split in two halves. The network, its
vocabulary (byte pairs) and the reward are of the first: pairs of neighbouring tokens, smoothed, as log-odds. The judges are of the second, and
read characters: the attribute is what two interpolated n-gram models think likelier of the reference, at odds of one to four before; a third,
of both, measures perplexity, which rises where text stops being English.

The loss is the bound on the negative log-likelihood per token, with t, the share shown, uniform, `E[sum_hidden -log D_t(x)[i, x_1i] / (1 - t)] / length`:
as many tokens are hidden as t says, 1 to all of them alike often, so that it is the mean over the hidden ones.

Every row asks the network as often: 16 times for each of n samples or particles, four tokens a step. Of the n, `best` is the one of largest
reward, `draw` one at random by weight, which is what approaches the tilt; of samples that nothing steered (`selected`) by `exp(scale * reward)`.

    python benchmarks/text.py [--quick]
"""

import argparse
import ast
import collections
import itertools
import math
import pydoc_data.topics
import re
import sysconfig
import time
import warnings
from pathlib import Path

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import tiltjax as tj

LENGTH, VOCAB, WIDTH, LAYERS, HEADS, STEPS = 64, 256, 128, 3, 4, 16
SHARE = 0.2  # of the reference in what is learnt
LETTERS = " abcdefghijklmnopqrstuvwxyz.,'()-"
ORDER = 4  # letters of context of the judges
TRAINING = 240


# The text.


def prose(document: str) -> str:
    """The paragraphs that look like English, in lower case."""
    kept = []
    for paragraph in re.split(r"\n\s*\n", document):
        flat = " ".join(paragraph.split()).lower()
        if len(flat) > 80 and sum(letter in LETTERS for letter in flat) > 0.93 * len(flat):
            kept.append("".join(letter for letter in flat if letter in LETTERS))
    return " ".join(kept)


def docstrings() -> list[str]:
    """One document for each module of the standard library."""
    root, documents = Path(sysconfig.get_paths()["stdlib"]), []
    for path in sorted(root.rglob("*.py")):
        if {"site-packages", "test", "tests", "idlelib", "lib2to3"} & set(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(path.read_text())
        except (SyntaxError, UnicodeDecodeError):
            continue
        kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        found = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
        documents.append("\n\n".join(found))
    return documents


def halves(documents: list[str]) -> tuple[str, str]:
    """Every second document; a paragraph that occurs twice occurs once."""
    cleaned = list(dict.fromkeys(text for text in map(prose, documents) if text))
    return " ".join(cleaned[::2]), " ".join(cleaned[1::2])


def spread(text, size: int):
    """About `size` of the letters or tokens of `text`, in pieces from all over it."""
    piece = 500
    starts = np.linspace(0, len(text) - piece, max(1, size // piece)).astype(int)
    pieces = [text[start : start + piece] for start in starts]
    return "".join(pieces) if isinstance(text, str) else np.concatenate(pieces)


class BytePairs:
    """A vocabulary of `size` pieces of words: neighbours that are seen most often become one."""

    def __init__(self, text: str, size: int):
        words = collections.Counter(" " + word for word in text.split())
        split = {word: list(word) for word in words}
        self.merges: list[tuple[str, str]] = []
        self.pieces = list(LETTERS)
        while len(self.pieces) < size:
            pairs = collections.Counter()
            for word, parts in split.items():
                for pair in itertools.pairwise(parts):
                    pairs[pair] += words[word]
            pair = max(pairs, key=lambda pair: (pairs[pair], pair))
            self.merges.append(pair)
            self.pieces.append("".join(pair))
            split = {word: self._merge(parts, pair) if pair[0] in parts else parts for word, parts in split.items()}
        self.index = {piece: i for i, piece in enumerate(self.pieces)}

    @staticmethod
    def _merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
        merged: list[str] = []
        for part in parts:
            # What was just merged is one piece: "aaa" is "aa", "a".
            if merged and (merged[-1], part) == pair:
                merged[-1] += part
            else:
                merged.append(part)
        return merged

    def encode(self, text: str) -> np.ndarray:
        known: dict[str, list[int]] = {}
        for word in set(text.split()):
            parts = list(" " + word)
            for pair in self.merges:
                parts = self._merge(parts, pair)
            known[word] = [self.index[part] for part in parts]
        return np.asarray([token for word in text.split() for token in known[word]], np.int32)

    def decode(self, tokens: np.ndarray) -> str:
        return "".join(self.pieces[token] for token in tokens)


# The judges.


class Letters:
    """An n-gram model of letters, orders interpolated by how many letters followed a context (Witten and Bell)."""

    def __init__(self, text: str):
        windows = self._windows(text)
        self.tables = []
        for order in range(ORDER + 1):
            grams, counts = np.unique(windows[order], return_counts=True)
            contexts, first = np.unique(grams // len(LETTERS), return_index=True)
            kinds = np.diff(np.append(first, len(grams)))
            self.tables.append((grams, counts, contexts, np.add.reduceat(counts, first), kinds))

    @staticmethod
    def _windows(text: str) -> list[np.ndarray]:
        """For each order n the last n + 1 letters as one number, for every letter that has `ORDER` before it."""
        code = np.asarray([LETTERS.index(letter) for letter in text], np.int64)
        powers = len(LETTERS) ** np.arange(ORDER, -1, -1)
        whole = np.lib.stride_tricks.sliding_window_view(code, ORDER + 1) @ powers
        return [whole % len(LETTERS) ** (order + 1) for order in range(ORDER + 1)]

    def log_prob(self, text: str) -> np.ndarray:
        """Of each letter given those before it."""
        probability = 1 / len(LETTERS)
        for wanted, (grams, counts, contexts, totals, kinds) in zip(self._windows(text), self.tables, strict=True):
            before = wanted // len(LETTERS)
            total, kind = looked_up(contexts, totals, before), looked_up(contexts, kinds, before)
            seen = (looked_up(grams, counts, wanted) + kind * probability) / np.maximum(total + kind, 1)
            probability = np.where(total > 0, seen, probability)
        return np.log(probability)

    def log_prob_from(self, text: str, prior: np.ndarray, strength: float = 10.0) -> np.ndarray:
        """Of each letter by counts of the longest context, on top of a prior: where the context is rare both say the same."""
        wanted, (grams, counts, contexts, totals, _) = self._windows(text)[-1], self.tables[-1]
        total = looked_up(contexts, totals, wanted // len(LETTERS))
        return np.log((looked_up(grams, counts, wanted) + strength * prior) / (total + strength))


def looked_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The values of wanted keys, 0 where there is none; `keys` are sorted."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)


class Judge:
    """Log-odds of the reference and perplexity, by letters of texts that nothing else was made of."""

    def __init__(self, docs: str, reference: str):
        # The odds are those of equal evidence: a model of more text is the likelier one of anything.
        self.docs, self.reference = Letters(spread(docs, len(reference))), Letters(reference)
        self.both = Letters(docs + " " + reference)

    def odds(self, text: str) -> float:
        prior = np.exp(self.both.log_prob(text))
        difference = self.reference.log_prob_from(text, prior) - self.docs.log_prob_from(text, prior)
        return float(difference.sum()) + math.log(SHARE / (1 - SHARE))

    def __call__(self, texts: list[str]) -> dict[str, tuple[float, float]]:
        """The share that reads like the reference, the mean log-odds, and the perplexity of a letter, with standard errors."""
        odds = np.asarray([self.odds(text) for text in texts])
        is_so = (odds > 0).astype(float)
        surprise = np.asarray([-self.both.log_prob(text).mean() for text in texts])
        error = lambda values: float(np.std(values, ddof=1) / np.sqrt(len(values)))
        perplexity = float(np.exp(surprise.mean()))
        return {
            "attribute": (float(is_so.mean()), error(is_so)),
            "odds": (float(odds.mean()), error(odds)),
            "perplexity": (perplexity, perplexity * error(surprise)),
        }


def pairs(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities by counting: of a token, `(VOCAB,)`, and of one after another, `(VOCAB, VOCAB)`, interpolated with the former."""
    single = np.bincount(tokens, minlength=VOCAB) + 1.0
    single /= single.sum()
    counts = np.zeros((VOCAB, VOCAB))
    np.add.at(counts, (tokens[:-1], tokens[1:]), 1)
    return np.log(single), np.log((counts + 20 * single) / (counts.sum(1, keepdims=True) + 20))


def pairs_reward(docs: np.ndarray, reference: np.ndarray) -> jax.Array:
    """Log-odds `(VOCAB, VOCAB)` of a token after another: by counts, on top of one prior for both, so that what is rare says little."""
    prior = 20 * np.exp(pairs(np.concatenate([docs, reference]))[1])

    def log_prob(tokens: np.ndarray) -> np.ndarray:
        counts = np.zeros((VOCAB, VOCAB))
        np.add.at(counts, (tokens[:-1], tokens[1:]), 1)
        return np.log((counts + prior) / (counts.sum(1, keepdims=True) + 20))

    return jnp.asarray(log_prob(reference) - log_prob(spread(docs, len(reference))), jnp.float32)


# The network.


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norms = nnx.List([nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(3)])
        # What stands beside a token says most; attention takes long to find that out.
        self.beside = nnx.Conv(WIDTH, WIDTH, kernel_size=3, rngs=rngs)
        self.qkv, self.out = nnx.Linear(WIDTH, 3 * WIDTH, rngs=rngs), nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.wide, self.narrow = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs), nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        x = x + self.beside(self.norms[2](x))
        q, k, v = jnp.split(self.qkv(self.norms[0](x)).reshape(*x.shape[:2], HEADS, -1), 3, axis=-1)
        x = x + self.out(jax.nn.dot_product_attention(q, k, v).reshape(x.shape))
        return x + self.narrow(nnx.gelu(self.wide(self.norms[1](x))))


class Transformer(nnx.Module):
    """Hidden tokens from those shown, both sides; logits `(B, LENGTH, VOCAB)`. Which are shown says how many: it needs no clock.

    Minutes are too short for a transformer to find out by itself which tokens are neighbours. It starts where what stands before and what stands
    after are independent evidence, `log P(v) + log P(v | before) / P(v) + log P(v | after) / P(v)` by counts, which are trained with the rest.
    """

    def __init__(self, tokens: np.ndarray, rngs: nnx.Rngs):
        single, after = pairs(tokens)
        evidence = np.pad(after - single[None], ((0, 1), (0, 0)))  # what is hidden says nothing
        backwards = np.pad((after - single[None]).T, ((0, 1), (0, 0)))
        self.single = nnx.Param(jnp.asarray(single, jnp.float32))
        self.before, self.after = (nnx.Param(jnp.asarray(table, jnp.float32)) for table in (evidence, backwards))
        self.tokens = nnx.Embed(VOCAB + 1, WIDTH, rngs=rngs)
        self.places = nnx.Embed(LENGTH, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])
        self.norm, self.head = (
            nnx.LayerNorm(WIDTH, rngs=rngs),
            nnx.Linear(WIDTH, VOCAB, kernel_init=nnx.initializers.zeros, rngs=rngs),
        )

    def __call__(self, t, x):
        hidden = self.tokens(x) + self.places(jnp.arange(LENGTH))[None]
        for block in self.blocks:
            hidden = block(hidden)
        beside = jnp.pad(x, ((0, 0), (1, 1)), constant_values=VOCAB)
        counted = self.single[...] + self.before[...][beside[:, :-2]] + self.after[...][beside[:, 2:]]
        return counted + self.head(self.norm(hidden))


def trained(docs: np.ndarray, reference: np.ndarray, steps: int, batch: int = 32) -> tuple[Transformer, list[float]]:
    """The network after `steps` of AdamW, and its bound on the loss per token, means over tenths of the training."""
    times = max(1, round(SHARE / (1 - SHARE) * len(docs) / len(reference)))  # in the mixture that is learnt
    graph, parameters = nnx.split(Transformer(np.concatenate([docs, *[reference] * times]), nnx.Rngs(0)))
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, steps // 20, steps)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01))
    docs_of, reference_of = jnp.asarray(docs), jnp.asarray(reference)

    def loss(parameters, key):
        key_which, key_docs, key_reference, key_share, key_hide = jax.random.split(key, 5)
        window = lambda key, text: text[
            jax.random.randint(key, (batch, 1), 0, len(text) - LENGTH) + jnp.arange(LENGTH)[None]
        ]
        rare = jax.random.bernoulli(key_which, SHARE, (batch, 1))
        x1 = jnp.where(rare, window(key_reference, reference_of), window(key_docs, docs_of))
        # One share in each of `batch` equal parts of [0, 1): uniform, but less at random.
        share = (jnp.arange(batch)[:, None] + jax.random.uniform(key_share, (batch, 1))) / batch
        number = jnp.floor(share * LENGTH) + 1
        hidden = jnp.argsort(jax.random.uniform(key_hide, x1.shape), axis=1) < number
        logits = nnx.merge(graph, parameters)(1 - number[:, 0] / LENGTH, jnp.where(hidden, VOCAB, x1))
        surprise = optax.softmax_cross_entropy_with_integer_labels(logits, x1)
        return jnp.mean(jnp.sum(jnp.where(hidden, surprise, 0.0), axis=1, keepdims=True) / number)

    @jax.jit
    def run(carry, keys):
        def step(carry, key):
            parameters, state = carry
            value, slope = jax.value_and_grad(loss)(parameters, key)
            updates, state = optimiser.update(slope, state, parameters)
            return (optax.apply_updates(parameters, updates), state), value

        return jax.lax.scan(step, carry, keys)

    carry, losses = (parameters, optimiser.init(parameters)), []
    for keys in jnp.split(jax.random.split(jax.random.key(0), steps // 10 * 10), 10):
        carry, values = run(carry, keys)
        losses.append(float(values.mean()))
        print(f"bound per token {losses[-1]:.3f}", flush=True)
    return nnx.merge(graph, carry[0]), losses


# The rows.


def chosen(key, x, log_weights, reward) -> tuple[jax.Array, ...]:
    """Of one population the best and a weighted draw, with their rewards."""
    values = jax.vmap(reward)(x)
    best, draw = jnp.argmax(values), jax.random.categorical(key, log_weights)
    return x[best], x[draw], values[best], values[draw]


def steered(model, reward, scale: float, num: int, runs: int, settings: dict) -> list[np.ndarray]:
    """`chosen` of `runs` runs of `num` particles."""
    guidance = tj.Completions(model, reward, scale, k=4, lean=settings["lean"])
    rest = {name: value for name, value in settings.items() if name != "lean"}

    def one(key):
        key_run, key_draw = jax.random.split(key)
        particles = tj.smc(key_run, model, guidance, num=num, steps=STEPS, **rest)
        return chosen(key_draw, particles.x, particles.log_weights, reward)

    run = jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=max(1, 128 // num)))
    return [np.asarray(part) for part in run(jax.random.split(jax.random.key(num), runs))]


def selected(x: jax.Array, reward, scale: float, num: int) -> list[np.ndarray]:
    """`chosen` of consecutive groups of `num`."""
    groups = x.reshape(-1, num, LENGTH)
    one = lambda key, group: chosen(key, group, scale * jax.vmap(reward)(group), reward)
    found = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), len(groups)), groups)
    return [np.asarray(part) for part in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="20 training steps, a few runs")
    args = parser.parse_args()
    training, runs, numbers = (20, 4, (1, 2)) if args.quick else (TRAINING, 100, (1, 4, 8, 16))
    warnings.filterwarnings("ignore", "the effective share")

    docs, docs_held = halves(docstrings())
    reference, reference_held = halves(list(pydoc_data.topics.topics.values()))
    pieces = BytePairs(docs + " " + reference, VOCAB)
    coded = pieces.encode(docs), pieces.encode(reference)
    print(
        f"{len(docs)} letters of docstrings, {len(reference)} of the reference; {len(docs) / len(coded[0]):.2f} a token"
    )
    judge, table = Judge(docs_held, reference_held), pairs_reward(*coded)
    reward = lambda x: jnp.sum(table[x[:-1], x[1:]])

    # How good the judge and the reward are, on text of the other's half.
    held = pieces.encode(docs_held), pieces.encode(reference_held)
    accuracy = {}
    for name, (first, second), sign in (("docs", (coded[0], held[0]), -1), ("reference", (coded[1], held[1]), 1)):
        windows = lambda text: text[: len(text) // LENGTH * LENGTH].reshape(-1, LENGTH)[::2]
        judged = np.mean([sign * judge.odds(pieces.decode(x)) > 0 for x in windows(first)])
        rewarded = np.mean([sign * (float(reward(x)) + math.log(SHARE / (1 - SHARE))) > 0 for x in windows(second)])
        accuracy[name] = {"judge": float(judged), "reward": float(rewarded)}
    print(f"right about text of the other half: {accuracy}")
    real = judge(
        [pieces.decode(x) for x in spread(coded[0], 300 * LENGTH).reshape(-1)[: 250 * LENGTH].reshape(-1, LENGTH)]
    )

    start = time.perf_counter()
    network, losses = trained(*coded, training)
    seconds = time.perf_counter() - start
    print(
        f"trained {training} steps in {seconds:.0f} s; docstrings of its half have perplexity {real['perplexity'][0]:.2f}\n"
    )

    model = tj.from_logits(network, length=LENGTH, vocab=VOCAB, batched=True)
    few, base = tj.Every(2, start=1), {"proposal": tj.proposals.Base(), "lean": 0.0, "ess_threshold": 0.5}
    methods = {
        "selected": None,
        "steered, difference": base | {"schedule": few},
        "steered, max": base | {"schedule": tj.Every(4, start=5), "potential": tj.potentials.Max()},
        "steered, lean proposals": {"lean": 0.1, "schedule": few, "ess_threshold": 0.5},
    }
    rows, examples = [], {}
    print(
        "| method | n | network calls | attribute, best | attribute, draw | reward, best | reward, draw | perplexity, best | perplexity, draw |"
    )
    print("|---" * 9 + "|")
    drawn = tj.sample(jax.random.key(0), model, num=runs * numbers[-1], steps=STEPS, batch=128).x
    # Out of reach of a few samples, not of all: the tilt's reward is two standard deviations higher, if it is Gaussian.
    scale = float(2 / jnp.std(jax.vmap(reward)(drawn)))
    for (method, settings), num in itertools.product(methods.items(), numbers):
        if num == 1 and settings is not None and not settings["lean"]:
            continue  # one particle that nothing proposes for is a sample of the model
        found = (
            selected(drawn, reward, scale, num)
            if settings is None
            else steered(model, reward, scale, num, runs, settings)
        )
        best, draw, of_best, of_draw = found
        row: dict = {"method": method, "n": num, "calls": num * STEPS, "runs": len(best)}
        for name, x, values in (("best", best, of_best), ("draw", draw, of_draw)):
            texts = [pieces.decode(tokens) for tokens in x]
            error = float(values.std(ddof=1) / np.sqrt(len(values)))
            row[name] = judge(texts) | {"reward": (float(values.mean()), error)}
            if num in (numbers[0], numbers[-1]):
                examples[f"{method}, n = {num}, {name}"] = texts[:3]
        rows.append(row)
        cells = ["{:.2f} ± {:.2f}".format(*row[name]["attribute"]) for name in ("best", "draw")]
        cells += ["{:.1f} ± {:.1f}".format(*row[name]["reward"]) for name in ("best", "draw")]
        cells += ["{:.1f} ± {:.1f}".format(*row[name]["perplexity"]) for name in ("best", "draw")]
        print(f"| {method} | {num} | {num * STEPS} | " + " | ".join(cells) + " |", flush=True)
    for name, texts in examples.items():
        print(f"\n{name}:", *texts, sep="\n  ")
    if not args.quick:
        found = {
            "steps": STEPS,
            "scale": scale,
            "runs": runs,
            "training": training,
            "seconds": seconds,
            "losses": losses,
        }
        found |= {"accuracy": accuracy, "held_out": real, "rows": rows, "examples": examples}
        print(f"\nwritten: {common.write('text', found)}")


if __name__ == "__main__":
    main()
