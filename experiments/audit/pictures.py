"""Pictures of an audit, as PNG bytes, in the style of `experiments.plots`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from io import BytesIO
from math import isfinite
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.audit.canary import CanaryAudit, Observation
from experiments.audit.inversion import InversionAudit, View
from experiments.audit.membership import FALSE_ALARMS, MembershipAudit
from experiments.audit.reconstruct import Images, Recovered
from experiments.plots import BLUE, GREY, INK, ORANGE, RULE, VERMILLION

if TYPE_CHECKING:  # half a second to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 160


def draw_canaries(audit: CanaryAudit) -> bytes:
    """Draw every observer's statistics beside those of random directions, and the epsilons."""

    def draw(figure: Figure) -> None:
        count = len(audit.observations)
        left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=[1.15, 1])[0]
        panels = left.subplots(count, 1, sharex=True, squeeze=False)[:, 0]
        for axes, observation in zip(panels, audit.observations, strict=True):
            _statistics(axes, observation, audit.coins)
        panels[0].legend(
            loc="lower left", bbox_to_anchor=(0, 1.28), ncols=3, frameon=False, fontsize=8.5,
            labelcolor=INK, handletextpad=0.4, columnspacing=1.2,
        )  # fmt: skip
        panels[-1].set_xlabel("standard deviations of a random direction's statistic")
        _epsilons(right.subplots(), audit)

    return _picture(draw, (10.5, 4.9))


def draw_membership(audit: MembershipAudit) -> bytes:
    """Draw the ROC curve on log scales, where few false alarms can be read."""

    def draw(figure: Figure) -> None:
        axes = _styled(figure.add_subplot())
        lowest = 1 / (2 * audit.strangers)
        rates = np.geomspace(lowest, 1, 50)
        axes.plot(rates, rates, "--", color=GREY, linewidth=1.3, label="guessing")
        axes.step(
            audit.false_alarms.clip(lowest), audit.hits.clip(1 / (2 * audit.members)),
            where="post", color=BLUE, linewidth=2, label=f"the attack, area {audit.auc:.3f}",
        )  # fmt: skip
        for rate in FALSE_ALARMS:
            if rate * audit.strangers >= 1 and audit.hits_at(rate) > 0:
                axes.plot([rate], [audit.hits_at(rate)], "o", color=BLUE, markersize=6)
                axes.annotate(
                    f"{audit.hits_at(rate):.1%} at {rate:.1%}", (rate, audit.hits_at(rate)),
                    xytext=(-6, 7), textcoords="offset points", ha="right", fontsize=9.5, color=INK,
                )  # fmt: skip
        axes.set(
            xscale="log", yscale="log", xlim=(lowest, 1), ylim=(lowest, 1.25),
            xlabel=f"false alarms: share of the {audit.strangers} non-members called members",
            ylabel=f"hits: share of the {audit.members} members recognised",
        )  # fmt: skip
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
        axes.set_title(
            f"Was a device in the training? Ledger: {_epsilon(audit.epsilon)}",
            loc="left", fontsize=11.5, color=INK,
        )  # fmt: skip
        axes.legend(loc="lower right", frameon=False, fontsize=10, labelcolor=INK)

    return _picture(draw, (6.4, 4.6))


def draw_inversion(audit: InversionAudit) -> bytes:
    """Draw the originals beside the best that every view gave away."""

    def draw(figure: Figure) -> None:
        columns: list[tuple[str, Images, Recovered | None]] = [("original", audit.originals, None)]
        columns += [(_title(view), view.recovered.images, view.recovered) for view in audit.views]
        table = figure.subplots(len(audit.originals), len(columns), squeeze=False)
        for place, (title, images, recovered) in enumerate(columns):
            for row, image in enumerate(images):
                axes = table[row, place]
                axes.imshow(_shown(image), cmap="gray", vmin=0, vmax=audit.originals.max())
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set_color(RULE)
                if recovered is not None:
                    axes.set_xlabel(
                        f"{recovered.correlation[row]:.2f} · {recovered.psnr[row]:.0f} dB",
                        fontsize=7.5, color=GREY, labelpad=2,
                    )  # fmt: skip
            table[0, place].set_title(title, fontsize=9.5, color=INK, pad=6)
        figure.suptitle(
            "Images from what a coordinator holds: correlation with the original · PSNR",
            fontsize=11.5, color=INK,
        )  # fmt: skip

    return _picture(draw, (1.3 * (len(audit.views) + 1) + 0.4, 1.28 * len(audit.originals) + 0.9))


