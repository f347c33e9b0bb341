"""Pictures of one training run, as PNG bytes.

Each function takes plain numbers and returns one finished picture; where they come from
and where they go is the caller's business. Colours are Okabe and Ito's, which stay apart
for colour-blind eyes [OI08], and no meaning hangs on colour alone: every line has its own
marker, every bar its own text. Figures are built as objects, so that no global state of
pyplot is touched and matplotlib is loaded only when something is drawn.

[OI08] https://jfly.uni-koeln.de/color/
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from io import BytesIO
from math import isfinite
from typing import TYPE_CHECKING, Final, TypeAlias

if TYPE_CHECKING:  # half a second to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points: TypeAlias = Sequence[tuple[float, float]]
"""(x, y), x ascending."""

BLUE: Final = "#0072B2"
ORANGE: Final = "#E69F00"
VERMILLION: Final = "#D55E00"
GREY: Final = "#6B7280"
INK: Final = "#1F2937"
RULE: Final = "#E5E7EB"
_INCHES: Final = (6.0, 3.7)
_DPI: Final = 180
_FEW: Final = 40
"""Up to so many points each gets a marker."""


def accuracy_over_rounds(test: Points, train: Points) -> bytes:
    """Draw accuracy, fractions in [0, 1], against the round; `train` may be empty.

    Args:
        test: Of the global model on the coordinator's test examples; round 0 is the start.
        train: Mean over the devices' own examples.
    """
    test, train = _finite(test), _finite(train)
    if all(x == 0 for x, _ in (*test, *train)):
        return _message("No round was tested", "The accuracy of a model appears after its round.")

    def draw(axes: Axes) -> None:
        if train:
            _line(axes, train, ORANGE, "s", "training data of the devices", dashed=True)
        _line(axes, test, BLUE, "o", "test data")
        _mark_last(axes, test, below=bool(train) and bool(test) and train[-1][1] > test[-1][1])
        _percent(axes, [y for _, y in (*test, *train)])
        _whole_rounds(axes)
        if train:
            axes.legend(loc="lower right", frameon=False, fontsize=10, labelcolor=INK)

    return _figure(draw)


def accuracy_over_bytes(points: Points, reference_bytes: float) -> bytes:
    """Draw test accuracy against the bytes that one client has sent so far.

    Args:
        points: (cumulative bytes, fraction in [0, 1]).
        reference_bytes: What the same rounds cost with plain float32 updates.
    """
    points = [(x, y) for x, y in _finite(points) if x > 0]
    if not points or reference_bytes <= 0:
        return _message("No bytes to compare", "No round that was tested sent an update.")
    spent, reached = points[-1]

    def draw(axes: Axes) -> None:
        axes.set_xscale("log")
        _line(axes, points, BLUE, "o", "this run, all that a client sends")
        axes.plot([spent, reference_bytes], [reached, reached], ":", color=GREY, linewidth=1.3)
        axes.plot(
            [reference_bytes], [reached], "D", markersize=8, color="white",
            markeredgecolor=VERMILLION, markeredgewidth=2, label="the same rounds in float32",
        )  # fmt: skip
        axes.annotate(
            compared(reference_bytes / spent, "fewer bytes", "more bytes"),
            ((spent * reference_bytes) ** 0.5, reached),
            xytext=(0, 7), textcoords="offset points", ha="center", fontsize=10.5, color=INK,
        )  # fmt: skip
        axes.xaxis.set_major_formatter(lambda value, _: human_bytes(value))
        axes.xaxis.set_minor_formatter(lambda _value, _: "")
        low, high = min(points[0][0], reference_bytes), max(spent, reference_bytes)
        axes.set_xlim(low / 1.6, high * 1.6)
        axes.set_xticks(_decades(low / 1.6, high * 1.6))
        _percent(axes, [y for _, y in points])
        axes.set_xlabel("sent so far by one client that takes part in every round (log scale)")
        axes.legend(loc="lower right", frameon=False, fontsize=10, labelcolor=INK)

    return _figure(draw)


def epsilon_over_rounds(points: Points, *, delta: float | None, budget: float | None) -> bytes:
    """Draw what was spent of the privacy budget; an infinite epsilon is said in words.

    Args:
        points: (round, epsilon so far); infinite without noise.
        delta: That goes with epsilon; None if there is none.
        budget: Nothing is released beyond it; None for no limit.
    """
    if any(not isfinite(y) for _, y in points):
        return _message(
            "No differential privacy: epsilon is infinite",
            "No noise bounds what the released models\nreveal about single devices or examples.",
        )
    if not points:
        return _message("Nothing was released", "No round was finished, so no privacy was spent.")

    def draw(axes: Axes) -> None:
        _line(axes, points, BLUE, "o", "spent")
        last, spent = points[-1]
        axes.annotate(
            f"ε = {spent:.3g}", (last, spent), xytext=(-6, 8), textcoords="offset points",
            ha="right", fontsize=10.5, color=INK,
        )  # fmt: skip
        if budget is not None:
            axes.axhline(budget, color=VERMILLION, linestyle="--", linewidth=1.6)
            axes.annotate(
                f"budget: ε = {budget:g}", (0, budget), xytext=(6, 6), color=VERMILLION,
                xycoords=("axes fraction", "data"), textcoords="offset points", fontsize=10.5,
            )  # fmt: skip
        axes.set_ylim(0, 1.18 * max(spent, budget or 0.0) or 1.0)
        axes.set_ylabel("ε" if delta is None else f"ε at δ = {delta:g}".replace("e-0", "e-"))
        _whole_rounds(axes)

    return _figure(draw)


def clip_over_rounds(points: Sequence[tuple[int, float, float | None]]) -> bytes:
    """Draw the clip, on a log scale, and the fraction of updates that fitted it.

    Args:
        points: (round, norm, fraction); the fraction is None where it was not told, and an
            estimate under noise.
    """
    if not points:
        return _message("No clip", "No round was finished with a bound on the updates.")
    fitted = _finite([(number, part) for number, _, part in points if part is not None])

    def draw(axes: Axes) -> None:
        axes.set_yscale("log")
        _line(axes, [(number, norm) for number, norm, _ in points], BLUE, "o", "clip")
        for formatted in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            formatted(lambda value, _: f"{value:g}")
        axes.tick_params(axis="y", which="minor", labelsize=8, labelcolor=GREY, color=GREY)
        axes.set_ylabel("bound on the norm (log scale)")
        _whole_rounds(axes)
        if fitted:
            _line_on_the_right(axes, fitted, "updates that fitted")
            axes.figure.legend(
                loc="outside upper right", ncols=2, frameon=False, fontsize=10, labelcolor=INK
            )

    return _figure(draw)


def bytes_of_one_round(payload: float, total: float, reference: float) -> bytes:
    """Draw what one client sends in one round, beside a plain float32 update.

    Args:
        payload: Bytes of the encoded update alone.
        total: Bytes of all that is sent: the update, keys, shares, metrics, names.
        reference: Bytes of the same update in float32.
    """
    if min(payload, total, reference) <= 0:
        return _message("Nothing was sent", "No round was finished.")
    overhead = max(0.0, total - payload)

    def draw(axes: Axes) -> None:
        words = [compared(reference / value, "less", "more") for value in (total, payload)]
        rows = (
            ("update in float32", reference, GREY, ""),
            ("all that is sent", total, BLUE, f"  ({words[0]})"),
            ("the update", payload, BLUE, f"  ({words[1]})"),
            ("protocol", overhead, ORANGE, "  (keys, shares, metrics, names)"),
        )
        for place, (_, value, colour, note) in enumerate(rows):
            axes.barh(place, value, height=0.58, color=colour)
            axes.annotate(
                human_bytes(value) + note, (value, place), xytext=(6, 0), va="center",
                textcoords="offset points", fontsize=10.5, color=INK,
            )  # fmt: skip
        axes.barh(1, overhead, left=payload, height=0.58, color=ORANGE)  # both parts, end to end
        axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.42 * max(reference, total))
        axes.xaxis.set_major_formatter(lambda value, _: human_bytes(value))
        axes.locator_params(axis="x", nbins=5)
        axes.grid(visible=False)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set_xlabel("sent by one client in one round")

    return _figure(draw)


def seconds_over_dim(limit: Points, ours: Points, flower: Points, neighbours: int) -> bytes:
    """Draw the seconds of masking one vector against its length, both on a log scale.

    Args:
        limit: (length, seconds) of generating and adding the key streams in the cache.
        ours: Of `fedcore`.
        flower: Of the mask generator of Flower's SecAgg+.
        neighbours: How many masks are added.
    """
    if not (limit and ours and flower):
        return _message("No masks were measured", "Run the suite of secure aggregation.")

    def draw(axes: Axes) -> None:
        axes.set_xscale("log")
        axes.set_yscale("log")
        _line(axes, flower, VERMILLION, "D", "Flower's SecAgg+")
        _line(axes, ours, BLUE, "o", "fedcore")
        _line(axes, limit, GREY, "s", "limit: key stream and addition alone", dashed=True)
        (dim, seconds), (_, theirs) = ours[-1], flower[-1]
        axes.annotate(
            compared(theirs / seconds, "faster", "slower"), (dim, seconds**0.7 * theirs**0.3),
            xytext=(-6, 0), textcoords="offset points", ha="right", fontsize=10.5, color=INK,
        )  # fmt: skip
        axes.set_xlabel("elements of the vector, 16 bits each")
        axes.set_ylabel(f"seconds for {neighbours} masks, one core")
        axes.legend(loc="upper left", frameon=False, fontsize=10, labelcolor=INK)

    return _figure(draw)


def human_bytes(count: float) -> str:
    """Return a size with three digits and a decimal unit.

    Example:
        >>> human_bytes(12_345), human_bytes(999_999), human_bytes(70)
        ('12.3 kB', '1 MB', '70 B')
    """
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= 0.9995 * factor:
            return f"{_three_digits(count / factor)} {unit}"
    return f"{_three_digits(count)} B"


def compared(ratio: float, less: str, more: str) -> str:
    """Return in words how many times `less` something is, or `more` if `ratio` is below 1.

    Example:
        >>> compared(25.13, "smaller", "larger"), compared(0.5, "less", "more")
        ('25.1× smaller', '2× more')
        >>> compared(0.96, "less", "more"), compared(1.001, "less", "more")
        ('4% more', 'the same')
    """
    word, change = (less, 1 - 1 / ratio) if ratio >= 1 else (more, 1 / ratio - 1)
    if change < 0.005:
        return "the same"
    if 0.8 < ratio < 1.25:
        return f"{change:.0%} {word}"
    return f"{_three_digits(max(ratio, 1 / ratio))}× {word}"


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _finite(points: Points) -> Points:
    return [(x, y) for x, y in points if isfinite(x) and isfinite(y)]


def _decades(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times powers of ten in [low, high]; whole powers if they are many."""
    steps = (1, 2, 5) if high / low < 300 else (1,)
    ticks = [step * 10.0**power for power in range(13) for step in steps]
    return [tick for tick in ticks if low <= tick <= high]


