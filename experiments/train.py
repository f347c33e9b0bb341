"""Train one model: `python -m experiments.train experiment=quickstart`.

`python -m experiments.train --resume FOLDER` goes on with a run that was stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from experiments.command import CONF, one_line_errors, run_command
from fedcore.errors import ConfigurationError

RESUME = "--resume"


@hydra.main(version_base="1.3", config_path=CONF, config_name="train")
def main(cfg: DictConfig) -> None:
    """Compose, convert once, run."""
    with one_line_errors():
        from experiments.schema import to_experiment  # noqa: PLC0415 - --help needs no torch

        experiment = to_experiment(cfg)
        from experiments.training import run_experiment  # noqa: PLC0415 - nor does a typing error

        run_experiment(experiment, cfg)


def resume() -> None:
    """Go on after the last round of the run in the folder that follows `--resume`.

    Raises:
        ConfigurationError: Something else is given, too, or there is nothing to go on with.
    """
    from experiments.schema import to_experiment  # noqa: PLC0415 - as above
    from experiments.training import run_experiment, stopped_run  # noqa: PLC0415

    if len(sys.argv) != 3 or sys.argv[1] != RESUME:
        msg = f"{RESUME} takes the folder of a run and nothing else: its configuration is there"
        raise ConfigurationError(msg)
    cfg = stopped_run(Path(sys.argv[2]))
    run_experiment(to_experiment(cfg), cfg, resume=True)


def command() -> None:
    """Do what the command line says."""
    if RESUME in sys.argv:
        resume()
    else:
        main()


if __name__ == "__main__":
    run_command(command)
