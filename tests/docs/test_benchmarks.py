"""The benchmarks' runner and its table, and what sets tiltjax beside other code.

Tier: exact for the table and the counts; tolerances for the network that both sides share are those
of single precision.
"""

import argparse
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiltjax as tj
from benchmarks import run, tables
from benchmarks.speed import limits
from benchmarks.speed import vs_reference as versus

FOLDER = Path(__file__).parents[2] / "benchmarks"
RESULTS = FOLDER / "results"


def test_the_table_of_the_results_is_theirs():
    assert (RESULTS / "README.md").read_text() == run.table(), "python -m benchmarks.run --table"


def test_the_runner_knows_every_benchmark():
    scripts = {path.stem for path in FOLDER.glob("*/*.py")}
    assert set(run.names()) == scripts
    assert set(run.HEADLINES) == scripts | set(run.SCRIPTS)
    for name in scripts:
        assert "--quick" in run.script(name).read_text(), name
        assert len(run.question(name)) > 20


def test_a_table_says_what_the_files_say(tmp_path):
    environment = {
        "device": "cpu",
        "backend": "cpu",
        "processor": "P",
        "cores": 3,
        "python": "3.12",
        "jax": "0.11",
        "commit": "abc",
    }
    rows = [{"num": n, "run_cpu": n / 1e5, "peak_gb": 0.5} for n in (1000, 20_000)]
    (tmp_path / "many_particles.json").write_text(
        json.dumps({"environment": environment, "rows": rows})
    )
    head, row = run.table(tmp_path).splitlines()[-2:]
    assert head.startswith("|---")
    assert (
        "10 CPU-microseconds a particle at 1,000, 10 at 20,000, in 0.50 GB | P, 3 cores | Python "
        "3.12, JAX 0.11 | abc |" in row
    )
    (tmp_path / "another.json").write_text("{}")
    with pytest.raises(ValueError, match="no headline for another"):
        run.table(tmp_path)