def _line(
    axes: Axes, points: Points, colour: str, marker: str, label: str, *, dashed: bool = False
) -> None:
    axes.plot(
        [x for x, _ in points],
        [y for _, y in points],
        color=colour,
        linestyle="--" if dashed else "-",
        linewidth=2,
        marker=marker if len(points) <= _FEW else "",
        markersize=4.5,
        label=label,
    )


def _line_on_the_right(axes: Axes, points: Points, label: str) -> None:
    """Draw fractions against an axis of their own; [0, 1] is always in sight."""
    other = axes.twinx()
    _line(other, points, ORANGE, "s", label, dashed=True)
    _percent(other, [y for _, y in points])
    other.set_ylim(min(0.0, *(y for _, y in points)), max(1.0, *(y for _, y in points)))
    other.set_ylabel(label, fontsize=10.5, color=INK)
    other.tick_params(labelsize=10, labelcolor=GREY, color=GREY)
    for side in other.spines.values():
        side.set_visible(False)


def _mark_last(axes: Axes, points: Points, *, below: bool) -> None:
    if points:
        axes.annotate(
            f"{points[-1][1]:.1%}", points[-1], xytext=(0, -17 if below else 8),
            textcoords="offset points", ha="right", fontsize=10.5, fontweight="bold", color=BLUE,
        )  # fmt: skip


