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
from tiltjax.particles import Failures, Particles, Trace, unweighted

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
    for draw in (
        lambda: plotting.comparison([("a", np.zeros((2, 1)))], bounds=LINE),
        lambda: tj.plot(population(2)),
    ):
        with pytest.raises(ImportError, match=r'pip install "tiltjax\[plot\]"'):
            draw()


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
    carried, alike = right.lines[:2]
    shares = carried.get_ydata()
    assert np.all(np.diff(shares) >= 0)
    np.testing.assert_allclose(shares[-1], 1)
    assert np.all(shares >= alike.get_ydata() - 1e-9)  # the heaviest first
    assert plotting.save(figure, tmp_path / "audit.png").stat().st_size > 10_000
    (tail,) = (line for line in right.lines if line.get_linestyle() == ":")
    np.testing.assert_allclose(tail.get_xdata(), 40 / 200)  # min(n / 5, 3 sqrt(n))
    assert [ax.get_title(loc="left") for ax in tj.plot(report).axes] == [
        ax.get_title(loc="left") for ax in figure.axes
    ]


# --- plot


def population(*shape, num=40, weighted=True, dtype=float):
    rng = np.random.default_rng(0)
    log_weights = rng.normal(size=num) if weighted else np.zeros(num)
    return Particles(jnp.asarray(rng.normal(size=(num, *shape)), dtype), jnp.asarray(log_weights))


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_particles_in_one_dimension_are_a_weighted_histogram():
    particles = population(1)
    figure = tj.plot(particles, truth=MIXTURES[1])
    heights, edges, _ = figure.axes[0].patches[0].get_data()
    x = np.asarray(particles.x)[:, 0]
    expected = np.histogram(x, edges, weights=np.asarray(particles.weights))[0]
    np.testing.assert_allclose(heights * np.diff(edges), expected, atol=1e-12)
    assert expected.sum() == pytest.approx(1)  # all are in the window
    curve = figure.axes[0].lines[0].get_data()
    density = jax.vmap(MIXTURES[1].log_prob)(jnp.asarray(curve[0])[:, None])
    np.testing.assert_allclose(curve[1], np.exp(density), rtol=0.01, atol=1e-5)
    assert legend(figure) == ["truth", "samples"]
    assert figure.axes[0].get_title(loc="left") == "40 particles"
    size = f"{particles.ess:.4g} of 40 ({particles.ess / 40:.1%})"
    assert figure.axes[0].texts[0].get_text() == f"effective sample size {size}"


def test_samples_as_the_truth_are_an_outline_or_gray_dots():
    truth = np.random.default_rng(1).normal(size=(60, 1)) + 3
    (line,) = tj.plot(population(1), truth=truth).axes[0].lines
    edges, heights = line.get_data()
    np.testing.assert_allclose(np.sum(heights[:-1] * np.diff(edges)), 1)
    np.testing.assert_allclose(np.histogram(truth, edges, density=True)[0], heights[:-1])
    truth = np.random.default_rng(1).normal(size=(60, 2)) + 3
    figure = tj.plot(population(2), truth=truth)
    gray, blue = figure.axes[0].collections
    np.testing.assert_allclose(gray.get_offsets(), truth)
    np.testing.assert_allclose(blue.get_offsets(), population(2).x)
    low, high = figure.axes[0].get_xlim()
    assert low < truth[:, 0].min() < truth[:, 0].max() < high
    assert legend(figure) == ["truth", "samples"]


def test_dots_have_the_area_of_their_weights_up_to_a_limit():
    particles = population(2)
    (dots,) = tj.plot(particles).axes[0].collections
    np.testing.assert_allclose(
        dots.get_sizes() / dots.get_sizes()[0], particles.weights / particles.weights[0]
    )
    alone = Particles(particles.x, jnp.zeros(40).at[3].set(100.0))
    (dots,) = tj.plot(alone).axes[0].collections
    assert dots.get_sizes()[3] < 400


def test_many_dimensions_by_the_principal_directions_of_the_truth():
    """A mixture along the second axis of five: direction 1 is that axis."""
    means = np.zeros((2, 5))
    means[:, 1] = -3, 3
    truth = tj.GaussianMixture([0.5, 0.5], means, 0.3 * np.stack([np.eye(5)] * 2))
    particles = population(5)
    figure = tj.plot(particles, truth=truth)
    assert len(figure.axes) == 6
    names = [ax.get_xlabel() for ax in figure.axes]
    assert names == ["", "", "", "direction 1", "direction 2", "direction 3"]
    pair = figure.axes[1]
    dots = next(c for c in pair.collections if len(c.get_offsets()) == 40)
    np.testing.assert_allclose(np.abs(dots.get_offsets()[:, 0]), np.abs(particles.x[:, 1]))
    edges = np.concatenate([path.vertices for path in pair.collections[1].get_paths()])
    assert np.ptp(edges[:, 0]) > 6 > np.ptp(edges[:, 1])  # two modes side by side
    assert len(tj.plot(particles).axes) == 6


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 1), (4, 6, 3)])
def test_images_are_a_grid_the_largest_weights_first(shape):
    particles = population(*shape)
    axes = tj.plot(particles).axes
    assert len(axes) == 24
    order = np.argsort(-np.asarray(particles.weights))[:24]
    images = np.stack([ax.images[0].get_array() for ax in axes])
    expected = np.asarray(particles.x)[order].reshape(images.shape)
    scaled = (expected - expected.min()) / np.ptp(expected)
    np.testing.assert_allclose(images, scaled, atol=1e-12)
    assert axes[0].get_title() == f"{np.max(particles.weights):.1%}"
    few = tj.plot(population(*shape, num=5, weighted=False))
    assert [len(ax.images) for ax in few.axes] == [1] * 5
    assert not any(ax.get_title() for ax in few.axes)
    uneven = tj.plot(population(*shape, num=7)).axes  # the last row is not full
    assert [len(ax.images) for ax in uneven] == [1] * 7 + [0] * 5


