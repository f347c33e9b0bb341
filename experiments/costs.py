"""What a run costs in privacy, in one line for each unit: for consoles."""

from __future__ import annotations

from fedcore.job import Assessment, Cost


def costs_in_words(assessment: Assessment) -> list[str]:
    """Return a line for each unit whose privacy is protected."""
    return [_line(cost) for cost in (assessment.device, assessment.example) if cost is not None]


def warnings_in_words(assessment: Assessment) -> list[str]:
    """Return the assessment's warnings, each marked as one."""
    return [f"warning: {text}" for text in assessment.warnings]


def inflation_in_words(cost: Cost) -> str:
    """Return by how much rounding enlarges the noise, or nothing if there is no ring."""
    if cost.ring_bits is None:
        return ""
    return (
        f", {cost.inflation:.4g} times the central Gaussian's for rounding into "
        f"{cost.ring_bits} bits"
    )


def _line(cost: Cost) -> str:
    found = "" if cost.target is None else f" found for epsilon {cost.target:g}"
    return (
        f"one {cost.unit}: noise multiplier {cost.noise_multiplier:.5g}{found}"
        f"{inflation_in_words(cost)}; delta {cost.delta:g}"
    )
