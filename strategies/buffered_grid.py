"""A Flower grid on which every training round is one buffer of updates that were ready.

`BufferedGrid` is a `SecureGrid` whose members are not the nodes that the strategy named:
devices train in the background (`strategies.check_ins`), and the members are those that
have checked in. What they kept is added up by the same protocols, in a plan that names the
model of every seat (`fedcore.pipeline.buffer`). The strategy gets one reply and makes one
step: a server learning rate or a momentum is the strategy's, FedAvgM's for instance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedcore.engine import Clock
from fedcore.job import Buffered, Job
from fedcore.pipeline import Buffer, RoundPlan, RunPlan
from fedcore.pipeline.decline import add_reasons
from fedcore.pipeline.envelope import CHECK_IN
from fedcore.telemetry import RoundReport
from strategies.check_ins import CheckIns, CheckInState
from strategies.secure_grid import SecureGrid
from strategies.secure_round import Invited
from strategies.training_messages import is_training

NOBODY_LEFT = (
    "too few devices checked in, and nobody is left who trains: raise schedule.concurrency, or "
    "lower clients_per_round"
)


class BufferedGrid(SecureGrid):
    """Answers training messages with the mean of a buffer; passes everything else on.

    Args:
        grid: Carries the messages.
        plan: How updates are encoded, protected and added.
        check_ins: Who trains, and who is done; on the same grid and clock.
        on_round: Called with a report after every buffer, aborted ones included.
        options: As for `SecureGrid`.

    Attributes:
        check_ins: As given.
    """

    def __init__(
        self,
        grid: Grid,
        plan: RunPlan,
        *,
        check_ins: CheckIns,
        on_round: Callable[[RoundReport], None] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(grid, plan, on_round=self._told, **options)
        self.check_ins = check_ins
        self._tell = on_round
        self._members: Mapping[int, int] = {}

    @property
    def kept(self) -> CheckInState | None:
        """What goes on between two buffers, in a simulation that can go on; else None."""
        return self.check_ins.state() if self.check_ins.resumable else None

    def get_node_ids(self) -> list[int]:
        """Return as many nodes as a buffer has members: whom a strategy names does not matter."""
        return sorted(self.check_ins.labels)[: self.check_ins.size]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Fill a buffer for training messages, and add it up; pass others on.

        Raises:
            ConfigurationError: As `SecureGrid`.
            BudgetExhaustedError: The buffer would exceed the privacy budget; no update was asked
                for.
        """
        batch = list(messages)
        if not any(is_training(message) for message in batch):
            return super().send_and_receive(batch, timeout=timeout)
        first = batch[0]
        kind, number = first.metadata.message_type, self.state.round_number + 1
        self._members = self.check_ins.gather(first.content, kind, number)
        if not self._members:
            self.skip_round(0, NOBODY_LEFT)
            return []
        invitations = [
            Message(first.content, node, kind, group_id=first.metadata.group_id)
            for node in self._members
        ]
        return super().send_and_receive(invitations, timeout=timeout)

    def _for_cohort(self, plan: RoundPlan, clients: Sequence[Invited]) -> RoundPlan:
        """Return the plan with the version of each seat."""
        buffer = Buffer(
            versions=self.check_ins.versions,
            staleness=tuple(self._members[client.node_id] for client in clients),
            exponent=self.check_ins.schedule.exponent,
        )
        return replace(plan, clients=len(clients), buffer=buffer)

    def _uploading(self, content: RecordDict) -> RecordDict:
        """Send no model: members have trained."""
        del content
        return RecordDict()

    def _told(self, report: RoundReport) -> None:
        """Add to a report what devices did meanwhile."""
        buffer, traffic, lost, declined = self.check_ins.report()
        if self._tell is None:
            return
        ages = sorted(self._members.values())
        self._tell(
            replace(
                report,
                traffic=report.traffic + traffic,
                lost={**report.lost, **({CHECK_IN: lost} if lost else {})},
                declined=add_reasons(report.declined, declined),
                buffer=replace(buffer, staleness=tuple(ages)),
            )
        )


def check_ins_of(
    job: Job,
    schedule: Buffered,
    grid: Grid,
    clock: Clock,
    labels: dict[int, str],
    *,
    resumable: bool,
    found: CheckInState | None,
) -> CheckIns:
    """Return who trains and who is done at the start of a run, or where it goes on.

    Args:
        job: Of the run.
        schedule: Its schedule.
        grid: Carries the messages.
        clock: The run's.
        labels: Every node's label, by node id.
        resumable: Whether another process can go on in the middle: a simulation, whose nodes
            are in the checkpoint.
        found: What an earlier process left; its devices have lost their work if None.
    """
    size = job.clients_per_round
    survivors = size if job.plan is None else job.plan.minimum_survivors(size)
    check_ins = CheckIns(
        grid,
        clock,
        labels,
        schedule,
        size=size,
        fewest=schedule.fewest(size - survivors),
        seconds=job.stage_seconds,
        seed=job.seed,
        resumable=resumable,
    )
    if resumable and found is not None:
        check_ins.go_on(found)
    return check_ins
