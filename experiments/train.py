"""Train one model: `python -m experiments.train experiment=quickstart`."""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from experiments.command import CONF, one_line_errors, run_command


@hydra.main(version_base="1.3", config_path=CONF, config_name="train")
def main(cfg: DictConfig) -> None:
    """Compose, convert once, run."""
    with one_line_errors():
        from experiments.schema import to_experiment  # noqa: PLC0415 - --help needs no torch

        experiment = to_experiment(cfg)
        from experiments.training import run_experiment  # noqa: PLC0415 - nor does a typing error

        run_experiment(experiment, cfg)


if __name__ == "__main__":
    run_command(main)
