"""Figures: what stands on them, what is refused, and that a file is written whole or not at all."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

import tiltjax as tj
from tiltjax import plotting
from tiltjax.mixtures import GaussianMixture
from tiltjax.particles import Particles

PLANE, LINE = ((-5.0, 5.0), (-4.0, 4.0)), (-5.0, 5.0)
MIXTURES = {
    d: GaussianMixture([0.3, 0.7], [[-2.0] * d, [1.0] * d], 0.3 * jnp.stack([jnp.eye(d)] * 2))
    for d in (1, 2)
}
SIGNATURES = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}


def axes():
    return Figure().add_subplot()


def drawn(d, num=50, steps=10):
    path = np.cumsum(np.random.default_rng(0).normal(size=(steps + 1, num, d)), axis=0) / 4
    return path[-1], path


# --- densities


def test_contours_enclose_the_mass_they_name():
    """A standard normal: the region of mass p is the disc of radius sqrt(-2 log(1 - p))."""
    ax = axes()
    plotting.density_contours(ax, lambda x: 7 - x @ x / 2, ((-5, 5), (-5, 5)), levels=(0.5, 0.9))
    lines = ax.collections[1]
    radii = [np.linalg.norm(path.vertices, axis=1) for path in lines.get_paths()]
    for got, mass in zip(radii, (0.9, 0.5), strict=True):
        np.testing.assert_allclose(got, np.sqrt(-2 * np.log(1 - mass)), atol=0.02)


def test_curve_is_the_normalized_density():
    ax = axes()
    plotting.density_contours(ax, lambda x: 3 + MIXTURES[1].log_prob(x), LINE)
    x, y = ax.lines[0].get_data()
    np.testing.assert_allclose(
        y, np.exp(jax.vmap(MIXTURES[1].log_prob)(jnp.asarray(x)[:, None])), atol=1e-5
    )
    assert ax.get_xlim() == LINE


def test_a_flat_density_has_an_edge_and_no_error():
    inside = lambda x: jnp.where(jnp.max(jnp.abs(x)) < 1, 0.0, -jnp.inf)
    ax = axes()
    plotting.density_contours(ax, inside, PLANE)
    corners = np.concatenate([path.vertices for path in ax.collections[1].get_paths()])
    np.testing.assert_allclose(np.abs(corners).max(), 1, atol=0.06)
    everywhere = axes()
    plotting.density_contours(everywhere, lambda x: 0 * x[0], PLANE)
    assert len(everywhere.collections) == 1  # one filled region, no edge inside the window


def test_bounds_leave_the_margin():
    x = np.array([[0.0, 1.0], [10.0, 1.0]])
    np.testing.assert_allclose(plotting.contour_bounds(x, 0.1), [[-1, 11], [0.9, 1.1]])


# --- panels


def test_panel_in_the_plane_shows_samples_weights_and_paths():
    x, path = drawn(2)
    weights = np.arange(1.0, 51.0)
    ax = axes()
    plotting.panel(
        ax,
        Particles(jnp.asarray(x), jnp.log(weights)),
        trajectory=path,
        bounds=PLANE,
        title="T",
        note="N",
    )
    dots = next(c for c in ax.collections if not isinstance(c, LineCollection))
    np.testing.assert_allclose(dots.get_offsets(), x)
    np.testing.assert_allclose(dots.get_sizes() / dots.get_sizes()[0], weights, rtol=1e-10)
    lines = next(c for c in ax.collections if isinstance(c, LineCollection))
    assert len(lines.get_segments()) == 24 * 10
    np.testing.assert_allclose(lines.get_segments()[0], path[:2, 0])
    np.testing.assert_allclose(lines.get_segments()[-1], path[-2:, 23])
    opacity = lines.get_colors()[:, 3].reshape(10, 24)
    assert np.all(np.diff(opacity, axis=0) > 0)
    assert (ax.get_title(loc="left"), ax.texts[0].get_text()) == ("T", "N")
    assert (ax.get_xlim(), ax.get_ylim()) == PLANE


@pytest.mark.parametrize("with_path", [True, False])
def test_panel_on_the_line_is_a_density_histogram(with_path):
    x, path = drawn(1)
    x[0] = 100.0  # outside: not seen, but still one of the fifty
    ax = axes()
    options = {"trajectory": path, "log_density": MIXTURES[1].log_prob} if with_path else {}
    plotting.panel(ax, x, bounds=LINE, title="", **options)
    heights, edges, _ = ax.patches[0].get_data()
    assert np.sum(heights * np.diff(edges)) == pytest.approx(np.mean(np.abs(x) < 5), abs=1e-12)
    assert ax.get_ylim()[1] > heights.max()
    if with_path:  # the strip of paths begins above the bars and the curve
        lowest = min(segment[:, 1].min() for segment in ax.collections[0].get_segments())
        assert max(heights.max(), ax.lines[0].get_ydata().max()) < lowest < ax.get_ylim()[1]


def test_panel_shows_at_most_four_thousand_dots():
    ax = axes()
    plotting.panel(ax, np.zeros((5000, 2)), bounds=PLANE, title="")
    assert len(ax.collections[0].get_offsets()) == 4000


# --- comparisons


@pytest.mark.parametrize("d", [1, 2])
def test_comparison_draws_every_panel_and_a_legend(d, tmp_path):
    x, path = drawn(d)
    bounds = LINE if d == 1 else PLANE
    names = ["a", "b", "c", "d", "e"]
    panels = [plotting.Panel(name, x, path, f"note {name}", name == "c") for name in names]
    figure = plotting.comparison(
        panels, log_density=MIXTURES[d].log_prob, bounds=bounds, suptitle="Top"
    )
    assert [ax.get_title(loc="left") for ax in figure.axes] == names
    assert [ax.texts[0].get_text() for ax in figure.axes] == [f"note {name}" for name in names]
    title_colors = [ax._left_title.get_color() for ax in figure.axes]
    assert title_colors == [plotting.GREEN if name == "c" else title_colors[0] for name in names]
    assert {ax.get_xlim() for ax in figure.axes} == {LINE}
    assert len(figure.legends[0].get_texts()) == 3
    assert figure.get_suptitle() == "Top"
    # Numbers below where nothing else stands below: in a row of three, the third panel of five has
    # an empty place there.
    figure.draw_without_rendering()
    below = [ax.xaxis.get_major_ticks()[1].label1.get_visible() for ax in figure.axes]
    assert below == [False, False, True, True, True]
    assert plotting.save(figure, tmp_path / "grid.png").stat().st_size > 10_000


def test_comparison_without_density_or_paths():
    figure = plotting.comparison([("only", drawn(2)[0])], bounds=PLANE)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["samples"]
    width, _ = figure.get_size_inches()
    assert width == 10


@pytest.mark.parametrize(
    ("num", "columns"), [(1, 1), (3, 3), (4, 4), (5, 3), (6, 3), (8, 4), (9, 3), (10, 4), (12, 4)]
)
def test_columns_leave_few_gaps(num, columns):
    x = np.zeros((2, 1))
    figure = plotting.comparison([plotting.Panel("", x)] * num, bounds=LINE)
    assert figure.axes[0].get_gridspec().ncols == columns
    assert (
        plotting.comparison([plotting.Panel("", x)] * num, bounds=LINE, columns=2)
        .axes[0]
        .get_gridspec()
        .ncols
        == 2
    )


# --- files


@pytest.mark.parametrize("suffix", [".png", ".pdf", ".svg", ".PNG"])
def test_save_writes_the_format_that_the_name_says(suffix, tmp_path):
    target = tmp_path / f"figure{suffix}"
    target.write_text("old")
    assert plotting.save(Figure(figsize=(1, 1)), target) == target
    assert target.read_bytes().startswith(SIGNATURES[suffix.lower()])
    assert os.listdir(tmp_path) == [target.name]


def test_save_obeys_the_resolution(tmp_path):
    figure = plotting.comparison([("", np.zeros((2, 1)))], bounds=LINE)
    header = plotting.save(figure, tmp_path / "a.png").read_bytes()[16:20]
    assert int.from_bytes(header, "big") == 1600


def test_save_says_what_is_wrong_with_the_place(tmp_path):
    figure = Figure(figsize=(1, 1))
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    for target, error, message in [
        ("a.jpg", ValueError, r"\.png, \.pdf or \.svg"),
        ("a", ValueError, "must end in"),
        ("missing/a.png", FileNotFoundError, "does not exist: create it"),
        ("file/a.png", NotADirectoryError, "is not a folder"),
        ("folder.png", IsADirectoryError, "give the name of a file"),
    ]:
        with pytest.raises(error, match=message):
            plotting.save(figure, tmp_path / target)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.png"]


def test_save_into_a_folder_that_refuses(tmp_path, monkeypatch):
    """The refusal is simulated: permissions do not bind an administrator, who may be running this
    test.
    """

    def refuse(self, data):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pathlib.Path, "write_bytes", refuse)
    with pytest.raises(PermissionError, match="not writable: Permission denied"):
        plotting.save(Figure(figsize=(1, 1)), tmp_path / "a.png")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("stage", ["drawing", "writing", "replacing"])
def test_save_that_fails_half_way_leaves_the_old_file(stage, tmp_path, monkeypatch):
    target = tmp_path / "a.png"
    target.write_text("old")
    figure = Figure(figsize=(1, 1))

    def fail(*args, **options):
        raise OSError(28, "No space left on device")

    def fail_after_some(self, data):
        with self.open("wb") as file:
            file.write(bytes(data)[:10])
        fail()

    if stage == "drawing":
        monkeypatch.setattr(figure, "draw", fail)
    elif stage == "writing":
        monkeypatch.setattr(pathlib.Path, "write_bytes", fail_after_some)
    else:
        monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        plotting.save(figure, target)
    assert os.listdir(tmp_path) == ["a.png"]
    assert target.read_text() == "old"


# --- manners


def test_matplotlib_is_lazy_and_its_global_state_untouched():
    code = """
