r"""Figures of samples and trajectories, with the density that they should follow.

| call | draws |
|---|---|
| `plot` | particles, an audit, a trace or a flow, each in its usual figure |
| `density_contours` | a density: a curve in one dimension, highest-density regions in two |
| `panel` | one method: density, samples (dots or a histogram) and some trajectories |
| `comparison` | a grid of panels with one density and one legend |
| `audit` | the weights of an audit: their histogram and their concentration |
| `frontier` | reward against diversity: a mark for each method, a curve for the exact tilts |
| `save` | writes a figure to a file |

The level of a contour is a mass: the contour of level 0.9 encloses the smallest region of the
window that contains 90% of the mass. Log-densities need not be normalized. They are normalized on a
grid in the window, which should therefore contain nearly all of the mass.

Matplotlib is imported when a figure is made. Its global state (`pyplot`, `rcParams`) is not used
and not changed. The colors are those of Okabe and Ito, which people with color blindness can
distinguish.
"""

import contextlib
import io
import os
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike

from tiltjax import _checks
from tiltjax.mixtures import GaussianMixture
from tiltjax.particles import Particles, Trace
from tiltjax.rewards import objectives
from tiltjax.samplers import Flow
from tiltjax.weighted import Audit, tail_length

BLUE, VERMILION, GREEN = "#0072B2", "#D55E00", "#007A5E"
_CYCLE = (BLUE, VERMILION, GREEN, "#E69F00", "#CC79A7", "#56B4E9", "#8A7A00")
_INK, _MUTED, _RULE = "#222222", "#6B6B6B", "#BDBDBD"
_LAND = ("#F7F5F0", "#ECE7DB", "#DDD5C2", "#C9BDA2")  # regions, from the largest to the smallest
_CONTOUR = "#6E6551"
LEVELS = (0.3, 0.6, 0.9, 0.99)
_GRID = {1: 1024, 2: 192}
_DOTS, _LINES, _LARGEST = 4000, 24, 30.0
_IMAGES, _SEQUENCES, _DIRECTIONS, _TIMES = 24, 48, 3, 65  # at most, in a figure of `plot`


class Panel(NamedTuple):
    """The contents of one panel of `comparison`.

    - `x`: `(n, d)` or `Particles`.
    - `trajectory`: `(steps + 1, n, d)` or `None`.
    - `note`: a short line under the title, such as a distance.
    - `highlight`: whether the title has another color, for exact methods.
    """

    title: str
    x: Any
    trajectory: Any = None
    note: str = ""
    highlight: bool = False


class Mark(NamedTuple):
    """One run of a method in `frontier`: two numbers and their standard errors. Marks with the same
    title are connected by a line.
    """

    title: str
    reward: float
    diversity: float
    reward_error: float = 0.0
    diversity_error: float = 0.0


class _Field(NamedTuple):
    """A normalized density on a grid; `axes` contains one array of coordinates for each
    dimension.
    """

    axes: list[np.ndarray]
    density: np.ndarray


def plot(
    value: Particles | Audit | Trace | Flow,
    *,
    truth: GaussianMixture | Particles | ArrayLike | None = None,
) -> Any:
    """The usual figure of an object, as a `matplotlib.figure.Figure`.

    | object | figure |
    |---|---|
    | particles in one dimension | a weighted histogram |
    | in two dimensions | dots, whose area is proportional to the weight |
    | in more | the same for the first three principal directions, and pairs of them |
    | images `(H, W)`, `(H, W, 1)`, `(H, W, 3)` | at most 24 images, the largest weights first |
    | tokens | one row for each sequence, the largest weights first |
    | an audit | as `audit` draws it |
    | a trace | effective sample size, tempering, resampling and trajectories, if it has them |
    | a flow, also a vmapped one | trajectories |

    **Arguments:** `truth`: what the particles should follow, a mixture, a tilt of one
    (`theory.tilt`), or samples `(m, *shape)`. Mixtures are drawn as densities, samples as gray dots
    or as an outline. The principal directions are then those of `truth`.

    **Raises:** `ImportError` without matplotlib; `TypeError` for other objects; `ValueError` for
    several runs in one object, for traced values, for samples that are not finite, for a trace
    without anything to draw, and for a `truth` that does not fit.
    """
    if not isinstance(value, Particles | Audit | Trace | Flow):
        raise TypeError(
            f"plot draws Particles, an Audit, a Trace or a Flow, got {type(value).__name__}: for "
            "arrays use plotting.panel or plotting.comparison"
        )
    if truth is not None and not isinstance(value, Particles):
        raise ValueError(f"truth belongs to particles, got {type(value).__name__}: leave it out")
    if not _checks.concrete(value):
        raise ValueError("a figure is made of numbers: call plot outside of jit, vmap and grad")
    if isinstance(value, Audit):
        return audit(value)
    if isinstance(value, Flow):
        return _plot_flow(value)
    if (value.log_weights if isinstance(value, Particles) else value.times).ndim > 1:
        raise ValueError("there are several runs: plot one, jax.tree.map(lambda a: a[i], value)")
    if isinstance(value, Trace):
        return _plot_trace(value)
    return _plot_particles(value, truth)


