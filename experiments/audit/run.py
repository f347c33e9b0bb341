"""An audit from its configuration to its report.

Everything that can be checked is checked for all suites before the first one runs and
before anything is written. Results and page are written anew after every suite, so an
interrupt leaves what was finished.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from math import isfinite, isnan
from pathlib import Path

import numpy as np
from omegaconf import DictConfig

from experiments.audit.canary import CanaryAudit, audit_canaries, check_canary
from experiments.audit.inversion import InversionAudit, audit_inversion, check_inversion
from experiments.audit.membership import FALSE_ALARMS, MembershipAudit, audit_membership
from experiments.audit.page import PAGE, write_page
from experiments.audit.pictures import draw_canaries, draw_inversion, draw_membership
from experiments.audit.settings import Audit
from experiments.benchmark import table
from experiments.schema import Experiment, InProcess
from experiments.training import new_folder, write_configuration
from fedcore.errors import ConfigurationError
from fedcore.job import Preflight, check
from fedcore.models import NoPruning

RESULTS = "attack.json"


@dataclass(frozen=True, slots=True)
class Finding:
    """What one suite found, ready to be shown.

    Attributes:
        suite: Its name.
        rows: For the table.
        picture: PNG.
        result: All figures.
    """

    suite: str
    rows: list[dict[str, str]]
    picture: bytes
    result: CanaryAudit | MembershipAudit | InversionAudit


def run_audit(experiment: Experiment, audit: Audit, cfg: DictConfig) -> None:
    """Check, attack, print, write.

    Raises:
        ConfigurationError: Something cannot work; nothing was written.
        KeyboardInterrupt: The user stopped the audit; finished suites are on disk.
    """
    logging.getLogger("flwr").setLevel(logging.ERROR)  # the progress bar says it better
    folder, preflight = new_folder(experiment.output), check(experiment.job)
    job = preflight.job  # its noise is stated now
    if not isinstance(job.pruning, NoPruning):
        msg = (
            "an audit compares the models of all rounds number by number, and pruning="
            f"{job.pruning.kind} removes some: choose pruning=none"
        )
        raise ConfigurationError(msg)
    if "canary" in audit.suites:
        check_canary(job, preflight, audit.canary)
    if "inversion" in audit.suites:
        check_inversion(job, preflight, audit.inversion)
    folder.mkdir(parents=True, exist_ok=True)
    write_configuration(folder, cfg)
    print(
        f"{job.name}: {preflight.parameters:,} weights, {job.rounds} rounds, "
        f"{job.clients_per_round} of {job.clients} clients a round, "
        f"epsilon {preflight.epsilon:.3g} by the ledger\n{folder}",
        flush=True,
    )
    findings: list[Finding] = []
    for suite in audit.suites:
        finding = _attack(suite, experiment, audit, preflight)
        findings.append(finding)
        (folder / f"{suite}.png").write_bytes(finding.picture)
        _write_results(folder, experiment, audit, findings)
        write_page(folder, job, findings)
        print(f"\n{suite}\n{table(finding.rows)}", flush=True)
    print(f"\n{folder / RESULTS}\n{folder / PAGE}")


def _attack(suite: str, experiment: Experiment, audit: Audit, preflight: Preflight) -> Finding:
    """Run one suite."""
    job, signed, quiet = preflight.job, experiment.signed, not sys.stderr.isatty()
    workers = experiment.engine.workers if isinstance(experiment.engine, InProcess) else 0
    match suite:
        case "canary":
            canary = audit_canaries(
                job, preflight, audit.canary, signed=signed, workers=workers, quiet=quiet
            )
            return Finding(suite, canary_rows(canary), draw_canaries(canary), canary)
        case "membership":
            member = audit_membership(job, audit.membership, signed=signed, quiet=quiet)
            return Finding(suite, membership_rows(member), draw_membership(member), member)
        case _:
            images = audit_inversion(job, preflight, audit.inversion, signed=signed, quiet=quiet)
            return Finding(suite, inversion_rows(images), draw_inversion(images), images)


def canary_rows(audit: CanaryAudit) -> list[dict[str, str]]:
    """Return one row for each observer."""
    return [
        {
            "observer": seen.observer,
            "estimate": shown(seen.estimates.shift.epsilon),
            "95 % interval": (
                f"{shown(seen.estimates.shift.low)} to {shown(seen.estimates.shift.high)}"
            ),
            "spread fitted": shown(seen.estimates.fit.epsilon),
            "proved": shown(seen.bound.epsilon),
            "ledger": shown(audit.epsilon),
        }
        for seen in audit.observations
    ]


def membership_rows(audit: MembershipAudit) -> list[dict[str, str]]:
    """Return the one row of the suite."""
    hits = {
        f"hits at {rate:.1%}": f"{audit.hits_at(rate):.1%}"
        if rate * audit.strangers >= 1
        else f"needs {1 / rate:,.0f} pairs"
        for rate in FALSE_ALARMS
    }
    return [
        {
            "area": f"{audit.auc:.3f} ± {audit.auc_error:.3f}",
            "balanced accuracy": f"{audit.balanced_accuracy:.3f}",
            **hits,
            "proved": shown(audit.bound.epsilon),
            "ledger": shown(audit.epsilon),
            "test accuracy": f"{audit.accuracy:.3f}",
        }
    ]


def inversion_rows(audit: InversionAudit) -> list[dict[str, str]]:
    """Return one row for each view."""
    return [
        {
            "observed": view.name,
            "devices": str(view.devices),
            "correlation": f"{view.recovered.correlation.mean():.2f}",
            "best": f"{view.recovered.correlation.max():.2f}",
            "PSNR (dB)": f"{view.recovered.psnr.mean():.1f}",
        }
        for view in audit.views
    ]


def shown(value: float) -> str:
    """Return an epsilon in three digits."""
    return f"{value:.3g}" if isfinite(value) else str(value)


def _write_results(
    folder: Path, experiment: Experiment, audit: Audit, findings: list[Finding]
) -> None:
    document = {
        "experiment": experiment.name,
        "seed": experiment.seed,
        "job": json.loads(experiment.job.to_json()),
        "settings": asdict(audit),
        "results": {finding.suite: plain(finding.result) for finding in findings},
    }
    text = json.dumps(document, indent=2, allow_nan=False) + "\n"
    partial = folder / f"{RESULTS}.part"
    partial.write_text(text, encoding="utf-8")
    partial.replace(folder / RESULTS)


def plain(value: object) -> object:
    """Return `value` as JSON has it: infinity in words, no NaN, no images."""
    if is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in fields(value) if field.name not in {"images", "originals"}]
        return {name: plain(getattr(value, name)) for name in names}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, float) and not isfinite(value):
        return None if isnan(value) else str(value)
    return value