@pytest.mark.parametrize(
    ("values", "dtype", "expected"),
    [([0.2, 0.9], float, [0.2, 0.9]), ([-1.0, 0.5], float, [0.0, 0.75]),
     ([0, 51], "uint8", [0, 0.2]), ([2.0, 2.0], float, [0, 0])],
)  # fmt: skip
def test_the_range_of_images(values, dtype, expected):
    x = jnp.asarray(values, dtype)[:, None, None] * jnp.ones((1, 2, 2), dtype)
    axes = tj.plot(unweighted(x)).axes
    np.testing.assert_allclose([ax.images[0].get_array()[0, 0] for ax in axes], expected)


def test_tokens_are_rows():
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 4, (60, 7)))
    particles = Particles(tokens, jnp.arange(60.0))
    (image,) = tj.plot(particles).axes[0].images
    np.testing.assert_array_equal(image.get_array(), tokens[::-1][:48])


def course(steps=10, num=30, d=1, **fields):
    failed = Failures.of(shift=np.arange(steps) == fields.pop("failed", -1))
    trajectory = drawn(d, num, steps)[1] if d else None
    return Trace(jnp.linspace(0, 1, steps + 1), failed, trajectory, **fields)


def test_a_trace_shows_sizes_and_trajectories():
    ess, resampled = np.linspace(30, 3, 10), np.arange(10) % 4 == 0
    tempering = np.linspace(0, 1, 10)
    sizes = {"ess": ess, "resampled": resampled, "tempering": tempering, "roots": np.arange(30)}
    figure = tj.plot(course(**sizes, failed=4))
    left, right = figure.axes
    segments = left.collections[0].get_segments()
    assert len(segments) == 24 * 10
    np.testing.assert_allclose(segments[0][:, 0], [0, 0.1])  # over time
    np.testing.assert_allclose(segments[0][:, 1], drawn(1, 30)[1][:2, 0, 0])
    np.testing.assert_allclose(right.lines[0].get_ydata(), ess / 30)
    np.testing.assert_allclose(right.lines[1].get_ydata(), tempering)
    np.testing.assert_allclose(right.collections[0].get_offsets()[:, 0], [0.1, 0.5, 0.9])
    assert figure.get_suptitle() == "Failed in step 4 of 10, from t = 0.4"
    plain = tj.plot(course(d=0, ess=ess, tempering=np.ones(10), roots=np.arange(30)))
    assert [len(ax.lines) for ax in plain.axes] == [1]
    assert plain.get_suptitle() == "10 steps from t = 0 to 1"
    for d, name in ((2, "x1"), (4, "direction 1")):
        (ax,) = tj.plot(course(d=d)).axes
        assert ax.get_xlabel() == name


def test_particles_with_a_trajectory_show_it():
    x, path = drawn(2, 30)
    trace = Trace(jnp.linspace(0, 1, 11), Failures.none(), jnp.asarray(path))
    figure = tj.plot(unweighted(jnp.asarray(x), trace))
    assert any(isinstance(c, LineCollection) for c in figure.axes[0].collections)
    assert legend(figure) == ["samples", "trajectories, fading in"]


def test_flows_are_drawn():
    model = tj.Analytic(MIXTURES[1])
    one = tj.flow(model, jnp.asarray([0.5]), 0.01, 1.0)
    for flow, num in ((one, 1), (jax.tree.map(lambda a: jnp.stack([a, a]), one), 2)):
        figure = tj.plot(flow)
        segments = figure.axes[0].collections[0].get_segments()
        assert len(segments) == 64 * num
        np.testing.assert_allclose(segments[-1][1], [1.0, one.denoised[0]], rtol=1e-6)
        assert figure.get_suptitle() == "Flow from t = 0.01 to 1"


@pytest.mark.parametrize(
    ("draw", "error", "message"),
    [
        (lambda: tj.plot(np.zeros((3, 2))), TypeError, "got ndarray: for arrays use"),
        (lambda: tj.plot(course(), truth=MIXTURES[1]), ValueError, "truth belongs to particles"),
        (lambda: tj.plot(course(d=0)), ValueError, "save_trajectory=True"),
        (lambda: tj.plot(population(2), truth=MIXTURES[1]), ValueError, "1 dimensions.* have 2"),
        (lambda: tj.plot(population(4, 4), truth=MIXTURES[1]), ValueError, "without a truth"),
        (lambda: tj.plot(unweighted(jnp.full((3, 2), jnp.nan))), ValueError, "3 of 3 are not"),
        (lambda: tj.plot(stack(population(2))), ValueError, "several runs"),
        (lambda: tj.plot(stack(course())), ValueError, "several runs"),
        (lambda: jax.jit(tj.plot)(population(2)), ValueError, "outside of jit"),
    ],
)
def test_what_cannot_be_drawn(draw, error, message):
    with pytest.raises(error, match=message):
        draw()


def stack(value):
    return jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), value)


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
    alone = plotting.frontier(marks)
    assert [text.get_text() for text in alone.legends[0].get_texts()] == ["a", "b"]
    assert alone.get_suptitle() == ""


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