def _plot_particles(particles: Particles, truth: Any) -> Any:
    shape, dtype = particles.x.shape[1:], particles.x.dtype
    is_image = len(shape) == 2 or (len(shape) == 3 and shape[-1] in (1, 3))
    if (is_image or jnp.issubdtype(dtype, jnp.integer)) and truth is not None:
        raise ValueError("images and tokens are drawn without a truth: leave it out")
    if is_image:
        return _plot_images(particles)
    if jnp.issubdtype(dtype, jnp.integer):
        return _plot_tokens(particles)
    law = _vectors(particles)
    if truth is not None:
        truth = getattr(truth, "mixture", truth)  # the law of a tilt
        truth = truth if isinstance(truth, GaussianMixture) else _vectors(truth)
        dim = truth.dim if isinstance(truth, GaussianMixture) else truth.x.shape[1]
        if dim != law.x.shape[1]:
            raise ValueError(f"truth has {dim} dimensions, the particles have {law.x.shape[1]}")
    if law.x.shape[1] > 2:
        return _plot_pairs(law, truth)
    trajectory = None if particles.trace is None else particles.trace.trajectory
    if trajectory is not None:
        trajectory = np.asarray(trajectory, np.float64).reshape(*trajectory.shape[:2], -1)
    return _plot_panel(law, truth, trajectory)


def _plot_panel(law: Particles, truth: Any, trajectory: np.ndarray | None) -> Any:
    """One panel, with a legend below it if there is more than the particles."""
    dim = law.x.shape[1]
    directions = np.eye(dim)
    law, truth = _project(law, directions), _project(truth, directions)
    figure = _figure(5.0, 4.4 if dim == 2 else 3.6)
    title, _, note = _heading(law).partition(", ")
    _draw_law(figure.subplots(), Panel(title, law, trajectory, note), truth)
    if truth is not None or trajectory is not None:
        _add_legend(figure, dim, truth, trajectory is not None, "outside lower left")
    return figure


def _add_legend(figure: Any, dim: int, truth: Any, trajectories: bool, place: str) -> None:
    is_mixture = isinstance(truth, GaussianMixture)
    density = is_mixture or (truth is not None and dim == 1)
    handles = _legend(dim, BLUE, density=density, trajectories=trajectories, name="truth")
    if truth is not None and not density:
        (lines,) = _matplotlib("lines")
        style = {"color": _CONTOUR, "marker": "o", "markersize": 4, "linestyle": ""}
        handles = [lines.Line2D([], [], label="truth", **style), *handles]
    figure.legend(handles=handles, loc=place, frameon=False, fontsize=8, labelcolor=_MUTED)


def _plot_pairs(law: Particles, truth: Any) -> Any:
    """A triangle of panels: histograms of the principal directions, and dots of pairs of them."""
    directions = _principal_directions(law if truth is None else truth)
    law, truth = _project(law, directions), _project(truth, directions)
    number = directions.shape[1]
    figure = _figure(2.5 * number, 2.4 * number)
    axes = figure.subplots(number, number, squeeze=False, sharex="col")
    for row, column in np.ndindex(number, number):
        ax = axes[row, column]
        if column > row:
            ax.remove()
            continue
        pair = np.eye(number)[:, [row] if row == column else [column, row]]
        _draw_law(ax, Panel("", _project(law, pair)), _project(truth, pair))
        ax.tick_params(labelbottom=row == number - 1, labelleft=column == 0)
        if row == number - 1:
            ax.set_xlabel(f"direction {column + 1}", color=_MUTED, fontsize=9)
        if column == 0 < row:
            ax.set_ylabel(f"direction {row + 1}", color=_MUTED, fontsize=9)
    if truth is not None:
        _add_legend(figure, 2, truth, False, "upper right")
    _set_suptitle(figure, _heading(law))
    return figure


