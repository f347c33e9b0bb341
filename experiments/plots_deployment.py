"""The picture of the deployment's benchmark: stock Flower beside the edge runner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from experiments.plots import BLUE, GREY, INK, VERMILLION, dress, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROUND_SECONDS: Final = 3.0
PEAK_MB: Final = 420.0
IDLE_MB: Final = 200.0
"""What the edge runner is to stay below."""
_PANELS: Final = (
    ("a secure round, nobody trains", "seconds", "round_seconds", ROUND_SECONDS),
    ("a board that trains", "MB at most", "peak_mb", PEAK_MB),
    ("a board that waits", "MB", "idle_mb", IDLE_MB),
)
_COLOURS: Final = {"stock": VERMILLION, "edge": BLUE}


def beside_stock(rows: Sequence[Mapping[str, object]]) -> bytes:
    """Draw seconds of a round and memory of a board, with the bars to stay below."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - an import of a second

    figure = Figure(figsize=(9.6, 3.6), dpi=150, layout="constrained", facecolor="white")
    for place, (title, unit, key, bar) in enumerate(_PANELS, 1):
        axes = figure.add_subplot(1, len(_PANELS), place)
        dress(axes)
        _panel(axes, [(_name(row), float(str(row[key]))) for row in rows], bar)
        axes.set_title(title, fontsize=10.5, color=INK, loc="left")
        axes.set_ylabel(unit)
    return png(figure)


def _name(row: Mapping[str, object]) -> str:
    return f"{row['arm']}" if row["database"] == "yes" else f"{row['arm']},\nno database"


def _panel(axes: Axes, bars: Sequence[tuple[str, float]], limit: float) -> None:
    for place, (arm, value) in enumerate(bars):
        axes.bar(place, value, 0.55, color=_COLOURS[arm.partition(",")[0]])
        axes.annotate(
            f"{value:.3g}", (place, value), xytext=(0, 3), textcoords="offset points",
            ha="center", fontsize=10, color=INK,
        )  # fmt: skip
    axes.axhline(limit, color=GREY, linewidth=1, linestyle="--")
    axes.annotate(
        f"at most {limit:g}", (len(bars) - 0.5, limit), xytext=(0, 3), ha="right",
        textcoords="offset points", fontsize=9, color=GREY,
    )  # fmt: skip
    axes.set_xticks(range(len(bars)), [arm for arm, _ in bars])
    axes.grid(visible=False, axis="x")
