"""What this device tells of itself when a coordinator asks.

    asked for      from                                          told
    -------------  --------------------------------------------  ----------------------------
    memory_mib     /proc/meminfo, MemTotal [PROC]                unless `profile=none`
    cores          those that this process may use               unless `profile=none`
    link_kbps      `profile-link-kbps`, as the owner knows it    if it is set
    examples       the training examples                         only if `profile-examples=true`

All of it in powers of two (`fedcore.job.devices`). A coordinator gets what it asks for
and the owner allows; what is missing is 0 there, and the device perhaps too small for a
run. Numbers of examples are data, hardware is not: hence the different defaults. The
device finds its class from the same numbers, told or not.

[PROC] https://docs.kernel.org/filesystems/proc.html
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from pathlib import Path

from flwr.app import Context

from fedcore.errors import ConfigurationError
from fedcore.job import Job, Mixed, Profile
from fedcore.job.devices import rounded_down, rounded_up, simulated_profiles

_MEMORY = Path("/proc/meminfo")


def profile_of(context: Context, job: Job, memory: Path = _MEMORY) -> Profile:
    """Return what this device is, without its examples.

    Args:
        context: Of the node.
        job: Makes up the profiles of simulated devices.
        memory: What the kernel says of its memory.

    Raises:
        ConfigurationError: The owner's speed of the link is no number above 0.
    """
    index = context.node_config.get("partition-id")
    if isinstance(job.devices, Mixed) and job.devices.simulates and isinstance(index, int):
        return simulated_profiles(job.devices, job.clients, job.seed)[index]
    link = context.node_config.get("profile-link-kbps", 0)
    if not isinstance(link, (int, float)) or link < 0:
        msg = f"profile-link-kbps must be a number of 0 or more, got {link!r:.40}"
        raise ConfigurationError(msg)
    return Profile(
        memory_mib=rounded_down(_total_kib(memory) / 1024),
        cores=rounded_down(len(os.sched_getaffinity(0))),
        link_kbps=rounded_down(link),
    )


def told(
    context: Context, job: Job, wanted: Collection[str], examples: Callable[[], int]
) -> dict[str, int]:
    """Return what a coordinator that asks for `wanted` is told.

    Args:
        context: Of the node, with its owner's decisions.
        job: As in `profile_of`.
        wanted: Names of fields of `Profile`.
        examples: Counts them, if they are to be told.
    """
    allowed = context.node_config.get("profile", "hardware")
    if allowed not in {"none", "hardware"}:
        msg = f"profile must be none or hardware, got {allowed!r:.40}"
        raise ConfigurationError(msg)
    answer: dict[str, int] = {}
    if allowed == "hardware":
        own = profile_of(context, job)
        hardware = {"memory_mib": own.memory_mib, "cores": own.cores, "link_kbps": own.link_kbps}
        answer = {name: value for name, value in hardware.items() if name in wanted}
    simulated = isinstance(job.devices, Mixed) and job.devices.simulates
    allowed_to_count = simulated or context.node_config.get("profile-examples") is True
    if "examples" in wanted and allowed_to_count:
        answer["examples"] = rounded_up(examples())
    return answer


def class_of(context: Context, job: Job) -> int | None:
    """Return of which class this device is; None if the job has none.

    Raises:
        ConfigurationError: It is too small for all of them, and was asked all the same.
    """
    if not isinstance(job.devices, Mixed):
        return None
    index = job.devices.class_of(profile_of(context, job))
    if index is None or not job.devices.classes[index].width:
        msg = "this device is too small for the run, and was invited all the same"
        raise ConfigurationError(msg)
    return index


def _total_kib(path: Path) -> float:
    try:
        for line in path.read_text(encoding="ascii").splitlines():
            name, _, rest = line.partition(":")
            if name == "MemTotal":
                return float(rest.split()[0])
    except (OSError, ValueError, IndexError):
        pass
    return 0.0