def _statistics(axes: Axes, observation: Observation, coins: np.ndarray[Any, Any]) -> None:
    """Draw one observer's candidates over the density of random directions."""
    null = observation.null
    scaled = (observation.statistics - null.mean) / null.std
    x = np.linspace(-4, 4, 200)
    density = np.exp(-(x**2) / 2)
    _styled(axes)
    axes.fill_between(x, density, color=RULE, label="random directions")
    for chosen, colour, marker, height, label in (
        (coins, BLUE, "o", 0.55, "canaries"),
        (~coins, ORANGE, "x", 0.25, "silent candidates"),
    ):
        spots = np.full(np.count_nonzero(chosen), height)
        axes.plot(
            scaled[chosen], spots, marker, color=colour, markersize=4.5, alpha=0.75, label=label,
            markerfacecolor="none" if marker == "o" else colour,
        )  # fmt: skip
    axes.set(yticks=[], ylim=(0, 1.08))
    axes.spines["left"].set_visible(False)
    axes.set_title(_observer(observation.observer), loc="left", fontsize=10, color=INK, pad=3)


def _epsilons(axes: Axes, audit: CanaryAudit) -> None:
    """Draw estimates with their intervals, bounds, and the ledger's epsilon."""
    _styled(axes)
    values = [audit.epsilon]
    for row, observation in enumerate(audit.observations):
        shift, fit = observation.estimates.shift, observation.estimates.fit
        values += [shift.high, fit.epsilon, observation.bound.epsilon]
        first = row == 0
        axes.plot([shift.low, shift.high], [row, row], color=BLUE, linewidth=3, alpha=0.4)
        axes.plot(
            [shift.epsilon], [row], "o", color=BLUE, markersize=7,
            label="estimate, 95 % interval" if first else None,
        )  # fmt: skip
        axes.plot(
            [fit.epsilon], [row + 0.16], "D", color=ORANGE, markersize=5,
            label="estimate, spread fitted too" if first else None,
        )  # fmt: skip
        axes.plot(
            [observation.bound.epsilon], [row - 0.16], ">", color=INK, markersize=6,
            label="proved, 95 %" if first else None,
        )  # fmt: skip
    largest = max([value for value in values if isfinite(value)] + [1.0])
    if isfinite(audit.epsilon):
        axes.axvline(audit.epsilon, color=VERMILLION, linestyle="--", linewidth=1.6)
    title = f"ledger: {_epsilon(audit.epsilon)}; all at δ = {audit.delta:g}".replace("e-0", "e-")
    axes.set_title(title, loc="left", fontsize=10.5, color=VERMILLION)
    if largest > 40:
        axes.set_xscale("symlog", linthresh=1)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlim(-0.03 * largest if largest <= 40 else -0.1, 1.15 * largest)
    names = [_observer(observation.observer) for observation in audit.observations]
    axes.set_yticks(range(len(names)), [name.replace(": ", ":\n") for name in names])
    axes.set_ylim(len(names) + 0.35, -0.5)
    axes.tick_params(axis="y", labelcolor=INK, labelsize=9)
    axes.set_xlabel("ε")
    axes.legend(
        loc="lower right", facecolor="white", edgecolor="white", framealpha=1, fontsize=8.5,
        labelcolor=INK,
    )  # fmt: skip


def _observer(name: str) -> str:
    words = {
        "final model": "final model: the last minus the first",
        "every model": "every model: the largest cosine",
        "its rounds": "its rounds: cosines where drawn",
    }
    return words[name]


def _title(view: View) -> str:
    return {
        "one update": "one update,\nno mask",
        "sum": f"sum of {view.devices}",
        "one noisy update": "one update,\nits own noise",
        "noisy sum": f"noisy sum\nof {view.devices}",
        "nothing": "nothing\n(chance)",
    }[view.name]


def _shown(image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return an image as matplotlib takes it: [height, width], or with three channels last."""
    return image[0] if len(image) == 1 else image.transpose(1, 2, 0).clip(0, 1)


def _epsilon(value: float) -> str:
    return f"ε = {value:.3g}" if isfinite(value) else "ε = ∞, no noise"


def _styled(axes: Axes) -> Axes:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GREY)
    axes.grid(color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9.5, labelcolor=GREY, color=GREY)
    axes.xaxis.label.set(fontsize=10, color=INK)
    axes.yaxis.label.set(fontsize=10, color=INK)
    return axes


def _picture(draw: Callable[[Figure], None], inches: Sequence[float]) -> bytes:
    from matplotlib.figure import Figure  # noqa: PLC0415 - half a second to import

    figure = Figure(figsize=(inches[0], inches[1]), dpi=_DPI, layout="constrained")
    figure.set_facecolor("white")
    draw(figure)
    file = BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()
