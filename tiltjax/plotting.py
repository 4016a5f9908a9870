r"""Figures: samples and trajectories over the law they should follow.

| call | draws |
|---|---|
| `density_contours` | a density: on the line its curve, in the plane its highest-density regions |
| `panel` | one method: density, samples (dots or a histogram) and a few trajectories |
| `comparison` | a grid of panels over one density with one legend |
| `audit` | the weights of an audit: their law, and how few particles carry them |
| `frontier` | reward against diversity: every method a mark, the exact tilts the curve |
| `save` | the file: all of it or nothing |

A contour is labeled by mass: level 0.9 encloses the smallest region of the plotted window that
holds 90% of the mass in it. Log-densities need no normalization: it is taken from a grid on the
window, which should therefore hold nearly all of the law.

Matplotlib is imported when a figure is made, and its global state (`pyplot`, `rcParams`) is neither
read for decisions nor changed. Colors are those of Okabe and Ito, which readers with any color
vision can tell apart.
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
from tiltjax.particles import Particles
from tiltjax.rewards import objectives
from tiltjax.weighted import Audit

BLUE, VERMILION, GREEN = "#0072B2", "#D55E00", "#007A5E"
_CYCLE = (BLUE, VERMILION, GREEN, "#E69F00", "#CC79A7", "#56B4E9", "#8A7A00")
_INK, _MUTED, _RULE = "#222222", "#6B6B6B", "#BDBDBD"
_LAND = ("#F7F5F0", "#ECE7DB", "#DDD5C2", "#C9BDA2")  # filled regions, from the outermost inwards
_CONTOUR = "#6E6551"
LEVELS = (0.3, 0.6, 0.9, 0.99)
_GRID = {1: 1024, 2: 192}
_DOTS, _LINES = 4000, 24


class Panel(NamedTuple):
    """What `comparison` shows of one method.

    `x`: `(n, d)` or `Particles`. `trajectory`: `(steps + 1, n, d)` or `None`. `note`: a short line
    under the title, such as a distance. `highlight`: set the title in another color, for the
    methods that are exact.
    """

    title: str
    x: Any
    trajectory: Any = None
    note: str = ""
    highlight: bool = False


class Mark(NamedTuple):
    """What `frontier` shows of one run of a method: two numbers and their standard errors. Marks of
    one title are a sweep.
    """

    title: str
    reward: float
    diversity: float
    reward_error: float = 0.0
    diversity_error: float = 0.0


class _Field(NamedTuple):
    """A normalized density on the grid of a window: `axes` holds one array of coordinates per
    dimension.
    """

    axes: list[np.ndarray]
    density: np.ndarray


def contour_bounds(samples: ArrayLike | Particles, margin: float = 0.15) -> np.ndarray:
    """A window around the samples, `(d, 2)`: their range, widened on either side by `margin` of
    it.
    """
    x, _ = _samples(samples)
    low, high = x.min(axis=0), x.max(axis=0)
    spread = np.where(high > low, high - low, 1.0)
    return np.stack([low - margin * spread, high + margin * spread], axis=1)


def density_contours(
    ax: Any, log_density: Callable, bounds: ArrayLike, levels: Sequence[float] = LEVELS
) -> None:
    """Draw a density: its curve on the line, its highest-density regions in the plane.

    **Arguments:**

    - `ax`: matplotlib axes.
    - `log_density`: `x -> scalar` of one point of shape `(d,)`, d = 1 or 2, up to a constant; it is
      vmapped.
    - `bounds`: `(d, 2)`, the window; `(low, high)` will do on the line.
    - `levels`: the masses that the contours enclose, between 0 and 1.

    **Raises:** `ValueError` for bounds that are no window, levels outside (0, 1), a density that is
    NaN, infinite or zero all over the window.
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
    """Draw one method: the density it should follow, its samples and a few of its trajectories.

    In the plane samples are dots over the contours. On the line they are a histogram under the
    density's curve, and trajectories run down into it from a strip above, time going downwards.
    Trajectories fade in from their start. At most 4000 dots and 24 trajectories are drawn; weights
    scale the area of dots and the height of bars. Samples outside of the window are not drawn.

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
    """A grid of panels over one density, as a `matplotlib.figure.Figure` ten inches wide (1600
    pixels as `save` writes it).

    **Arguments:** `panels`: what to show, in reading order; `columns`: four by default, or fewer
    where that leaves no gaps or there are few panels; the others as in `panel`.

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
        # Ticks where no neighbor below or to the left has them.
        ax.tick_params(
            labelbottom=index + columns >= len(panels),
            labelleft=len(bounds) == 2 and index % columns == 0,
        )
    if suptitle:
        figure.suptitle(suptitle, x=0.012, ha="left", fontsize=14, fontweight="bold", color=_INK)
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
    """A figure ten inches wide, and `num` axes of the window's aspect in reading order."""
    (figure_class,) = _matplotlib("figure")
    rows, planar = -(-num // columns), len(bounds) == 2
    aspect = float(np.clip(np.ptp(bounds[1]) / np.ptp(bounds[0]), 0.5, 2.0)) if planar else 0.8
    width = 10.0
    height = rows * (width / columns * aspect * 0.94 + 0.42) + 0.35 + 0.4 * titled
    figure = figure_class.Figure(figsize=(width, height), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.05, h_pad=0.05, hspace=0.03, wspace=0.02)
    axes = list(figure.subplots(rows, columns, sharex=True, sharey=planar, squeeze=False).flat)
    for ax in axes[num:]:
        ax.remove()
    return figure, axes[:num]


def _legend(dim: int, color: str, *, density: bool, trajectories: bool) -> list:
    """What the density, the samples and the trajectories look like, on the line or in the plane."""
    lines, patches = _matplotlib("lines", "patches")
    line = lambda label, **style: lines.Line2D([], [], label=label, **style)
    handles = []
    if density and dim == 2:
        truth = "the tilt: regions of " + _percent(LEVELS) + " mass"
        region = {"facecolor": _LAND[2], "edgecolor": _CONTOUR, "linewidth": 0.8}
        handles.append(patches.Patch(label=truth, **region))
    elif density:
        handles.append(line("the tilt", color=_INK, linewidth=1.4))
    if dim == 2:
        handles.append(line("samples", color=color, marker="o", markersize=4, linestyle=""))
    else:
        handles.append(patches.Patch(facecolor=color, alpha=0.5, label="samples"))
    if trajectories:
        handles.append(line("trajectories, fading in", color=VERMILION, linewidth=1.2))
    return handles


def audit(report: Audit) -> Any:
    """Two panels of an `Audit`: the log-weights around `log Z`, and the fraction of all weight that
    the heaviest particles carry.

    If all weights were equal, the first would be a line at 0 and the second the diagonal. The
    second axis is logarithmic: a curve that is high on the left says that few particles carry the
    estimate of `log Z`. Eight inches wide.
    """
    (figure_class,) = _matplotlib("figure")
    log_weights = np.asarray(report.particles.log_weights, np.float64)
    relative = np.sort(log_weights - report.log_norm.value)[::-1]
    n = len(relative)
    figure = figure_class.Figure(figsize=(8.0, 3.4), layout="constrained", facecolor="white")
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
    right.set_ylim(0, 1.04)
    right.set_xlabel("heaviest particles, as a fraction of all", color=_MUTED, fontsize=9)
    right.set_title(
        f"fraction of the weight (Pareto k = {report.pareto_k:.2f})",
        loc="left",
        fontsize=10,
        color=_INK,
    )
    for ax in (left, right):
        _plain(ax)
    left.spines["left"].set_visible(False)
    title = report.verdict.split(":")[0] + f" · {report.sampler}"
    figure.suptitle(title, x=0.012, ha="left", fontsize=11, fontweight="bold", color=_INK)
    return figure


def frontier(
    marks: Sequence[Mark],
    curve: ArrayLike | None = None,
    *,
    reward: str = "mean reward",
    diversity: str = "diversity",
    suptitle: str = "",
) -> Any:
    """Reward against diversity: each method a mark with bars of one standard error, the sweep of
    one method a thin line.

    Filled are the marks that no other dominates (`objectives.front`). A mark above the curve of
    exact tilts is no better sampler, only another one: at its mean reward the tilt is the law
    nearest to the base (in divergence), and what is more diverse than that is further from the
    base.

    **Arguments:** `marks`, any number of `Mark(title, reward, diversity, ...)`; `curve`, `(m, 2)`,
    the same two numbers of the exact tilts by rising scale, a star at the first; `reward`,
    `diversity`, the names of the axes.

    **Raises:** `ImportError` without matplotlib; `ValueError` without marks, for numbers that are
    not finite, and another shape of `curve`.
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
    figure = _matplotlib("figure")[0].Figure(
        figsize=(8.0, 4.6), layout="constrained", facecolor="white"
    )
    ax, best = figure.subplots(), objectives.front(values[:, :2])
    if len(line):
        ax.plot(*line.T, color=_INK, linewidth=1.6, zorder=1, label="exact tilts")
        ax.plot(
            *line[0], color=_INK, marker="*", markersize=11, linestyle="", zorder=4, label="base"
        )
    for i, title in enumerate(dict.fromkeys(entry.title for entry in marks)):
        rows = np.array([entry.title == title for entry in marks])
        x, y, x_error, y_error = values[rows].T
        color, marker = _CYCLE[i % len(_CYCLE)], "osD^vPX"[i // len(_CYCLE) % 7]
        ax.errorbar(x, y, y_error, x_error, color=color, linewidth=0.8, elinewidth=1.0, zorder=2)
        face = [color if filled else "white" for filled in best[rows]]
        ax.scatter(
            x, y, s=34, marker=marker, facecolors=face, edgecolors=color, linewidths=1.3, zorder=3
        )
        ax.plot([], [], color=color, marker=marker, markersize=5.5, linestyle="", label=title)
    ax.set_xlabel(reward, color=_MUTED, fontsize=9)
    ax.set_ylabel(diversity, color=_MUTED, fontsize=9)
    _plain(ax)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8, labelcolor=_INK)
    if suptitle:
        figure.suptitle(suptitle, x=0.012, ha="left", fontsize=11, fontweight="bold", color=_INK)
    return figure


def _plain(ax: Any) -> None:
    """Axes with two quiet sides."""
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
        shown, area = x[:_DOTS], weights[:_DOTS] * len(x)
        # Fewer dots may be larger and more opaque; from about a thousand on, darkness stands for
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
    edges = [
        low for low in thresholds if low > field.density.min()
    ]  # the others hold the whole window
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
    """Thin lines that fade in from their starting points."""
    (collections,) = _matplotlib("collections")
    steps, num = len(trajectories) - 1, trajectories.shape[1]
    # (steps, num, 2, 2), later steps drawn over earlier ones
    segments = np.stack([trajectories[:-1], trajectories[1:]], axis=2)
    shades = np.zeros((steps, num, 4))
    shades[..., :3] = [int(VERMILION[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    shades[..., 3] = (0.06 + 0.59 * np.linspace(0, 1, steps) ** 1.5)[:, None]
    segments, shades = segments.reshape(-1, 2, 2), shades.reshape(-1, 4)
    # Butt ends: overlapping round ones would show as beads where lines are translucent. Below the
    # dots, which matter more.
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
    # Fractions of all samples, also of those outside.
    heights = np.histogram(x, edges, weights=weights)[0] / np.diff(edges)
    ax.stairs(heights, edges, fill=True, color=color, alpha=0.5, linewidth=0, zorder=2)
    peak = max([heights.max(), *(line.get_ydata().max() for line in ax.lines)])
    peak = peak if peak > 0 else 1.0
    ax.set_ylim(0, 1.08 * peak if trajectories is None else 1.75 * peak)
    if trajectories is not None:
        # The strip shares the axes, so that trajectories end above the bars they belong to.
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
    """At most four columns, three where that fills the rows and four does not."""
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
        # Half-way down to the next value: where the density is flat, a contour at its height would
        # have no inside.
        found.add(float(value + np.max(ordered, where=ordered < value, initial=0.0)) / 2)
    return sorted(found)  # levels that meet in one flat region share a contour


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
        raise ImportError(f"figures need matplotlib: pip install tiltjax[plot] ({error})") from None


_FORMATS = ("png", "pdf", "svg")


def save(figure: Any, path: str | os.PathLike, dpi: int = 160) -> Path:
    """Write a figure as `.png`, `.pdf` or `.svg`: either the whole file appears, or nothing
    changes.

    **Returns:** the path. **Raises:** as `target`.
    """
    path = target(path)
    folder = path.parent
    content = io.BytesIO()  # what cannot be drawn fails here, before any file exists
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
    """The path, if `save` could write there now: for a long computation to call before it starts.

    **Raises:** `ValueError` for a suffix other than `.png`, `.pdf` and `.svg`; `FileNotFoundError`,
    `NotADirectoryError`, `IsADirectoryError` or `PermissionError` for a place that cannot be
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
