"""Flower's SuperExec for a device, with ClientApps that start warm.

`flower-superexec` starts a new Python for every message, which imports torch first: three
seconds of a desktop's processor, four or five times a round. Here a server process imports
what is the same for every app once, and forks a process for each message: the libraries,
never the app itself, which every process still loads from the bundle that it was sent.

The server is the standard library's (`multiprocessing`, start method "forkserver"): a
process without threads, in which forking is safe. Arguments are those of `flower-superexec`.

Flower has no public way to say how a task is started: the `launch` of its executor is
replaced (flwr 1.41, which pyproject.toml pins).
"""

from __future__ import annotations

import multiprocessing
from typing import Final

from flwr.supercore.cli.flower_superexec import flower_superexec
from flwr.supercore.superexec.executor.subprocess_executor import SubprocessExecutor
from flwr.supercore.superexec.executor.types import ExecutionSpec, LaunchResult
from flwr.supernode.runtime.run_clientapp import run_clientapp

LIBRARIES: Final = (
    "flwr.supernode.runtime.run_clientapp",
    "flwr.clientapp",
    "pydantic",
    "scipy.special",
    "torch",
    "opacus",
)
"""What ClientApps import; one that is not installed is left out.

None may start a thread, as scikit-learn's data sets do (by way of pyarrow's allocator)."""


def launch(self: SubprocessExecutor, spec: ExecutionSpec) -> LaunchResult:
    """Fork a process for one message."""
    del self
    multiprocessing.active_children()  # joins those that have ended
    process = multiprocessing.get_context("forkserver").Process(target=answer, args=(spec,))
    process.start()
    return LaunchResult.accepted()


def answer(spec: ExecutionSpec) -> None:
    """Run the ClientApp on one message, as `flwr-clientapp` does."""
    run_clientapp(
        runtime_api_address=spec.runtime_api_address,
        token=spec.token,
        insecure=spec.insecure,
        parent_pid=spec.parent_pid,
        runtime_dependency_install=spec.runtime_dependency_install,
    )


def main() -> None:
    """Run SuperExec with forked ClientApps."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(LIBRARIES))
    SubprocessExecutor.launch = launch  # type: ignore[method-assign]
    flower_superexec()


if __name__ == "__main__":
    main()
