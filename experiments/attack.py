"""Attack a run to see what it gives away: `python -m experiments.attack suite=canary`."""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from experiments.command import CONF, one_line_errors, run_command


@hydra.main(version_base="1.3", config_path=CONF, config_name="attack")
def main(cfg: DictConfig) -> None:
    """Compose, convert once, attack."""
    with one_line_errors():
        from experiments.audit.settings import to_audit  # noqa: PLC0415 - --help needs no torch

        experiment, audit = to_audit(cfg)
        from experiments.audit.run import run_audit  # noqa: PLC0415 - nor does a typing error

        run_audit(experiment, audit, cfg)


if __name__ == "__main__":
    run_command(main)
