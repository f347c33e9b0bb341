"""A Flower grid on which training messages are answered by one secure sum.

`SecureGrid` wraps any grid. A strategy that sends training messages through it gets ONE
reply with the weighted mean of the survivors' models and metrics, computed by secure
aggregation; it cannot tell it from a federation of one very large client. Everything
else (evaluation, queries) passes through unchanged.

    FedAvg(...).start(grid=SecureGrid(grid, plan), initial_arrays=arrays, num_rounds=10)

The clients' half is `clients.secagg_mod`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from logging import getLogger
from math import inf
from typing import Any

import numpy.typing as npt
from flwr.app import Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fedcore.codec import Delta
from fedcore.engine import (
    Clock,
    SystemClock,
    WrappedGrid,
    to_arrays,
    to_record,
    unblocked_for_good,
)
from fedcore.errors import ConfigurationError, RoundAbortedError
from fedcore.pipeline import (
    AdaptiveClip,
    Bonawitz,
    BoundRound,
    CoordinatorNoise,
    MeanUpdate,
    RoundPlan,
    RunPlan,
    bind_round,
    first_norm,
    layers_of,
    model_digest,
    support_of,
)
from fedcore.pipeline.decline import add_reasons
from fedcore.pipeline.envelope import IDENTIFY, Stage
from fedcore.privacy import (
    Distributed,
    Drawn,
    MatrixGaussian,
    PrivacyLedger,
    Release,
    stated_noise,
)
from fedcore.telemetry import RoundReport, Traffic, skipped
from fedcore.vectors import Layout, RealVector
from strategies.attempt import Attempt, Sent, bound_to
from strategies.counted import Counted
from strategies.downlink import Downlink
from strategies.exchange import RETRY_AT_ONCE
from strategies.first import empty_ledger, noise_of
from strategies.grid_state import GridState
from strategies.helper_client import Helper
from strategies.linear import calling_strategy, refuse_nonlinear
from strategies.matrix_run import MatrixRun
from strategies.refusals import add_refusals
from strategies.seats import Registry, Seats
from strategies.secure_round import Invited, SecureRound
from strategies.stragglers import Dropped, Stragglers
from strategies.training_messages import common_content, is_training, nested

log = getLogger(__name__)


class SecureGrid(WrappedGrid):
    """Answers training messages with the secure mean; passes everything else on.

    Args:
        grid: Carries the messages: in-process, Ray's or a SuperLink's.
        plan: How updates are encoded, protected and added; the defaults of `RunPlan`
            suit any model.
        ledger: What was released before; a new one if None.
        on_round: Called with a report after every round, aborted ones included.
        labels: Names of the nodes that stay the same from run to run; node ids if None.
        weight_key: The strategy's `weighted_by_key`.
        clock: For the deadlines of the protocol's stages.
        helper: The second party of secagg=seed_helper.
        drawn: Says how the nodes that take part had been chosen, for the ledger; unknown if
            None.
        unix_time: Tells the time by which certificates expire.
        retry_after: Seconds to wait before a device whose message or reply got lost is
            asked the same again, for each time that it is; never beyond the stage's deadline.
        clip_norm: Where an adaptive clip goes on, as an earlier run reported it; None
            starts from its initial norm.
        noise: What the coordinator adds to a sum if the plan wants that; by default drawn
            from the operating system's entropy. A run with correlated noise that must
            outlive this process passes a `MatrixRun` with a file.
        state: Where an earlier grid of the same run stopped.
        note: Told a round's number and the ledger, before the round's first message and
            again before a sum can be known, then with the sum's entry: what it writes must be
            durable.
        wanted: How many updates are enough, where a strategy invites more; None for all.
        patience: For how many seconds a stage waits for these nodes, at most `stage_seconds`,
            which it is for all if None.
        on_outcome: Called after every attempt with the ids of the nodes that gave a sign of
            life (they are in the sum, or answered too late) and of those that failed.

    Attributes:
        plan: As given.
        ledger: Every sum that was revealed, and what it cost.
        clip_norm: Of the next round, if the clip is adaptive.

    Raises:
        ConfigurationError: `plan` has a target instead of a noise; `fedcore.pipeline.resolve`
            finds it.
    """

    def __init__(
        self,
        grid: Grid,
        plan: RunPlan | None = None,
        *,
        ledger: PrivacyLedger | None = None,
        on_round: Callable[[RoundReport], None] | None = None,
        labels: Mapping[int, str] | None = None,
        weight_key: str = "num-examples",
        clock: Clock | None = None,
        helper: Helper | None = None,
        drawn: Callable[[Collection[int]], Drawn] | None = None,
        unix_time: Callable[[], float] = time.time,
        retry_after: Sequence[float] = RETRY_AT_ONCE,
        clip_norm: float | None = None,
        noise: CoordinatorNoise | None = None,
        state: GridState | None = None,
        note: Callable[[int, PrivacyLedger], None] = lambda _, __: None,
        wanted: int | None = None,
        patience: Callable[[Stage, Iterable[int]], float] | None = None,
        on_outcome: Callable[[Collection[int], Collection[int]], None] = lambda _, __: None,
    ) -> None:
        super().__init__(unblocked_for_good(grid))
        self.plan = plan or RunPlan()
        stated_noise(self.plan.privacy)  # a target is for a run, and a grid sees rounds
        self.ledger = ledger if ledger is not None else empty_ledger(self.plan)
        self.clip_norm = first_norm(self.plan.clip) if clip_norm is None else clip_norm
        self._on_round = on_round
        self._labels = labels or {}
        self._weight_key = weight_key
        self._clock = clock or SystemClock()
        self._helper = helper
        self._drawn = drawn
        self._unix_time = unix_time
        self._retry_after = tuple(retry_after)
        self._registry = None
        if isinstance(self.plan.secagg, Bonawitz) and self.plan.secagg.authority is not None:
            authority = bytes.fromhex(self.plan.secagg.authority)
            self._registry = Registry(grid, self._clock, authority, unix_time, self._retry_after)
        self._noise = noise or noise_of(self.plan)
        if isinstance(self.plan.privacy, MatrixGaussian) != isinstance(self._noise, MatrixRun):
            msg = "privacy=matrix_gaussian, and nothing else, takes its noise from a MatrixRun"
            raise ConfigurationError(msg)
        self._round = max((release.round_number for release in self.ledger.releases), default=0)
        if isinstance(self._noise, MatrixRun):
            self._noise.check(self.plan.privacy, self.ledger)
            self._round = max(self._round, self._noise.tape.last)
        self._counted = Counted(since=self._round)
        downlink = self.plan.downlink
        self._downlink = Downlink(downlink) if isinstance(downlink, Delta) else None
        self._last: RealVector | None = None
        self._run_id: str | None = None
        self._note = note
        self._wanted = wanted
        self._patience = patience
        self._on_outcome = on_outcome
        self._stragglers = Stragglers()
        if state is not None:
            self._go_on(state)

    @property
    def noise(self) -> CoordinatorNoise:
        """What the coordinator adds to a sum, if the plan wants that."""
        return self._noise

    @property
    def state(self) -> GridState:
        """What another grid needs to go on after this round, beside ledger and noise."""
        return GridState(
            run_id=self._run_id,
            round_number=self._round,
            clip_norm=self.clip_norm,
            last=self._last,
            since=self._counted.since,
            counted=dict(self._counted.rounds),
            certificates={} if self._registry is None else dict(self._registry.certificates),
            downlink=None if self._downlink is None else self._downlink.state,
        )

    def _go_on(self, state: GridState) -> None:
        self._run_id, self._last = state.run_id, state.last
        self._round = max(self._round, state.round_number)
        self.clip_norm = state.clip_norm
        self._counted = Counted(state.since, dict(state.counted))
        if self._registry is not None:
            self._registry.certificates.update(state.certificates)
        if isinstance(self.plan.downlink, Delta):
            self._downlink = Downlink.restored(self.plan.downlink, state.downlink)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Pass messages on, except for training.

        Raises:
            ConfigurationError: A training message: its reply would be a single update.
        """
        batch = list(messages)
        if any(is_training(message) for message in batch):
            msg = (
                "training messages must go through SecureGrid.send_and_receive, which returns "
                "their secure mean; a pulled reply would be a single client's update"
            )
            raise ConfigurationError(msg)
        return self._grid.push_messages(batch)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Run one secure round for training messages; pass others on.

        Returns:
            One reply with the weighted mean, or none if every attempt was aborted: a
            Flower strategy then keeps its model.

        Raises:
            ConfigurationError: The strategy needs single updates, the messages differ, or
                the plan does not fit the cohort or the model; nothing was sent.
            BudgetExhaustedError: The round would exceed the privacy budget; nothing was sent.
        """
        batch = list(messages)
        if not any(is_training(message) for message in batch):
            return self._grid.send_and_receive(batch, timeout=timeout)
        strategy = calling_strategy()
        if strategy is not None:
            refuse_nonlinear(strategy)
        content = common_content(batch)
        name, record = next(iter(content.array_records.items()))
        arrays = to_arrays(record)
        mean = self._run_round(batch, content, name, arrays, timeout)
        return [] if mean is None else [self._reply(batch[0], name, arrays, mean)]

    def _run_round(
        self,
        batch: list[Message],
        content: RecordDict,
        name: str,
        arrays: Mapping[str, npt.NDArray[Any]],
        timeout: float | None,
    ) -> MeanUpdate | None:
        """Try the round as often as the plan allows; report once."""
        asked, plan = self._asked(batch), self.plan
        if timeout is not None:
            plan = replace(plan, stage_seconds=min(plan.stage_seconds, timeout))
        if isinstance(plan.secagg, Bonawitz):
            plan.secagg.check_margin(len(asked))
        self._round += 1
        # A run that goes on keeps its name: devices know by it what they answered before.
        self._run_id = self._run_id or str(batch[0].metadata.run_id)
        download = None
        if self._downlink is not None:
            arrays = self._downlink.publish(arrays)
            download = self._downlink.content(content, name)
        layout = Layout.of(arrays)
        first = RoundPlan(
            run=plan,
            run_id=self._run_id,
            round_number=self._round,
            attempt=1,
            clients=len(asked),
            dim=layout.dim,
            model_digest=model_digest(arrays),
            clip_norm=self.clip_norm,
            layers=layers_of(plan, layout),
        )
        last = self._last  # a pruned model has other coordinates than the one before
        last = last if last is not None and len(last) == first.dim else None
        first = self._for_cohort(replace(first, support=support_of(first, last)), asked)
        sent = Sent(content, batch[0].metadata.message_type, download, layout)
        traffic, aborted, dropped, refusals = Traffic(), [], Dropped(), dict[str, int]()
        for number in range(1, plan.attempts + 1):
            # Refuses a plan that does not fit, and a sum that is too expensive, before any work;
            # amplification is not counted on: it is lost with the first client.
            bound = bind_round(replace(first, attempt=number))
            self.ledger.record(self._release(bound, len(asked)))
            self._note(self._round, self.ledger)
            attempt = self._try(bound, asked, sent)
            traffic += attempt.traffic
            refusals = add_refusals(refusals, attempt.refusals)
            for said, count in attempt.refusals.items():
                log.warning("round %d: %d devices said: %s", self._round, count, said)
            dropped += attempt.dropped
            if attempt.mean is not None:
                self._last = attempt.mean.delta
                break
            aborted.append(attempt.aborted)
            log.warning("round %d, attempt %d: %s", self._round, number, attempt.aborted)
        attempt = replace(attempt, refusals=refusals)
        self._report(
            attempt, asked=len(asked), aborted=tuple(aborted), traffic=traffic, dropped=dropped
        )
        self._adapt(bound.plan, attempt.mean)
        return attempt.mean

    def _adapt(self, plan: RoundPlan, mean: MeanUpdate | None) -> None:
        """Move an adaptive clip after a round; an aborted one leaves it where it is."""
        clip = plan.run.clip
        if isinstance(clip, AdaptiveClip) and mean is not None and mean.unclipped is not None:
            self.clip_norm = clip.next(plan.norm, mean.unclipped)

    def _try(
        self,
        bound: BoundRound,
        asked: tuple[Invited, ...],
        sent: Sent,
    ) -> Attempt:
        """Find out who everybody is, where that matters, and run one round."""
        seats = Seats(asked)
        if self._registry is not None:
            seats = self._registry.seat(bound, asked, sent.kind, enough=self._wanted)
        missing = len(asked) - len(seats.clients)
        lost = {IDENTIFY: missing} if missing else {}
        try:
            bound = bound_to(seats, bound, self._for_cohort)
        except RoundAbortedError as error:
            self._on_outcome((), seats.silent)
            return Attempt(
                bound, None, seats.traffic, lost, str(error), seats.declined, seats.refusals
            )
        if isinstance(self._noise, MatrixRun):
            self._noise.invite((client.label for client in seats.clients), self._round)
        charged = self.ledger

        def revealing(survivors: int) -> None:
            nonlocal charged
            drawn = self._drawn and self._drawn([client.node_id for client in seats.clients])
            charged = self.ledger.record(self._release(bound, survivors, drawn))
            self._note(self._round, charged)

        current = SecureRound(
            self._grid,
            self._clock,
            bound,
            seats.clients,
            self._uploading(sent.content),
            sent.kind,
            self._weight_key,
            seats.identity_keys,
            self._helper,
            unix_time=self._unix_time,
            retry_after=self._retry_after,
            noise=self._noise,
            download=sent.download,
            counted=self._counted,
            revealing=revealing,
            wanted=self._wanted,
            stragglers=self._stragglers,
            patience=self._patience,
            layout=sent.layout,
        )
        mean, aborted = None, ""
        try:
            mean = current.run()
        except RoundAbortedError as error:
            aborted = str(error)
        dropped = self._stragglers.finish(self._grid)
        self._tell_outcome(seats, current, dropped)
        if mean is not None:
            counted = (seats.clients[index].node_id for index in current.survivors)
            self._counted.add(counted, bound.plan.round_number)
        if current.survivors or isinstance(bound.plan.run.privacy, Distributed):
            # Devices add the noise because the coordinator is not trusted; and it can know a sum
            # whose shares it asked for, whatever became of them here: replies come late.
            self.ledger = charged
        if self._registry is not None:
            self._registry.forget(
                client.node_id
                for index, client in enumerate(seats.clients)
                if index not in current.joined
            )
        return Attempt(
            bound,
            mean,
            seats.traffic + current.traffic + dropped.traffic,
            lost | current.lost,
            aborted,
            add_reasons(seats.declined, current.declined),
            add_refusals(seats.refusals, current.refusals),
            current.surplus,
            dropped,
        )

    def _tell_outcome(self, seats: Seats, current: SecureRound, dropped: Dropped) -> None:
        """Say who was there and who was not."""
        nodes = [client.node_id for client in seats.clients]
        alive = {nodes[index] for index in current.survivors} | dropped.nodes
        silent = {nodes[index] for index in current.silent} | seats.silent
        self._on_outcome(alive, silent - alive)

    def _for_cohort(self, plan: RoundPlan, clients: Sequence[Invited]) -> RoundPlan:
        """Return the plan for these clients, by index."""
        return replace(plan, clients=len(clients))

    def _uploading(self, content: RecordDict) -> RecordDict:
        """Return what a request for an upload brings with it."""
        return content

    def _release(self, bound: BoundRound, survivors: int, drawn: Drawn | None = None) -> Release:
        """Return what a sum over `survivors` costs, as a part of the noise's stream."""
        release = bound.release(survivors, drawn)
        if not isinstance(self._noise, MatrixRun):
            return release
        return replace(release, stream=self._noise.tape.stream)

    def skip_round(self, invited: int, reason: str) -> None:
        """Count and report a round that is not held: nothing is sent or released.

        Args:
            invited: How many clients it would have had.
            reason: Why not.
        """
        self._round += 1
        if self._on_round is not None:
            epsilon = self.ledger.epsilon if self.plan.private else inf
            self._on_round(skipped(self._round, invited, reason, epsilon))

    def _asked(self, batch: list[Message]) -> tuple[Invited, ...]:
        """Return the addressed nodes in the order of their labels."""
        invited = {
            message.metadata.dst_node_id: Invited(
                message.metadata.dst_node_id,
                self._labels.get(message.metadata.dst_node_id, str(message.metadata.dst_node_id)),
            )
            for message in batch
        }
        return tuple(sorted(invited.values(), key=lambda client: (len(client.label), client.label)))

    def _report(
        self,
        attempt: Attempt,
        *,
        asked: int,
        aborted: tuple[str, ...],
        traffic: Traffic,
        dropped: Dropped,
    ) -> None:
        if self._on_round is not None:
            epsilon = self.ledger.epsilon if self.plan.private else inf
            self._on_round(
                attempt.report(
                    asked=asked, aborted=aborted, traffic=traffic, dropped=dropped, epsilon=epsilon
                )
            )

    def _reply(
        self,
        request: Message,
        name: str,
        arrays: Mapping[str, npt.NDArray[Any]],
        mean: MeanUpdate,
    ) -> Message:
        """Return the mean as the reply that one large client would have sent."""
        layout = Layout.of(arrays)
        trained = layout.unflatten(layout.flatten(arrays) + mean.delta)
        content = RecordDict(
            {
                name: to_record(trained),
                "metrics": MetricRecord({**nested(mean.metrics), self._weight_key: mean.weight}),
            }
        )
        return Message(content, reply_to=request)
