"""The ServerApp of a real deployment: a recorded run whose results are files.

A SuperLink throws away what a ServerApp leaves in its Context, and `flwr run` ends with
status 0 whatever happened. So the run writes into the folder that its configuration names
as `output`, as `experiments.train` does, and says itself how it ended:

    metrics.jsonl, ledger.json    after each round
    model.npz                     the global model, after each round
    summary.json                  last of all: rounds held, and why it stopped if it did

    checkpoint/                   where it goes on, if the configuration names it: `docs/resume.md`

Without summary.json a run did not end: it was killed, or its network or its machine was at
fault, and may be started again. With fewer `completed_rounds` than `rounds`, or with
`stopped`, it ended without finishing: starting it again would change nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from experiments.recorder import Recorder
from fedcore.errors import ConfigurationError, FedcoreError
from fedcore.job import Job, Preflight, check
from fedcore.pipeline import model_digest
from fedcore.training import Evaluation, one_thread
from strategies.exchange import RETRY_WITH_PATIENCE
from strategies.progress import Progress, Resumed
from strategies.server_app import build_server_app
from strategies.surroundings import coordinator_entropy

MODEL = "model.npz"


class DeployedRecorder(Recorder):
    """A recorder that also keeps the model on disk."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, quiet=True)
        self._model = folder / MODEL

    def started(self, job: Job, preflight: Preflight, initial: Evaluation) -> None:
        """Open the files; say on the log that devices were found."""
        super().started(job, preflight, initial)
        print(f"{job.name}: {job.clients} devices found", flush=True)

    def resumed(self, run: Resumed) -> None:
        """Write the model, too: the file may be of a round that is lost with its checkpoint."""
        write_model(self._model, run.arrays)
        super().resumed(run)

    def round_finished(self, progress: Progress) -> None:
        """Write the model before the line that says that the round is over."""
        write_model(self._model, progress.arrays)
        super().round_finished(progress)

    def close(self, release: Mapping[str, object] | None = None) -> dict[str, object]:
        """Write the summary, and into it which model it is about."""
        digest = None if self.arrays is None else model_digest(self.arrays)
        return super().close({**(release or {}), "model": MODEL, "model_digest": digest})


def write_model(path: Path, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Replace the model's file as a whole; equal models give equal bytes."""
    buffer = BytesIO()
    named: dict[str, Any] = dict(arrays)  # as numpy's stubs want keyword arguments
    np.savez(buffer, **named)
    partial = path.with_name(f".{path.name}")
    partial.write_bytes(buffer.getvalue())
    partial.replace(path)


def build_deployed_app() -> ServerApp:
    """Return the ServerApp that reads `job`, `output` and `rehearsal` of its run configuration."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        folder = Path(str(context.run_config["output"]))
        if not folder.is_absolute() or not folder.is_dir():
            msg = f"output must be an absolute path of a folder that exists, got {folder}"
            raise ConfigurationError(msg)
        one_thread()
        preflight = check(Job.from_json(str(context.run_config["job"])))
        rehearsed = bool(context.run_config.get("rehearsal", False))
        recorder = DeployedRecorder(folder)
        server = build_server_app(
            recorder,
            preflight,
            entropy=coordinator_entropy(preflight.job.seed) if rehearsed else None,
            retry_after=RETRY_WITH_PATIENCE,
        )
        context.run_config = {**context.run_config, "job": preflight.job.to_json()}
        try:
            server(grid=grid, context=context)
        except FedcoreError as error:
            recorder.stopped(" ".join(str(error).split()))
            recorder.close()
            raise
        recorder.close()

    return app


app = build_deployed_app()