def _percent(axes: Axes, values: Sequence[float]) -> None:
    from matplotlib.ticker import PercentFormatter  # noqa: PLC0415 - see the module's docstring

    low, high = min(values), max(values)
    room = max(0.12 * (high - low), 0.01)
    axes.set_ylim(max(0.0, low - room), min(1.04, high + 1.5 * room))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylabel("accuracy")


def _whole_rounds(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415 - see the module's docstring

    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.set_xlabel("round")


def _message(title: str, detail: str) -> bytes:
    def draw(axes: Axes) -> None:
        axes.set_axis_off()
        axes.set(xlim=(0, 1), ylim=(0, 1))
        axes.text(0.5, 0.56, title, ha="center", fontsize=14, fontweight="bold", color=INK)
        axes.text(
            0.5, 0.46, detail, ha="center", va="top", fontsize=11, color=GREY, linespacing=1.5
        )

    return _figure(draw)


def _figure(draw: Callable[[Axes], None]) -> bytes:
    """Return the PNG of one pair of axes in the house style."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - see the module's docstring

    figure = Figure(figsize=_INCHES, dpi=_DPI, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    dress(axes)
    draw(axes)
    return png(figure)


def dress(axes: Axes) -> None:
    """Give axes the house style."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GREY)
    axes.grid(color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=10, labelcolor=GREY, color=GREY)
    axes.xaxis.label.set(fontsize=10.5, color=INK)
    axes.yaxis.label.set(fontsize=10.5, color=INK)


def png(figure: Figure) -> bytes:
    """Return the figure as a file; equal numbers give equal files."""
    file = BytesIO()
    # Not with the library's version in it.
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()
