"""Which nodes a run asks for updates: those that are large enough for one of its classes.

A node is asked for its profile once, before the first round; what it does not tell counts
as 0. Being too small is no matter of anybody's data, and is the same in every round: the
nodes that are left are the population that cohorts are drawn from.
"""

from __future__ import annotations

from collections.abc import Mapping

from flwr.serverapp import Grid

from fedcore.engine import Clock
from fedcore.job import Buffered, Job, Mixed, of_examples
from fedcore.job.devices import check_enough
from strategies.cohort import Fleet, discover


def find_fleet(grid: Grid, job: Job, clock: Clock, known: Mapping[int, str] | None = None) -> Fleet:
    """Return the nodes that rounds invite from, with their profiles if classes matter.

    Args:
        grid: Where the nodes are.
        job: Says how many are needed, and whether their profiles matter.
        clock: Tells the time.
        known: Labels that an earlier process of the run found, by node id.

    Raises:
        ConfigurationError: Too few nodes are there, or too few are large enough.
    """
    wanted = profile_fields(job)
    # A buffer waits for no particular device: the others check in when they come.
    nodes = job.clients_per_round if isinstance(job.schedule, Buffered) else job.clients
    found = discover(
        grid, nodes=nodes, seconds=job.stage_seconds, clock=clock, wanted=wanted, known=known
    )
    devices = job.devices
    if not isinstance(devices, Mixed):
        return found
    able = {node for node, profile in found.profiles.items() if devices.asks(profile)}
    check_enough(job, len(able), len(found.labels))
    return Fleet(
        {node: label for node, label in found.labels.items() if node in able},
        {node: profile for node, profile in found.profiles.items() if node in able},
    )


def profile_fields(job: Job) -> tuple[str, ...]:
    """Return what nodes are asked of themselves: nothing that the job promises to hide.

    Numbers of examples help to set deadlines. Where noise hides devices or examples, they are
    not asked for.
    """
    if not isinstance(job.devices, Mixed):
        return ()
    hardware = ("memory_mib", "cores", "link_kbps")
    return hardware if hides(job) else (*hardware, "examples")


def hides(job: Job) -> bool:
    """Return whether some noise of the job hides how many examples a device has."""
    plan = job.plan
    return of_examples(job.privacy) is not None or (plan is not None and plan.private)
