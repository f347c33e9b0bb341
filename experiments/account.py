"""Privacy of a run without training: `python -m experiments.account experiment=quickstart`."""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from experiments.command import CONF, one_line_errors, run_command


@hydra.main(version_base="1.3", config_path=CONF, config_name="account")
def main(cfg: DictConfig) -> None:
    """Compose, convert once, account."""
    with one_line_errors():
        from experiments.accounting import account  # noqa: PLC0415 - --help needs no torch
        from experiments.schema import to_account  # noqa: PLC0415 - nor pydantic

        print(account(*to_account(cfg)))


if __name__ == "__main__":
    run_command(main)
