"""A sweep goes on where it was stopped: `--multirun` with an `output` that names its run.

A folder with the summary of a finished run of the same configuration is not trained
again. One that was interrupted goes on from its checkpoint, or if it has none is started
anew: the same seeds give the same rounds.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf

INTERRUPTED, FAILED, NOT_BEGUN = "interrupted", "failed", "before the first round"
"""Why a run ended early, in its summary, where repeating it may help."""
CHECKPOINTS = "checkpoint"
"""Folder of a run, in its own, that is there until it is finished."""

Summary = dict[str, object]


def swept_before(folder: Path, cfg: DictConfig) -> Summary | None:
    """Return the summary of a run that a sweep need not repeat; clear one that cannot go on.

    Args:
        folder: Of the run.
        cfg: The run's configuration.

    Returns:
        None if the run is to be made, or is not part of a sweep.
    """
    if not _is_of_this_sweep(folder, cfg):
        return None
    if (summary := finished(folder)) is not None:
        return summary
    if not can_go_on(folder, cfg):
        shutil.rmtree(folder)
    return None


def _values(cfg: DictConfig | ListConfig) -> dict[str, object]:
    """Return what a run does; which numbers of a sweep it refers to for that is no matter."""
    values = OmegaConf.to_container(cfg, resolve=True)
    return {str(k): v for k, v in dict(values).items() if k != "sweep"}  # type: ignore[arg-type]


def can_go_on(folder: Path, cfg: DictConfig) -> bool:
    """Tell whether a sweep's run was interrupted and has a checkpoint."""
    return _is_of_this_sweep(folder, cfg) and any((folder / CHECKPOINTS).glob("*.checkpoint"))


def finished(folder: Path) -> Summary | None:
    """Return the summary of a run that need not be repeated; None for one that was stopped."""
    summary = _summary(folder / "summary.json")
    return None if summary.get("stopped", FAILED) in (INTERRUPTED, FAILED, NOT_BEGUN) else summary


def _is_of_this_sweep(folder: Path, cfg: DictConfig) -> bool:
    if not HydraConfig.initialized() or HydraConfig.get().mode is not RunMode.MULTIRUN:
        return False
    configuration = folder / ".hydra" / "config.yaml"
    return configuration.is_file() and _values(OmegaConf.load(configuration)) == _values(cfg)


def _summary(path: Path) -> Summary:
    """Return a run's summary, or nothing if it wrote none or was killed meanwhile."""
    try:
        summary = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return summary if isinstance(summary, dict) else {}
