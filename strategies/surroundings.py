"""What surrounds a run: its clock, its helper, its randomness, the names of its devices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from flwr.app import Context, Message
from flwr.serverapp import Grid

from fedcore.crypto import Entropy, ReplayedEntropy
from fedcore.engine import Clock, HeavyTailed, InProcessGrid, SystemClock, VirtualClock
from fedcore.job import Job, RemoteHelper
from fedcore.pipeline import RECORD, Envelope
from strategies.helper_client import Helper, HelperAddress, HelperClient, InProcessHelper


def clock_of(job: Job, grid: Grid) -> Clock:
    """Return the run's clock: a virtual one where simulated devices take their time."""
    simulated = isinstance(grid, InProcessGrid) and isinstance(job.pace, HeavyTailed)
    return VirtualClock() if simulated else SystemClock()


def path_in(context: Context, key: str) -> Path | None:
    """Return the path that the run configuration names, if it names one."""
    named = context.run_config.get(key)
    return Path(named) if isinstance(named, str) and named else None


def connect_helper(job: Job) -> tuple[Helper, str]:
    """Return the job's seed helper, and its public key in hexadecimal digits.

    Raises:
        ConfigurationError: Its address or one of its files is wrong.
    """
    if isinstance(job.helper, RemoteHelper):
        address = HelperAddress(
            address=job.helper.address,
            public_key=job.helper.public_key,
            authority=job.helper.authority,
            certificate=job.helper.certificate,
            private_key=job.helper.private_key,
        )
        return HelperClient(address), job.helper.public_key
    authority = getattr(job.secagg, "authority", None)
    local = InProcessHelper(
        helper_entropy(job.seed), authority=None if authority is None else bytes.fromhex(authority)
    )
    return local, local.public_key.hex()


def coordinator_entropy(seed: int) -> Entropy:
    """Return what a simulation's coordinator draws its cohorts and its noise from."""
    return ReplayedEntropy(str(seed).encode()).child("coordinator")


def helper_entropy(seed: int) -> Entropy:
    """Return what the key of a simulation's helper is made from."""
    return ReplayedEntropy(str(seed).encode()).child("helper")


def describe_by(
    labels: Mapping[int, str],
) -> Callable[[Message], tuple[int, str, str] | None]:
    """Return what a fault script knows of a message: round, stage and label."""

    def describe(message: Message) -> tuple[int, str, str] | None:
        records = message.content.config_records
        if RECORD in records:
            envelope = Envelope.from_fields(records[RECORD])
            return envelope.round_number, envelope.stage, envelope.label
        if not message.metadata.message_type.startswith("train"):
            return None
        number = records["config"]["server-round"] if "config" in records else 0
        label = labels[message.metadata.dst_node_id]
        return (number, "upload", label) if isinstance(number, int) else None

    return describe
