"""The picture of an account: epsilon over rounds and over noise, inflation over bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from io import BytesIO
from math import inf
from typing import TYPE_CHECKING, Any, Final, TypeAlias

if TYPE_CHECKING:  # matplotlib is loaded when something is drawn
    from matplotlib.axes import Axes

    from experiments.accounting import Account

EpsilonOfNoise: TypeAlias = Callable[[float], float]
_COLOURS: Final = {"device": "#0072b2", "example": "#d55e00"}
_TICKS: Final = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)


def draw(accounts: Sequence[Account], rounds: int, by_bits: Sequence[tuple[int, float]]) -> bytes:
    """Return a PNG with two panels, and a third one if there is a ring."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - only where it draws

    panels = 3 if by_bits else 2
    figure = Figure(figsize=(4.6 * panels, 3.8), layout="constrained")
    axes = figure.subplots(1, panels)
    _over_rounds(axes[0], accounts)
    _over_noise(axes[1], accounts, rounds)
    if by_bits:
        _over_bits(axes[2], by_bits, accounts[0])
    for panel in axes:
        panel.grid(visible=True, alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _over_rounds(axes: Axes, accounts: Sequence[Account]) -> None:
    for entry in accounts:
        x, y = zip(*entry.by_round, strict=True)
        colour = _COLOURS[entry.cost.unit]
        axes.plot(x, y, marker="o", markersize=4, color=colour, label=f"one {entry.cost.unit}")
        _mark(axes, x[-1], y[-1], f"ε = {y[-1]:.3g}", ha="right", color=colour)
        if entry.cost.budget is not None:
            axes.axhline(entry.cost.budget, color=colour, linestyle="--", linewidth=1.2)
    axes.set(xlabel="rounds", ylabel="ε so far", title="Every round costs", xlim=(0, None))
    top = max(max(entry.by_round[-1][1], entry.cost.budget or 0) for entry in accounts)
    axes.set_ylim(0, 1.15 * top if top < inf else None)
    if len(accounts) > 1 or accounts[0].cost.budget is not None:
        _legend(axes, accounts)


def _over_noise(axes: Axes, accounts: Sequence[Account], rounds: int) -> None:
    for entry in accounts:
        fitting = [(noise, epsilon) for noise, epsilon in entry.by_noise if epsilon < inf]
        if not fitting:
            continue
        x, y = zip(*fitting, strict=True)
        colour = _COLOURS[entry.cost.unit]
        axes.plot(x, y, color=colour, label=f"one {entry.cost.unit}")
        chosen = entry.cost.noise_multiplier
        axes.plot([chosen], [dict(entry.by_noise).get(chosen, inf)], "o", color=colour)
        _mark(axes, chosen, dict(entry.by_noise).get(chosen, inf), f"{chosen:.3g}", color=colour)
    axes.margins(x=0.12, y=0.1)
    axes.set(xscale="log", yscale="log", title="More noise costs less")
    axes.set(xlabel="noise multiplier", ylabel=f"ε after {rounds} rounds")
    for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        ticks = [tick for tick in _TICKS if limits[0] <= tick <= limits[1]]
        axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    if len(accounts) > 1:
        axes.legend(frameon=False)


def _over_bits(axes: Axes, by_bits: Sequence[tuple[int, float]], entry: Account) -> None:
    x, y = zip(*by_bits, strict=True)
    axes.plot(x, [100 * (inflation - 1) for inflation in y], marker="o", markersize=4, color="#555")
    bits, inflation = entry.cost.ring_bits, entry.cost.inflation
    if bits is not None:
        percent = 100 * (inflation - 1)
        axes.plot([bits], [percent], "o", markersize=8, color=_COLOURS["device"])
        _mark(axes, bits, percent, f"{bits} bits: {percent:.2g} %", color=_COLOURS["device"])
    axes.set(xlabel="bits of a coordinate", ylabel="noise above the central Gaussian's, %")
    axes.set(title="Rounding adds noise", yscale="log", xticks=list(x)[:: max(1, len(x) // 8)])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _mark(axes: Axes, x: float, y: float, text: str, **style: Any) -> None:
    if y < inf:
        axes.annotate(text, (x, y), xytext=(6 if "ha" not in style else -4, 8),
                      textcoords="offset points", fontsize=9.5, **style)  # fmt: skip


def _legend(axes: Axes, accounts: Sequence[Account]) -> None:
    axes.plot([], [], color="#555", linestyle="--", linewidth=1.2, label="budget")
    if all(entry.cost.budget is None for entry in accounts):
        axes.lines[-1].remove()
    axes.legend(frameon=False, loc="best")
