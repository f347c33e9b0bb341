"""The picture of the codec benchmark: what each stage costs, beside copying its bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from experiments.plots import BLUE, GREY, INK, ORANGE, VERMILLION, dress, png

_DPI: Final = 160
_COLOURS: Final = {"encode": BLUE, "decode": ORANGE}
"""By the first word of an operation; all others are derived from a public seed."""


@dataclass(frozen=True, slots=True)
class Bar:
    """One operation of one stage.

    Attributes:
        group: Bars of one group stand together.
        name: Of the stage.
        operation: What it does.
        nanoseconds: For a coordinate.
        copy: Nanoseconds for copying its bytes, in and out.
    """

    group: str
    name: str
    operation: str
    nanoseconds: float
    copy: float


def nanoseconds_by_stage(bars: Sequence[Bar], dim: int) -> bytes:
    """Draw one bar for each operation on a log scale; a line marks copying as many bytes.

    Args:
        bars: In the order from top to bottom.
        dim: Coordinates of the vectors that were measured.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415 - see the docstring of experiments.plots
    from matplotlib.patches import Patch  # noqa: PLC0415 - as above

    places = _places(bars)
    figure = Figure(
        figsize=(7.6, 1.3 + 0.185 * places[-1]), dpi=_DPI, layout="constrained", facecolor="white"
    )
    axes = figure.add_subplot()
    dress(axes)
    axes.set_xscale("log")
    least = min(min(bar.copy, bar.nanoseconds) for bar in bars) / 2
    for bar, place in zip(bars, places, strict=True):
        axes.barh(place, bar.nanoseconds, height=0.74, color=_colour(bar))
        axes.plot([bar.copy] * 2, [place - 0.46, place + 0.46], color=INK, linewidth=1.8)
        axes.annotate(
            f"{bar.nanoseconds:.3g}", (max(bar.nanoseconds, bar.copy), place), xytext=(4, 0),
            va="center", textcoords="offset points", fontsize=8, color=INK,
        )  # fmt: skip
    axes.set_yticks(places, [f"{bar.name}: {bar.operation}" for bar in bars], fontsize=8)
    axes.set_ylim(places[-1] + 0.8, places[0] - 1.4)
    axes.set_xlim(least, 2.2 * max(bar.nanoseconds for bar in bars))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", labelcolor=INK, length=0, labelsize=8)
    axes.set_xlabel(f"nanoseconds for a coordinate, one core, {dim:,} coordinates (log scale)")
    axes.legend(
        handles=[
            Patch(color=BLUE, label="encode"),
            Patch(color=ORANGE, label="decode"),
            Patch(color=VERMILLION, label="derive from the public seed"),
            Patch(color=INK, label="line: memcpy of the bytes in and out"),
        ],
        loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=2, frameon=False, fontsize=8.5,
        labelcolor=INK,
    )  # fmt: skip
    for group, top in _tops(bars, places):
        axes.annotate(
            group, (1.0, top - 0.98), xycoords=("axes fraction", "data"), ha="right", va="center",
            fontsize=8.5, color=GREY, fontweight="bold",
        )  # fmt: skip
    return png(figure)


def _colour(bar: Bar) -> str:
    return _COLOURS.get(bar.operation.split(" ")[0], VERMILLION)


def _places(bars: Sequence[Bar]) -> list[float]:
    """Return a height for each bar, with a gap between groups."""
    places, place = [], 0.0
    for index, bar in enumerate(bars):
        place += 1.0 if index == 0 or bar.group == bars[index - 1].group else 2.0
        places.append(place)
    return places


def _tops(bars: Sequence[Bar], places: Sequence[float]) -> list[tuple[str, float]]:
    """Return where each group begins."""
    return [
        (bar.group, place)
        for index, (bar, place) in enumerate(zip(bars, places, strict=True))
        if index == 0 or bar.group != bars[index - 1].group
    ]