def _plot_images(particles: Particles) -> Any:
    order, weights = _by_weight(particles, _IMAGES)
    images = np.asarray(particles.x, np.float64)[order]
    images = images[..., 0] if images.ndim == 4 and images.shape[-1] == 1 else images
    low, high = images.min(), images.max()
    if jnp.issubdtype(particles.x.dtype, jnp.integer):
        low, high = 0, 255
    elif low >= -1 and high <= 1:
        low, high = (0 if low >= 0 else -1), 1
    images = (images - low) / max(high - low, np.finfo(float).tiny)
    columns = min(6, len(order))
    rows = -(-len(order) // columns)
    labeled = _is_weighted(particles)
    height, width = images.shape[1:3]
    figure = _figure(1.3 * columns, rows * (1.3 * height / width + 0.2 * labeled) + 0.35)
    for i, ax in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        ax.set_axis_off()
        if i < len(order):
            ax.imshow(images[i], cmap="gray", vmin=0, vmax=1)
            if labeled:
                ax.set_title(f"{weights[i]:.1%}", fontsize=7, color=_MUTED, pad=2)
    _set_suptitle(figure, _heading(particles))
    return figure


def _plot_tokens(particles: Particles) -> Any:
    order, _ = _by_weight(particles, _SEQUENCES)
    tokens = np.asarray(particles.x).reshape(len(particles), -1)[order]
    figure = _figure(6.0, 1.2 + 0.09 * len(order))
    ax = figure.subplots()
    few = tokens.min() >= 0 and tokens.max() < 20
    ends = {"vmin": 0, "vmax": 19} if few else {}
    ax.imshow(
        tokens, cmap="tab20" if few else "viridis", aspect="auto", interpolation="nearest", **ends
    )
    ax.set_xlabel("position", color=_MUTED, fontsize=9)
    ax.set_ylabel("sequence", color=_MUTED, fontsize=9)
    _plain(ax)
    _set_suptitle(figure, _heading(particles))
    return figure


def _plot_trace(trace: Trace) -> Any:
    drawn = [values is not None for values in (trace.trajectory, trace.ess)]
    if not any(drawn):
        raise ValueError(
            "this trace has no trajectory and no effective sample sizes: sample with "
            "save_trajectory=True, or by smc"
        )
    figure = _figure(4.4 * sum(drawn), 3.6)
    axes = list(figure.subplots(1, sum(drawn), squeeze=False).flat)
    times = np.asarray(trace.times, np.float64)
    if trace.trajectory is not None:
        _draw_course(axes[0], times, np.asarray(trace.trajectory, np.float64))
    if trace.ess is not None:
        _draw_sizes(axes[-1], times[1:], trace)
    failure = trace._failure()
    _set_suptitle(figure, f"Failed in {failure.split(':')[0]}" if failure else trace._steps())
    return figure


def _draw_sizes(ax: Any, times: np.ndarray, trace: Trace) -> None:
    """Effective sample sizes as fractions of the particles, tempering, and resampling."""
    ess = np.asarray(trace.ess, np.float64)
    fraction = ess / (ess.max() if trace.roots is None else len(trace.roots))
    ax.plot(times, fraction, color=BLUE, linewidth=1.6, label="effective sample size")
    if trace.resampled is not None and np.any(resampled := np.asarray(trace.resampled)):
        style = {"s": 22, "facecolors": "white", "edgecolors": BLUE, "zorder": 3}
        ax.scatter(times[resampled], fraction[resampled], label="resampling", **style)
    if trace.tempering is not None and np.any(np.asarray(trace.tempering) != 1):
        style = {"color": VERMILION, "linewidth": 1.4, "linestyle": "--"}
        ax.plot(times, np.asarray(trace.tempering, np.float64), label="tempering", **style)
    ax.set_ylim(0, 1.04)
    ax.set_xlabel("t", color=_MUTED, fontsize=9)
    ax.set_ylabel("fraction", color=_MUTED, fontsize=9)
    ax.legend(frameon=False, fontsize=8, labelcolor=_MUTED)
    _plain(ax)


def _plot_flow(flow: Flow) -> Any:
    several = flow if flow.t0.ndim else jax.tree.map(lambda leaf: leaf[None], flow)
    start, end = (np.ravel(time)[0] for time in (flow.t0, flow.t1))
    times = jnp.linspace(start, end, _TIMES, dtype=several.edge.dtype)
    states = _states(several, times)
    figure = _figure(4.4, 3.6)
    ax = figure.subplots()
    _draw_course(ax, np.asarray(times), np.asarray(states, np.float64).swapaxes(0, 1))
    _set_suptitle(figure, f"Flow from t = {start:.4g} to {end:.4g}")
    return figure


@jax.jit
def _states(flows: Flow, times: jax.Array) -> jax.Array:
    return jax.vmap(lambda flow: jax.vmap(flow)(times))(flows)


def _draw_course(ax: Any, times: np.ndarray, trajectory: np.ndarray) -> None:
    """Some trajectories `(steps + 1, n, *shape)`: over time in one dimension, else in the plane, by
    the first two principal directions of their ends.
    """
    lines = trajectory.reshape(*trajectory.shape[:2], -1)
    names = ("t", "x") if lines.shape[2] == 1 else ("x1", "x2")
    if lines.shape[2] > 2:
        names = ("direction 1", "direction 2")
        lines = lines @ _principal_directions(_vectors(lines[-1]), 2)
    lines = lines[:, :_LINES]
    if names[0] == "t":
        over = np.broadcast_to(times[:, None, None], lines.shape)
        lines = np.concatenate([over, lines], axis=2)
    _frame(ax, contour_bounds(lines.reshape(-1, 2), 0.06))
    _draw_trajectories(ax, lines)
    ax.scatter(*lines[-1].T, s=9, color=BLUE, linewidths=0, zorder=3)
    ax.set_xlabel(names[0], color=_MUTED, fontsize=9)
    ax.set_ylabel(names[1], color=_MUTED, fontsize=9)


def _draw_law(ax: Any, entry: Panel, truth: GaussianMixture | Particles | None) -> None:
    """Particles in one or two dimensions, with what they should follow."""
    bounds = _common_window([law for law in (entry.x, truth) if law is not None])
    field = None
    if isinstance(truth, GaussianMixture):
        field = _evaluate(truth.log_prob, bounds)
    elif truth is not None:
        x, weights = _samples(truth, len(bounds))
        if len(bounds) == 2:
            style = {"color": _CONTOUR, "alpha": 0.35, "linewidths": 0, "zorder": 1}
            shown, area = _dots(x, weights)
            ax.scatter(*shown.T, s=4 * area, rasterized=True, **style)
        else:
            low, high = bounds[0]
            edges = np.linspace(low, high, 61)
            heights = np.histogram(x[:, 0], edges, weights=weights)[0] / np.diff(edges)
            ax.step(edges, [*heights, 0], where="post", color=_INK, linewidth=1.2, zorder=4)
    _draw_panel(ax, entry, bounds, field, BLUE)


def _dots(x: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The samples that are drawn, and their areas relative to that of a mean weight."""
    return x[:_DOTS], np.minimum(weights[:_DOTS] * len(x), _LARGEST)


def _vectors(samples: Particles | ArrayLike, directions: np.ndarray | None = None) -> Particles:
    """Particles with vectors `x` or `x @ directions` as states, in double precision."""
    if isinstance(samples, Particles):
        x, log_weights = samples.x, samples.log_weights
    else:
        x, log_weights = samples, np.zeros(len(np.asarray(samples)))
    x = np.asarray(x, np.float64)
    x: Any = x.reshape(len(x), -1)
    law = Particles(x if directions is None else x @ directions, jnp.asarray(log_weights))
    _samples(law)  # refuses what is not finite
    return law


def _project(law: Any, directions: np.ndarray) -> Any:
    """A mixture or particles in the coordinates `x @ directions`."""
    if isinstance(law, GaussianMixture):
        weights, means, covs = (
            np.asarray(part, np.float64) for part in (law.weights, law.means, law.covs)
        )
        return GaussianMixture(weights, means @ directions, directions.T @ covs @ directions)
    return None if law is None else _vectors(law, directions)


def _principal_directions(
    law: GaussianMixture | Particles, number: int = _DIRECTIONS
) -> np.ndarray:
    """The directions of the largest variances, as columns."""
    if isinstance(law, GaussianMixture):
        return np.linalg.eigh(np.asarray(law.cov(), np.float64))[1][:, ::-1][:, :number]
    x, weights = _samples(law)
    order = np.argsort(-weights, kind="stable")[:1000]
    centered = np.sqrt(weights)[order, None] * (x - weights @ x)[order]
    return np.linalg.svd(centered, full_matrices=False)[2][:number].T


def _common_window(laws: Sequence[GaussianMixture | Particles]) -> np.ndarray:
    """A window that contains all samples with a weight, and 3.5 standard deviations around each
    component of a mixture.
    """
    corners = []
    for law in laws:
        if isinstance(law, GaussianMixture):
            means = np.asarray(law.means, np.float64)
            widths = 3.5 * np.sqrt(np.diagonal(np.asarray(law.covs), axis1=1, axis2=2))
            corners += [means - widths, means + widths]
        else:
            x, weights = _samples(law)
            corners += list(contour_bounds(x[weights > 0], 0.08).T[:, None])
    return contour_bounds(np.concatenate(corners), 0.0)


def _by_weight(particles: Particles, number: int) -> tuple[np.ndarray, np.ndarray]:
    """The indices of the largest weights in descending order, and these weights."""
    weights = np.asarray(particles.weights, np.float64)
    order = np.argsort(-weights, kind="stable")[:number]
    return order, weights[order]


def _is_weighted(particles: Particles) -> bool:
    return bool(np.ptp(np.asarray(particles.weights)) > 0)


def _heading(particles: Particles) -> str:
    size = particles._rows().get("effective sample size")
    return f"{len(particles)} particles" + (f", effective sample size {size}" if size else "")


def _figure(width: float, height: float) -> Any:
    (figure,) = _matplotlib("figure")
    return figure.Figure(figsize=(width, height), layout="constrained", facecolor="white")


def _set_suptitle(figure: Any, text: str, fontsize: int = 11) -> None:
    figure.suptitle(text, x=0.012, ha="left", fontsize=fontsize, fontweight="bold", color=_INK)


def contour_bounds(samples: ArrayLike | Particles, margin: float = 0.15) -> np.ndarray:
    """A window around the samples, `(d, 2)`: their range, with `margin` times the range added on
    both sides.
    """
    x, _ = _samples(samples)
    low, high = x.min(axis=0), x.max(axis=0)
    spread = np.where(high > low, high - low, 1.0)
    return np.stack([low - margin * spread, high + margin * spread], axis=1)


def density_contours(
    ax: Any, log_density: Callable, bounds: ArrayLike, levels: Sequence[float] = LEVELS
) -> None:
    """Draw a density: a curve in one dimension, highest-density regions in two.

    **Arguments:**

    - `ax`: matplotlib axes.
    - `log_density`: `x -> scalar` of one point of shape `(d,)`, d = 1 or 2, up to a constant; it is
      vmapped.
    - `bounds`: `(d, 2)`, the window, or `(low, high)` in one dimension.
    - `levels`: the masses that the contours enclose, between 0 and 1.

    **Raises:** `ValueError` for bounds that are not a window, levels outside (0, 1), and a density
    that is NaN or infinite, or zero in the whole window.
    """
    bounds = _window(bounds)
    _draw_density(ax, _evaluate(log_density, bounds), levels)
    _frame(ax, bounds)


def panel(
    ax: Any,
    x: ArrayLike | Particles,
    *,
    log_density: Callable | None = None,
    trajectory: ArrayLike | None = None,
    bounds: ArrayLike,
    title: str,
    note: str = "",
    color: str = BLUE,
    highlight: bool = False,
) -> None:
    """Draw one method: its samples, some of its trajectories, and the density that the samples
    should follow.

    In two dimensions the samples are dots over the contours of the density. In one dimension they
    are a histogram under the curve of the density, and the trajectories are drawn above it, with
    time downwards. Trajectories are transparent at their start. At most 4000 dots and 24
    trajectories are drawn. The area of a dot is proportional to its weight, up to thirty times the
    mean weight. Samples outside the window are not drawn.

    **Arguments:** `x`: `(n, d)` or `Particles`, d = 1 or 2; `trajectory`: `(steps + 1, n, d)`; the
    others as in `density_contours` and `Panel`.

    **Raises:** `ValueError` for dimensions that disagree, samples that are not finite, and as
    `density_contours`.
    """
    bounds = _window(bounds)
    field = None if log_density is None else _evaluate(log_density, bounds)
    _draw_panel(ax, Panel(title, x, trajectory, note, highlight), bounds, field, color)


def comparison(
    panels: Sequence[Panel],
    *,
    log_density: Callable | None = None,
    bounds: ArrayLike,
    suptitle: str = "",
    columns: int | None = None,
    color: str = BLUE,
) -> Any:
    """A grid of panels with the same density, as a `matplotlib.figure.Figure` ten inches wide
    (1600 pixels in a file of `save`).

    **Arguments:** `panels`: the contents, in reading order; `columns`: by default four, or fewer if
    there are few panels or fewer columns leave no gaps; the others as in `panel`.

    **Raises:** `ImportError` without matplotlib; `ValueError` for an empty list, and as `panel`.
    """
    panels = [Panel(*entry) for entry in panels]
    if not panels:
        raise ValueError("panels must hold at least one Panel(title, x), got an empty list")
    bounds = _window(bounds)
    field = None if log_density is None else _evaluate(log_density, bounds)
    columns = _columns(len(panels)) if columns is None else _checks.count(columns, "columns")
    figure, axes = _grid(len(panels), columns, bounds, bool(suptitle))
    noted = any(entry.note for entry in panels)
    for index, (ax, entry) in enumerate(zip(axes, panels, strict=True)):
        _draw_panel(ax, entry, bounds, field, color, noted)
        # Tick labels only at the lower and the left edge of the grid.
        ax.tick_params(
            labelbottom=index + columns >= len(panels),
            labelleft=len(bounds) == 2 and index % columns == 0,
        )
    if suptitle:
        _set_suptitle(figure, suptitle, 14)
    moving = any(entry.trajectory is not None for entry in panels)
    handles = _legend(len(bounds), color, density=field is not None, trajectories=moving)
    figure.legend(
        handles=handles,
        loc="outside lower left",
        ncols=len(handles),
        frameon=False,
        fontsize=9,
        labelcolor=_MUTED,
    )
    return figure


def _grid(num: int, columns: int, bounds: np.ndarray, titled: bool) -> tuple[Any, list]:
    """A figure ten inches wide, and `num` axes in reading order, with the window's aspect ratio."""
    rows, planar = -(-num // columns), len(bounds) == 2
    aspect = float(np.clip(np.ptp(bounds[1]) / np.ptp(bounds[0]), 0.5, 2.0)) if planar else 0.8
    width = 10.0
    height = rows * (width / columns * aspect * 0.94 + 0.42) + 0.35 + 0.4 * titled
    figure = _figure(width, height)
    figure.get_layout_engine().set(w_pad=0.05, h_pad=0.05, hspace=0.03, wspace=0.02)
    axes = list(figure.subplots(rows, columns, sharex=True, sharey=planar, squeeze=False).flat)
    for ax in axes[num:]:
        ax.remove()
    return figure, axes[:num]


def _legend(
    dim: int, color: str, *, density: bool, trajectories: bool, name: str = "the tilt"
) -> list:
    """The legend of the density, the samples and the trajectories in `dim` dimensions; `name` is
    that of the density.
    """
    lines, patches = _matplotlib("lines", "patches")
    line = lambda label, **style: lines.Line2D([], [], label=label, **style)
    handles = []
    if density and dim == 2:
        truth = f"{name}: regions of " + _percent(LEVELS) + " mass"
        region = {"facecolor": _LAND[2], "edgecolor": _CONTOUR, "linewidth": 0.8}
        handles.append(patches.Patch(label=truth, **region))
    elif density:
        handles.append(line(name, color=_INK, linewidth=1.4))
    if dim == 2:
        handles.append(line("samples", color=color, marker="o", markersize=4, linestyle=""))
    else:
        handles.append(patches.Patch(facecolor=color, alpha=0.5, label="samples"))
    if trajectories:
        handles.append(line("trajectories, fading in", color=VERMILION, linewidth=1.2))
    return handles


def audit(report: Audit) -> Any:
    """Two panels of an `Audit`, eight inches wide: a histogram of the log-weights minus `log Z`,
    and the fraction of the total weight that the largest weights have.

    For equal weights, the first panel would be a line at 0 and the second the gray curve. A curve
    that is high on the left means that few particles determine the estimate of `log Z`. The dotted
    line is where the tail begins to which the Pareto law is fitted.
    """
    log_weights = np.asarray(report.particles.log_weights, np.float64)
    relative = np.sort(log_weights - report.log_norm.value)[::-1]
    n = len(relative)
    figure = _figure(8.0, 3.4)
    left, right = figure.subplots(1, 2)

    shown = relative[np.isfinite(relative)]
    low = max(shown.min(), np.quantile(shown, 0.001) - 1)
    left.hist(np.clip(shown, low, None), bins=60, color=BLUE, alpha=0.55, linewidth=0)
    left.axvline(0, color=_INK, linewidth=1.2, label="log Z")
    left.axvline(
        -report.path_kl.value,
        color=VERMILION,
        linewidth=1.2,
        linestyle="--",
        label="evidence bound",
    )
    left.set_xlabel("log w - log Z, in nats", color=_MUTED, fontsize=9)
    left.set_title("log-weights", loc="left", fontsize=10, color=_INK)
    left.set_yticks([])
    left.legend(frameon=False, fontsize=8, labelcolor=_MUTED)

    fraction, weights = (np.arange(n) + 1) / n, np.exp(relative)
    right.semilogx(fraction, np.cumsum(weights) / np.sum(weights), color=BLUE, linewidth=1.6)
    right.semilogx(fraction, fraction, color=_RULE, linewidth=1.0)
    right.text(
        0.97, 0.06, "equal weights", transform=right.transAxes, ha="right", fontsize=8, color=_MUTED
    )
    tail = tail_length(n) / n
    right.axvline(tail, color=_INK, linewidth=1.0, linestyle=":")
    right.text(tail * 0.9, 0.97, "fitted tail", ha="right", va="top", fontsize=8, color=_MUTED)
    right.set_ylim(0, 1.04)
    right.set_xlabel("largest weights, as a fraction of all particles", color=_MUTED, fontsize=9)
    right.set_title(
        f"fraction of the weight (Pareto k = {report.pareto_k:.2f})",
        loc="left",
        fontsize=10,
        color=_INK,
    )
    for ax in (left, right):
        _plain(ax)
    left.spines["left"].set_visible(False)
    _set_suptitle(figure, report.verdict.split(":")[0] + f" · {report.sampler}")
    return figure


def frontier(
    marks: Sequence[Mark],
    curve: ArrayLike | None = None,
    *,
    reward: str = "mean reward",
    diversity: str = "diversity",
    suptitle: str = "",
) -> Any:
    """Reward against diversity: one mark for each run, with error bars of one standard error. Marks
    of one method are connected by a thin line.

    Marks that no other mark dominates are filled (`objectives.front`). A mark above the curve of
    the exact tilts is not a better sampler. Among all laws with the same mean reward, the tilt has
    the smallest divergence from the base model; a more diverse law is further from the base model.

    **Arguments:**

    - `marks`: `Mark(title, reward, diversity, ...)`, at least one.
    - `curve`: `(m, 2)`, the two numbers of the exact tilts in order of increasing scale. A star
      marks the first.
    - `reward`, `diversity`: the names of the axes.

    **Raises:** `ImportError` without matplotlib; `ValueError` without marks, for numbers that are
    not finite, and for another shape of `curve`.
    """
    marks = [Mark(*entry) for entry in marks]
    values = np.asarray([entry[1:] for entry in marks], np.float64).reshape(-1, 4)
    line = np.zeros((0, 2)) if curve is None else np.asarray(curve, np.float64)
    if not len(marks) or not np.all(np.isfinite(values)):
        raise ValueError(
            f"marks must be one Mark(title, reward, diversity) or more, all finite, got {marks}"
        )
    if line.ndim != 2 or line.shape[1] != 2 or not np.all(np.isfinite(line)):
        raise ValueError(
            "curve must hold finite pairs (reward, diversity), shape (m, 2), got shape "
            f"{line.shape}"
        )
    figure = _figure(8.0, 4.6)
    ax, best = figure.subplots(), objectives.front(values[:, :2])
    if len(line):
        ax.plot(*line.T, color=_INK, linewidth=1.6, zorder=1, label="exact tilts")
        ax.plot(
            *line[0], color=_INK, marker="*", markersize=11, linestyle="", zorder=4, label="base"
        )
    titles = np.array([entry.title for entry in marks])
    for i, title in enumerate(dict.fromkeys(titles.tolist())):
        rows = titles == title
        _draw_sweep(ax, title, i, values[rows], best[rows])
    ax.set_xlabel(reward, color=_MUTED, fontsize=9)
    ax.set_ylabel(diversity, color=_MUTED, fontsize=9)
    _plain(ax)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8, labelcolor=_INK)
    if suptitle:
        _set_suptitle(figure, suptitle)
    return figure


def _draw_sweep(ax: Any, title: str, i: int, values: np.ndarray, filled: np.ndarray) -> None:
    """The marks of method number i, with their error bars and the line that connects them."""
    x, y, x_error, y_error = values.T
    color, marker = _CYCLE[i % len(_CYCLE)], "osD^vPX"[i // len(_CYCLE) % 7]
    ax.errorbar(x, y, y_error, x_error, color=color, linewidth=0.8, elinewidth=1.0, zorder=2)
    face = [color if one else "white" for one in filled]
    style = {"s": 34, "marker": marker, "linewidths": 1.3, "zorder": 3}
    ax.scatter(x, y, facecolors=face, edgecolors=color, **style)
    ax.plot([], [], color=color, marker=marker, markersize=5.5, linestyle="", label=title)


def _plain(ax: Any) -> None:
    """Keep only the left and the lower side of the axes, in gray."""
    ax.tick_params(length=2.5, width=0.6, color=_RULE, labelcolor=_MUTED, labelsize=8)
    for side, spine in ax.spines.items():
        spine.set(color=_RULE, linewidth=0.6, visible=side in ("left", "bottom"))


def _draw_panel(
    ax: Any,
    entry: Panel,
    bounds: np.ndarray,
    field: _Field | None,
    color: str,
    noted: bool = False,
) -> None:
    x, weights = _samples(entry.x, len(bounds))
    trajectories = entry.trajectory
    if trajectories is not None:
        trajectories = _trajectories(trajectories, len(bounds))
    if field is not None:
        _draw_density(ax, field, LEVELS)
    if len(bounds) == 2:
        shown, area = _dots(x, weights)
        # Few dots are larger and more opaque. From about a thousand dots on, darkness shows
        # density.
        crowd = min(len(shown) / 1000, 4.0)
        size, alpha = 3.2 / max(crowd, 0.3) ** 0.4, 0.5 / max(crowd, 0.5) ** 0.5
        ax.scatter(
            *shown.T,
            s=size * area,
            color=color,
            alpha=alpha,
            linewidths=0,
            zorder=3,
            rasterized=True,
        )
        if trajectories is not None:
            _draw_trajectories(ax, trajectories)
    else:
        _draw_histogram(ax, x[:, 0], weights, trajectories, bounds, color)
    _frame(ax, bounds)
    title_color = GREEN if entry.highlight else _INK
    pad = 15 if entry.note or noted else 5
    ax.set_title(
        entry.title, loc="left", fontsize=10, fontweight="bold", color=title_color, pad=pad
    )
    if entry.note:
        offset = {"xytext": (0, 4), "textcoords": "offset points"}
        ax.annotate(
            entry.note, (0, 1), xycoords="axes fraction", fontsize=8, color=_MUTED, **offset
        )


def _draw_density(ax: Any, field: _Field, levels: Sequence[float]) -> None:
    if len(field.axes) == 1:
        ax.plot(field.axes[0], field.density, color=_INK, linewidth=1.4, zorder=4)
        return
    thresholds = _thresholds(field, levels)
    shades = [
        _LAND[round(i * (len(_LAND) - 1) / max(len(thresholds) - 1, 1))]
        for i in range(len(thresholds))
    ]
    top = max(field.density.max(), thresholds[-1]) * 1.01
    ax.contourf(*field.axes, field.density.T, levels=[*thresholds, top], colors=shades, zorder=1)
    # Regions that fill the whole window have no edge.
    edges = [low for low in thresholds if low > field.density.min()]
    if edges:
        ax.contour(
            *field.axes,
            field.density.T,
            levels=edges,
            colors=_CONTOUR,
            linewidths=0.6,
            alpha=0.9,
            zorder=4,
        )


def _draw_trajectories(ax: Any, trajectories: np.ndarray) -> None:
    """Thin lines that are transparent at their start."""
    (collections,) = _matplotlib("collections")
    steps, num = len(trajectories) - 1, trajectories.shape[1]
    # (steps, num, 2, 2): later steps are drawn over earlier ones
    segments = np.stack([trajectories[:-1], trajectories[1:]], axis=2)
    shades = np.zeros((steps, num, 4))
    shades[..., :3] = [int(VERMILION[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    shades[..., 3] = (0.06 + 0.59 * np.linspace(0, 1, steps) ** 1.5)[:, None]
    segments, shades = segments.reshape(-1, 2, 2), shades.reshape(-1, 4)
    # With butt ends, as round ends of transparent segments overlap and look like beads. Dots are
    # drawn over the lines.
    style = {"linewidths": 0.7, "capstyle": "butt", "zorder": 2.5, "rasterized": True}
    ax.add_collection(
        collections.LineCollection(list(segments), colors=shades, **style), autolim=False
    )


def _draw_histogram(
    ax: Any,
    x: np.ndarray,
    weights: np.ndarray,
    trajectories: np.ndarray | None,
    bounds: np.ndarray,
    color: str,
) -> None:
    low, high = bounds[0]
    edges = np.linspace(low, high, 61)
    # Fractions of all samples, including those outside the window.
    heights = np.histogram(x, edges, weights=weights)[0] / np.diff(edges)
    ax.stairs(heights, edges, fill=True, color=color, alpha=0.5, linewidth=0, zorder=2)
    peak = max([heights.max(), *(line.get_ydata().max() for line in ax.lines)])
    peak = peak if peak > 0 else 1.0
    ax.set_ylim(0, 1.08 * peak if trajectories is None else 1.75 * peak)
    if trajectories is not None:
        # Trajectories share the horizontal axis with the histogram, and end above their bars.
        times = np.linspace(1.72 * peak, 1.12 * peak, len(trajectories))
        times = np.broadcast_to(times[:, None, None], trajectories.shape)
        ax.axhline(1.1 * peak, color=_RULE, linewidth=0.6, zorder=1)
        _draw_trajectories(ax, np.concatenate([trajectories, times], axis=2))


def _frame(ax: Any, bounds: np.ndarray) -> None:
    (ticker,) = _matplotlib("ticker")
    ax.set_xlim(*bounds[0])
    ax.xaxis.set_major_locator(ticker.MaxNLocator(5, steps=[1, 2, 5, 10]))
    ax.tick_params(length=2.5, width=0.6, color=_RULE, labelcolor=_MUTED, labelsize=8)
    if len(bounds) == 2:
        ax.set_ylim(*bounds[1])
        ax.yaxis.set_major_locator(ticker.MaxNLocator(5, steps=[1, 2, 5, 10]))
    else:
        ax.yaxis.set_major_locator(ticker.NullLocator())
    for spine in ax.spines.values():
        spine.set(color=_RULE, linewidth=0.6)


def _columns(num: int) -> int:
    """At most four columns; three if three columns fill all rows and four do not."""
    if num <= 4:
        return num
    return 3 if num % 4 and (num % 3 == 0 or num == 5) else 4


def _percent(levels: Sequence[float]) -> str:
    names = [f"{100 * level:g}%" for level in levels]
    return ", ".join(names[:-1]) + " and " + names[-1]


def _evaluate(log_density: Callable, bounds: np.ndarray) -> _Field:
    axes = [np.linspace(low, high, _GRID[len(bounds)]) for low, high in bounds]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
    values = jax.vmap(log_density)(jnp.asarray(points.reshape(-1, len(bounds))))
    values = np.asarray(values, np.float64)
    if values.shape != (points[..., 0].size,):
        raise ValueError(
            f"log_density must map one point of shape ({len(bounds)},) to a scalar, got "
            f"{values.shape[1:]}"
        )
    if np.any(np.isnan(values)) or not np.isfinite(values.max()):
        raise ValueError(
            "log_density must be below infinity, not NaN, and above -inf somewhere inside the "
            "bounds"
        )
    density = np.exp(values - values.max()).reshape(points.shape[:-1])
    cell = np.prod([axis[1] - axis[0] for axis in axes])
    return _Field(axes, density / (density.sum() * cell))


def _thresholds(field: _Field, levels: Sequence[float]) -> list[float]:
    """The densities above which the masses `levels` lie, in increasing order."""
    if not levels or not all(0 < level < 1 for level in levels):
        raise ValueError(
            f"levels must be masses between 0 and 1, such as {LEVELS}, got {tuple(levels)}"
        )
    ordered = np.sort(field.density.ravel())[::-1]
    mass = np.cumsum(ordered) / ordered.sum()
    found = set()
    for level in levels:
        value = ordered[np.searchsorted(mass, level)]
        # Half-way to the next lower value: a contour at the height of a flat density would enclose
        # nothing.
        found.add(float(value + np.max(ordered, where=ordered < value, initial=0.0)) / 2)
    return sorted(found)  # in a flat region several levels may have the same contour


def _window(bounds: ArrayLike) -> np.ndarray:
    window = np.asarray(bounds, np.float64)
    window = window[None] if window.ndim == 1 else window
    if (
        window.shape not in ((1, 2), (2, 2))
        or not np.all(np.isfinite(window))
        or np.any(window[:, 0] >= window[:, 1])
    ):
        raise ValueError(
            "bounds must be (low, high) or ((low, high), (low, high)) with low < high, got "
            f"{np.asarray(bounds).tolist()}"
        )
    return window


def _samples(value: ArrayLike | Particles, dim: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Samples `(n, d)` and their normalized weights."""
    x = np.asarray(value.x if isinstance(value, Particles) else value, np.float64)
    if x.ndim != 2 or len(x) == 0 or (dim is not None and x.shape[1] != dim):
        expected = "d" if dim is None else dim
        raise ValueError(
            f"samples must have shape (n, {expected}), as the bounds say, got {x.shape}: "
            "choose coordinates with x[:, :2], make a column with x[:, None]"
        )
    if not np.all(np.isfinite(x)):
        raise ValueError(
            f"samples must be finite, {np.sum(~np.isfinite(x).all(axis=1))} of {len(x)} are not"
        )
    weights = (
        np.asarray(value.weights, np.float64)
        if isinstance(value, Particles)
        else np.full(len(x), 1 / len(x))
    )
    return x, weights


def _trajectories(value: ArrayLike, dim: int) -> np.ndarray:
    trajectories = np.asarray(value, np.float64)
    if trajectories.ndim != 3 or len(trajectories) < 2 or trajectories.shape[2] != dim:
        raise ValueError(
            f"trajectory must have shape (steps + 1, n, {dim}), such as that of "
            f"sample(..., save_trajectory=True), got {trajectories.shape}"
        )
    return trajectories[:, :_LINES]


def _matplotlib(*names: str) -> tuple:
    import importlib

    try:
        return tuple(importlib.import_module(f"matplotlib.{name}") for name in names)
    except ImportError as error:
        raise ImportError(
            f'figures need matplotlib: pip install "tiltjax[plot]" ({error})'
        ) from None


_FORMATS = ("png", "pdf", "svg")


def save(figure: Any, path: str | os.PathLike, dpi: int = 160) -> Path:
    """Write a figure as `.png`, `.pdf` or `.svg`. If this fails, an existing file is not changed.

    **Returns:** the path. **Raises:** as `target`.
    """
    path = target(path)
    folder = path.parent
    content = io.BytesIO()  # an error while drawing occurs here, before a file is written
    figure.savefig(content, format=path.suffix.lower().removeprefix("."), dpi=dpi)
    temporary = folder / f".{path.stem}-{uuid.uuid4().hex}.tmp"
    try:
        temporary.write_bytes(content.getbuffer())
        os.replace(temporary, path)
    except PermissionError as error:
        raise PermissionError(
            f"the folder {str(folder)!r} is not writable: {error.strerror}"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return path


def target(path: str | os.PathLike) -> Path:
    """The path, if `save` can write there. Long computations call this before they start.

    **Raises:** `ValueError` for a suffix other than `.png`, `.pdf` and `.svg`; `FileNotFoundError`,
    `NotADirectoryError`, `IsADirectoryError` or `PermissionError` for a path that cannot be
    written.
    """
    path = Path(path)
    if path.suffix.lower().removeprefix(".") not in _FORMATS:
        raise ValueError(f"cannot write {str(path)!r}: the name must end in .png, .pdf or .svg")
    folder = path.parent
    if not folder.exists():
        raise FileNotFoundError(f"the folder {str(folder)!r} does not exist: create it first")
    if not folder.is_dir():
        raise NotADirectoryError(f"{str(folder)!r} is not a folder")
    if path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a folder: give the name of a file")
    probe = folder / f".{uuid.uuid4().hex}.tmp"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise PermissionError(
            f"the folder {str(folder)!r} is not writable: {error.strerror}"
        ) from error
    return path