import sys
import tiltjax as tj
from tiltjax import plotting
assert not any(name.startswith("matplotlib") for name in sys.modules)
import matplotlib, numpy as np
before = matplotlib.rcParams.copy()
plotting.comparison([("a", np.zeros((2, 2)))], bounds=((-1, 1), (-1, 1))).draw_without_rendering()
assert "matplotlib.pyplot" not in sys.modules
assert matplotlib.rcParams.copy() == before
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_without_matplotlib_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install tiltjax\[plot\]"):
        plotting.comparison([("a", np.zeros((2, 1)))], bounds=LINE)


def quadratic(x):
    return -(x @ x)


BAD = {
    "bounds order": (
        lambda: plotting.panel(axes(), np.zeros((2, 1)), bounds=(1, 0), title=""),
        "low < high",
    ),
    "bounds shape": (lambda: plotting.contour_bounds(np.zeros(3)), r"x\[:, None\]"),
    "three axes": (
        lambda: plotting.panel(axes(), np.zeros((2, 3)), bounds=[(0, 1)] * 3, title=""),
        "bounds must be",
    ),
    "samples": (
        lambda: plotting.panel(axes(), np.zeros((2, 3)), bounds=PLANE, title=""),
        r"\(n, 2\).*x\[:, :2\]",
    ),
    "no samples": (
        lambda: plotting.panel(axes(), np.zeros((0, 2)), bounds=PLANE, title=""),
        r"got \(0, 2\)",
    ),
    "nan": (
        lambda: plotting.panel(axes(), np.array([[0.0], [np.nan]]), bounds=LINE, title=""),
        "1 of 2 are not",
    ),
    "trajectory": (
        lambda: plotting.panel(
            axes(), np.zeros((2, 2)), trajectory=np.zeros((3, 2)), bounds=PLANE, title=""
        ),
        r"trajectory must have shape \(steps \+ 1, n, 2\)",
    ),
    "levels": (
        lambda: plotting.density_contours(axes(), quadratic, PLANE, levels=(0.5, 1.0)),
        "masses between",
    ),
    "vector": (
        lambda: plotting.density_contours(axes(), lambda x: x, PLANE),
        r"to a scalar, got \(2,\)",
    ),
    "nan density": (
        lambda: plotting.density_contours(axes(), lambda x: x[0] * jnp.nan, LINE),
        "not NaN",
    ),
    "no density": (
        lambda: plotting.density_contours(axes(), lambda x: x[0] * 0 - jnp.inf, LINE),
        "above -inf",
    ),
    "no panels": (lambda: plotting.comparison([], bounds=LINE), "at least one Panel"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_a_reason(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_an_audit_is_drawn(tmp_path):
    problem = tj.problems.get("gaussian")
    model = tj.Analytic(problem.prior)
    report = tj.audit(
        jax.random.key(0), model, tj.dps(model, problem.reward, 0.8), num=200, steps=10
    )
    figure = plotting.audit(report)
    left, right = figure.axes
    assert sum(patch.get_height() for patch in left.patches) == 200
    carried, alike = right.lines
    shares = carried.get_ydata()
    assert np.all(np.diff(shares) >= 0)
    np.testing.assert_allclose(shares[-1], 1)
    assert np.all(shares >= alike.get_ydata() - 1e-9)  # the heaviest first
    assert plotting.save(figure, tmp_path / "audit.png").stat().st_size > 10_000


# --- reward against diversity


def test_the_frontier_fills_what_nothing_dominates():
    marks = [
        plotting.Mark("a", 0.0, 1.0),
        plotting.Mark("a", 1.0, 0.5, 0.1, 0.2),
        plotting.Mark("b", 0.5, 0.4, 0.05, 0.05),  # below the second in both
    ]
    figure = plotting.frontier(marks, [[0, 2], [1, 1.5], [2, 0]], diversity="nats", suptitle="S")
    (ax,) = figure.axes
    dots = [c for c in ax.collections if not isinstance(c, LineCollection)]
    np.testing.assert_allclose(
        np.concatenate([c.get_offsets() for c in dots]), [mark[1:3] for mark in marks]
    )
    white = [np.all(face == 1) for c in dots for face in c.get_facecolors()]
    assert white == [False, False, True]
    curve = next(line for line in ax.lines if line.get_label() == "exact tilts")
    np.testing.assert_allclose(curve.get_xydata(), [[0, 2], [1, 1.5], [2, 0]])
    bars = np.concatenate(
        [np.asarray(c.get_segments()) for c in ax.collections if isinstance(c, LineCollection)]
    )
    lengths = sorted(np.round(np.abs(bars[:, 1] - bars[:, 0]).max(axis=1), 12))
    assert lengths == [0, 0, 0.1, 0.1, 0.2, 0.4]  # twice the standard errors
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "exact tilts",
        "base",
        "a",
        "b",
    ]
    assert (ax.get_xlabel(), ax.get_ylabel(), figure.get_suptitle()) == ("mean reward", "nats", "S")


@pytest.mark.parametrize(
    ("marks", "curve", "message"),
    [
        ([], None, "one Mark"),
        ([("a", 0.0, np.nan)], None, "all finite"),
        ([("a", 0.0, 1.0)], [0.0, 1.0], r"shape \(2,\)"),
        ([("a", 0.0, 1.0)], [[0.0, np.inf]], "finite pairs"),
    ],
)
def test_a_frontier_of_nothing_is_refused(marks, curve, message):
    with pytest.raises(ValueError, match=message):
        plotting.frontier(marks, curve)
