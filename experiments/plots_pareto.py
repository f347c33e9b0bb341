"""Accuracy against bytes for many runs, as PNG bytes, in the style of `experiments.plots`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from experiments.plots import BLUE, GREY, INK, ORANGE, VERMILLION, dress, human_bytes, png
from experiments.plots_privacy import GREEN, PURPLE

if TYPE_CHECKING:  # half a second to import
    from matplotlib.axes import Axes

DENSE: Final = "float32"
"""The scheme that the others are compared with."""
SKY: Final = "#56B4E9"
_STYLES: Final = (
    *((BLUE, "o"), (VERMILLION, "D"), (GREEN, "^"), (ORANGE, "s"), (PURPLE, "v"), (SKY, "P")),
)
_DPI: Final = 180


def accuracy_over_uploads(runs: Sequence[tuple[str, float, float]]) -> bytes:
    """Draw test accuracy against the bytes of an upload; a line joins each scheme's best runs.

    Args:
        runs: (scheme, bytes up a client and round, accuracy in [0, 1]). The best run of the
            scheme `DENSE`, if there is one, is the level of reference.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415 - see the docstring of experiments.plots
    from matplotlib.ticker import (  # noqa: PLC0415 - as above
        FuncFormatter,
        NullFormatter,
        PercentFormatter,
    )

    figure = Figure(figsize=(7.2, 4.4), dpi=_DPI, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    dress(axes)
    schemes: dict[str, list[tuple[float, float]]] = {}
    for scheme, size, accuracy in runs:
        schemes.setdefault(scheme, []).append((size, accuracy))
    dense = schemes.pop(DENSE, [])
    for (scheme, points), (colour, marker) in zip(
        sorted(schemes.items()), _STYLES * (len(schemes) // len(_STYLES) + 1), strict=False
    ):
        sizes, accuracies = zip(*points, strict=True)
        axes.scatter(sizes, accuracies, color=colour, marker=marker, s=22, alpha=0.45)
        sizes, accuracies = zip(*best_for_their_size(points), strict=True)
        axes.plot(
            sizes, accuracies, color=colour, marker=marker, markersize=6,
            linewidth=1.8, label=scheme.replace("_", " "),
        )  # fmt: skip
    if dense:
        _reference(axes, *max(dense, key=lambda point: point[1]))
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: human_bytes(x)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.margins(x=0.06, y=0.1)
    axes.set_ylabel("test accuracy")
    axes.set_xlabel("bytes up, a client and round")
    if schemes:
        axes.legend(loc="lower right", framealpha=0.9, edgecolor="white", labelcolor=INK)
    return png(figure)


def best_for_their_size(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the Pareto front: those (bytes, accuracy) that no smaller one equals or beats."""
    front: list[tuple[float, float]] = []
    for size, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or accuracy > front[-1][1]:
            front.append((size, accuracy))
    return front


def _reference(axes: Axes, size: float, accuracy: float) -> None:
    axes.axhline(accuracy, color=GREY, linestyle=":", linewidth=2, zorder=1)
    axes.scatter([size], [accuracy], color=GREY, marker="*", s=90, zorder=3)
    axes.annotate(
        f"dense float32: {accuracy:.1%}, {human_bytes(size)}",
        (size, accuracy), xytext=(-6, 6), textcoords="offset points",
        ha="right", fontsize=9.5, color=GREY,
    )  # fmt: skip
