"""Pictures of what privacy costs, as PNG bytes, in the style of `experiments.plots`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Final

from experiments.plots import BLUE, GREY, INK, ORANGE, VERMILLION, dress, png

if TYPE_CHECKING:  # half a second to import
    from matplotlib.axes import Axes

GREEN: Final = "#009E73"
PURPLE: Final = "#CC79A7"
_STYLES: Final = ((VERMILLION, "D"), (ORANGE, "s"), (GREEN, "^"), (BLUE, "o"), (PURPLE, "v"))
"""Colour and marker of each width, narrow ones first."""
_DPI: Final = 180
_TOLERANCE: Final = 0.05


@dataclass(frozen=True, slots=True)
class Band:
    """A point with its 95 % confidence interval.

    Attributes:
        x: Where.
        y: Mean.
        halfwidth: Of the interval.
    """

    x: float
    y: float
    halfwidth: float


@dataclass(frozen=True, slots=True)
class Panel:
    """What one mechanism did.

    Attributes:
        title: Its name.
        errors: Mean squared error against epsilon, by bits.
        ratios: The same over the central Gaussian's, by bits.
        central: The central Gaussian's error.
    """

    title: str
    errors: Mapping[int, Sequence[Band]]
    ratios: Mapping[int, Sequence[Band]]
    central: Sequence[Band]


def errors_over_epsilon(panels: Sequence[Panel]) -> bytes:
    """Draw one column for each panel: the error above, what it costs over central noise below."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - see the docstring of experiments.plots

    figure = Figure(
        figsize=(4.9 * len(panels), 6.2), dpi=_DPI, layout="constrained", facecolor="white"
    )
    grid = figure.subplots(
        2, len(panels), sharex=True, sharey="row", squeeze=False, height_ratios=(3, 2)
    )
    for column, panel in enumerate(panels):
        above, below = grid[0][column], grid[1][column]
        _errors(above, panel)
        _ratios(below, panel)
        if column == 0:
            above.set_ylabel("mean squared error of a coordinate")
            below.set_ylabel("over the central")
        below.set_xlabel("ε of one mean")
    return png(figure)


def _errors(axes: Axes, panel: Panel) -> None:
    dress(axes)
    axes.set_yscale("log")
    axes.set_title(panel.title, fontsize=11.5, color=INK)
    for (bits, points), (colour, marker) in zip(panel.errors.items(), _STYLES, strict=False):
        _draw(axes, points, colour, marker, f"{bits} bits")
    axes.plot(
        [point.x for point in panel.central], [point.y for point in panel.central],
        ":", color=GREY, linewidth=2.4, label="central Gaussian", zorder=4,
    )  # fmt: skip
    axes.legend(loc="upper right", frameon=False, fontsize=10, labelcolor=INK)


def _ratios(axes: Axes, panel: Panel) -> None:
    dress(axes)
    axes.axhspan(1 - _TOLERANCE, 1 + _TOLERANCE, color=GREY, alpha=0.13, linewidth=0)
    axes.axhline(1, color=GREY, linestyle=":", linewidth=2)
    for (_, points), (colour, marker) in zip(panel.ratios.items(), _STYLES, strict=False):
        _draw(axes, points, colour, marker, "")
    axes.annotate(
        "within 5 %", (0, 1 - _TOLERANCE), xycoords=("axes fraction", "data"), xytext=(4, 3),
        textcoords="offset points", ha="left", fontsize=9.5, color=GREY,
    )  # fmt: skip


def _draw(axes: Axes, points: Sequence[Band], colour: str, marker: str, label: str) -> None:
    x = [point.x for point in points]
    axes.plot(
        x, [point.y for point in points], color=colour, marker=marker, markersize=5,
        linewidth=1.8, label=label,
    )  # fmt: skip
    axes.fill_between(
        x,
        [point.y - point.halfwidth for point in points],
        [point.y + point.halfwidth for point in points],
        color=colour,
        alpha=0.2,
        linewidth=0,
    )


def accuracy_over_epsilon(runs: Sequence[tuple[str, float, float, float]]) -> bytes:
    """Draw test accuracy against epsilon, one line for each mechanism and width.

    Args:
        runs: (mechanism, bits a parameter, epsilon, accuracy in [0, 1]); runs without noise,
            whose epsilon is infinite, are a level that the others are compared with.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415 - see the docstring of experiments.plots
    from matplotlib.ticker import PercentFormatter  # noqa: PLC0415 - as above

    figure = Figure(figsize=(6.4, 3.9), dpi=_DPI, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    dress(axes)
    lines: dict[tuple[str, float], list[tuple[float, float]]] = {}
    for mechanism, bits, epsilon, accuracy in runs:
        if epsilon == inf:
            axes.axhline(accuracy, color=GREY, linestyle=":", linewidth=2, zorder=1)
            axes.annotate(
                f"no noise, {bits:.3g} bits a parameter: {accuracy:.1%}",
                (0, accuracy), xycoords=("axes fraction", "data"), xytext=(6, 4),
                textcoords="offset points", fontsize=9.5, color=GREY,
            )  # fmt: skip
        else:
            lines.setdefault((mechanism, bits), []).append((epsilon, accuracy))
    for index, ((mechanism, bits), points) in enumerate(sorted(lines.items())):
        colour, marker = _STYLES[::-1][index % len(_STYLES)]
        points.sort()
        name = (
            "DP-SGD, protects an example"
            if mechanism == "gaussian"
            else mechanism.replace("_", " ")
        )
        axes.plot(
            [x for x, _ in points], [y for _, y in points], color=colour, marker=marker,
            markersize=6, linewidth=1.8, label=f"{name}, {bits:.3g} bits a parameter",
        )  # fmt: skip
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.margins(y=0.12)
    axes.set_xlim(left=0)
    axes.set_ylabel("test accuracy")
    axes.set_xlabel("ε spent")
    if lines:
        axes.legend(loc="best", framealpha=0.9, edgecolor="white", fontsize=9.5, labelcolor=INK)
    return png(figure)