def test_the_tables_of_the_documentation_are_those_of_the_results(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tables", "--check"])
    tables.main()


def test_every_results_file_is_shown():
    assert set(tables.pages()) == {path.stem for path in RESULTS.glob("*.json")}
    pages = "".join(page.read_text() for page in tables.EVIDENCE.glob("*.md"))
    shown = {found[2] for found in tables.MARKED.finditer(pages)}
    assert {name for name in tables.TABLES if not name.startswith("readme_")} <= shown


def test_a_stale_page_is_named_or_written(tmp_path, monkeypatch):
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- table: readme_speed -->\nold\n<!-- end -->\nafter\n")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "EVIDENCE", tmp_path / "none")
    monkeypatch.setattr(sys, "argv", ["tables", "--check"])
    with pytest.raises(SystemExit, match=r"README\.md"):
        tables.main()
    monkeypatch.setattr(sys, "argv", ["tables"])
    tables.main()
    lines = page.read_text().splitlines()
    assert lines[0] == "before"
    assert lines[-2:] == ["<!-- end -->", "after"]
    assert lines[2].startswith("| method on `quadratic` |")
    monkeypatch.setattr(sys, "argv", ["tables", "--check"])
    tables.main()


def test_the_runner_passes_on_what_each_needs():
    plain = argparse.Namespace(quick=True, reference=None, python="other")
    assert run.command("vs_reference", plain) is None
    assert run.command("training", plain)[1:] == ["-m", "benchmarks.training.training", "--quick"]
    beside = argparse.Namespace(quick=False, reference=Path("there"), python="other")
    for name in ("vs_reference", "training"):
        assert run.command(name, beside)[3:] == ["--reference", "there", "--python", "other"]
    assert run.command("text", beside)[3:] == []


@pytest.mark.parametrize("problem", ["quadratic", "bump", "checkerboard"])
def test_both_sides_evaluate_the_denoiser_as_often(problem):
    methods = versus.METHODS if problem == "quadratic" else ("k = 1",)
    for method in methods:
        counts = versus.calls(versus.Row(problem, method, 10, 49))
        for mine, theirs in zip(counts["tiltjax"], counts["published"], strict=True):
            assert theirs <= mine <= 1.03 * theirs


def test_the_calls_are_those_that_are_counted():
    """Of one draw, by a model that counts: its first is the denoiser at the state itself, which a
    guidance shares.
    """
    count = []

    class Counting(tj.Analytic):
        def denoise(self, t, x):
            jax.debug.callback(lambda: count.append(1))
            return super().denoise(t, x)

    glass = tj.Glass(Counting(tj.problems.quadratic().prior), inner_steps=22)
    draw = jax.jit(lambda key, t, x: glass.draw(key, t, x))
    jax.block_until_ready(draw(jax.random.key(0), jnp.asarray(0.5), jnp.ones(2)))
    jax.effects_barrier()
    assert len(count) == versus.calls(versus.Row("quadratic", "k = 1", 1, 1))["tiltjax"][0] // 2


def test_goals_name_their_worst_row_and_those_that_miss():
    def row(method, cpu, memory):
        ratios = {"run_cpu": cpu, "run_wall": 2.0, "process_wall": 6.0, "peak_gb": memory}
        return {"problem": "quadratic", "method": method, "ratios": ratios, "w2_z": 1.0}

    found = versus.goals([row("k = 1", 50.0, 0.5), row("k = 8", 10.0, 2.0)])
    assert found["16 times fewer CPU-seconds, mixtures, k = 8"] == {
        "worst": 10.0, "row": "quadratic, k = 8", "rows": 1, "missed": ["quadratic, k = 8"],
    }  # fmt: skip
    assert found["never more memory"]["missed"] == ["quadratic, k = 1"]
    assert not found["40 times fewer CPU-seconds, mixtures, k = 1"]["missed"]
    assert not found["W2 no worse, at three standard errors"]["missed"]


def test_the_fold_leaves_out_the_split_between_modes():
    key_x, key_y = jax.random.split(jax.random.key(0))
    law = tj.problems.double_well().prior
    x, y = np.asarray(law.sample(key_x, 200)), np.asarray(law.sample(key_y, 200))
    right = np.where(x[:, :1] < 0, -1, 1) * x
    fold = lambda name: versus.distances(versus.Row(name, "k = 1", 200, 1), right[None], [y])[0]
    assert fold("double_well") < 0.5 < 2 < fold("quadratic")


def test_the_network_is_the_published_one():
    torch = pytest.importorskip("torch")
    keys = jax.random.split(jax.random.key(0), 3)
    sizes = (3, 8, 8, 2)
    params, layers = {}, []
    for i, (n, m, key) in enumerate(zip(sizes, sizes[1:], keys, strict=False)):
        params[f"net.{2 * i}.weight"] = weight = jax.random.normal(key, (n, m), jnp.float32)
        params[f"net.{2 * i}.bias"] = bias = jnp.ones(m, jnp.float32) / 3
        layers += [torch.nn.Linear(n, m), torch.nn.GELU()]
        layers[-2].load_state_dict(
            {"weight": torch.tensor(np.array(weight.T)), "bias": torch.tensor(np.array(bias))}
        )
    t, x = jnp.asarray([0.1, 0.9], jnp.float32), jnp.asarray([[1.0, -2.0], [0.3, 2.5]], jnp.float32)
    theirs = torch.nn.Sequential(*layers[:-1])(
        torch.tensor(np.concatenate([x / versus.WIDTH, t[:, None]], axis=1))
    )
    np.testing.assert_allclose(
        versus.gelu_network(params, t, x), theirs.detach().numpy(), rtol=2e-5, atol=2e-5
    )


@pytest.mark.slow
def test_a_side_runs_in_a_process_of_its_own(tmp_path):
    args = argparse.Namespace(python=sys.executable, reference=tmp_path)
    row = versus.Row("gaussian", "k = 1", 16, 2)
    report = versus.spawn("tiltjax", row, args, None, tmp_path)
    assert report["samples"].shape == (report["calls"], 16, 2)
    assert np.all(np.isfinite(report["samples"]))
    assert report["process_wall"] > report["first_wall"] > report["run_wall"] > 0
    assert 0.05 < report["peak_gb"] < 8
    with pytest.raises(SystemExit, match="published, gaussian, k = 1 failed"):
        versus.spawn("published", row, args, None, tmp_path)  # there is no checkout


def test_exact_samples_of_every_problem_are_of_its_tilt():
    law = versus.truths(versus.Row("checkerboard", "k = 1", 400, 1), 2)
    assert [x.shape for x in law] == [(400, 2)] * 2
    rewards = jax.vmap(tj.rewards.Bump([0.5, 0.5], 1.5))(
        jnp.concatenate([jnp.asarray(x) for x in law])
    )
    assert abs(float(rewards.mean()) - 0.9139) < 5 * float(rewards.std()) / 800**0.5


@pytest.mark.slow
def test_the_bare_loop_evaluates_what_it_says(monkeypatch):
    """Against the same recursions without a loop."""
    monkeypatch.setattr(limits, "LOOP", 4)
    model, times = tj.Analytic(tj.problems.quadratic().prior), jnp.linspace(0.05, 0.95, 4)
    x = jax.random.normal(jax.random.key(0), (3, 2)) + 1

    @jax.jit
    def at_once(x):
        for t in times:
            denoised, pullback = jax.vjp(lambda x, t=t: model.denoise_batch(t, x), x)
            x = 0.5 * x + 0.1 * pullback(denoised)[0]
        return x

    @jax.jit
    @jax.grad
    def chain(x):
        for t in times:
            x = 0.5 * x + 0.5 * model.denoise_batch(t, x)
        return jnp.sum(x)

    np.testing.assert_allclose(limits.bare(model, 3, False, 1)(1), at_once(x), rtol=1e-10)
    np.testing.assert_allclose(limits.bare(model, 3, True, 0)(1), chain(x), rtol=1e-10)
