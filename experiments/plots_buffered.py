"""Accuracy against a fleet's time, as PNG bytes, in the style of `experiments.plots`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from experiments.plots import BLUE, INK, ORANGE, VERMILLION, dress, png
from experiments.plots_privacy import GREEN, PURPLE

_STYLES: Final = (
    *((VERMILLION, "D", "--"), (VERMILLION, "D", ":"), (ORANGE, "s", "--"), (ORANGE, "s", ":")),
    *((BLUE, "o", "-"), (GREEN, "^", "-"), (PURPLE, "v", "-")),
)
_DPI: Final = 180


def accuracy_over_time(courses: Mapping[str, Sequence[tuple[float, float]]]) -> bytes:
    """Draw when each schedule reached which test accuracy.

    Args:
        courses: (seconds, accuracy in [0, 1]) by the name of the schedule, at most seven.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415 - see the docstring of experiments.plots
    from matplotlib.ticker import PercentFormatter  # noqa: PLC0415 - as above

    figure = Figure(figsize=(7.2, 4.0), dpi=_DPI, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    dress(axes)
    for (name, points), (colour, marker, dash) in zip(courses.items(), _STYLES, strict=False):
        if not points:
            continue
        seconds, accuracies = zip(*points, strict=True)
        axes.plot(
            [value / 60 for value in seconds], accuracies, color=colour, marker=marker,
            linestyle=dash, markersize=6, linewidth=1.8, label=name,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylabel("test accuracy reached")
    axes.set_xlabel("minutes of the fleet")
    if any(courses.values()):
        axes.legend(loc="lower right", framealpha=0.9, edgecolor="white", labelcolor=INK)
    return png(figure)
