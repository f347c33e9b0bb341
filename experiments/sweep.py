"""A sweep goes on where it was stopped: `--multirun` with an `output` that names its run.

A folder with the summary of a finished run of the same configuration is not trained
again. One that was interrupted is started anew: the same seeds give the same rounds.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf

INTERRUPTED, FAILED = "interrupted", "failed"
"""Why a run ended early, in its summary, where repeating it may help."""

Summary = dict[str, object]


def swept_before(folder: Path, cfg: DictConfig) -> Summary | None:
    """Return the summary of a run that a sweep need not repeat; clear one that was stopped.

    Args:
        folder: Of the run.
        cfg: The run's configuration.

    Returns:
        None if the run is to be made, or is not part of a sweep.
    """
    if not HydraConfig.initialized() or HydraConfig.get().mode is not RunMode.MULTIRUN:
        return None
    configuration = folder / ".hydra" / "config.yaml"
    if not configuration.is_file() or _values(OmegaConf.load(configuration)) != _values(cfg):
        return None
    summary = _summary(folder / "summary.json")
    if summary.get("stopped", FAILED) not in (INTERRUPTED, FAILED):
        return summary
    shutil.rmtree(folder)
    return None


def _values(cfg: DictConfig | ListConfig) -> dict[str, object]:
    """Return what a run does; which numbers of a sweep it refers to for that is no matter."""
    values = OmegaConf.to_container(cfg, resolve=True)
    return {str(k): v for k, v in dict(values).items() if k != "sweep"}  # type: ignore[arg-type]


def _summary(path: Path) -> Summary:
    """Return a run's summary, or nothing if it wrote none or was killed meanwhile."""
    try:
        summary = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return summary if isinstance(summary, dict) else {}
