"""Replies that get lost after the device has worked: it is asked again, and nothing changes."""

from collections import Counter
from dataclasses import replace

import pytest
from flwr.app import Message, RecordDict
from flwr.common.serde import recorddict_to_proto

from clients.client_app import build_client_app, replayed_entropy
from clients.simulated import simulated_identities
from fedcore.crypto import ReplayedEntropy
from fedcore.engine import (
    DroppingGrid,
    DropScript,
    Fault,
    FaultyGrid,
    InProcessGrid,
    VirtualClock,
    WrappedGrid,
    run_in_process,
    run_on_ray,
)
from fedcore.engine.flower_private import ErrorCode
from fedcore.job import check
from fedcore.pipeline import NoSecAgg, SeedHelper
from strategies.exchange import POLL_SECONDS, RETRY_WITH_PATIENCE, exchange
from strategies.helper_client import InProcessHelper
from strategies.server_app import build_server_app
from strategies.surroundings import describe_by
from tests.strategies.federation import (
    OPEN,
    ROOMY,
    SIGNED,
    SilentGrid,
    client_app,
    losing,
    node_of,
    plain_app,
    play,
    pull,
    stage_of,
    stages_of,
)
from tests.strategies.jobs import JOB, Recorder, run_job

HELPER_KEY = InProcessHelper(ReplayedEntropy(b"helper")).public_key.hex()
HELPED = replace(ROOMY, secagg=SeedHelper(HELPER_KEY))
CLEAR = replace(ROOMY, secagg=NoSecAgg())
PLANS = {"unsigned": ROOMY, "signed": SIGNED, "helped": HELPED, "clear": CLEAR}
AT_EVERY_STAGE = pytest.mark.parametrize(
    ("kind", "stage"),
    [
        (kind, stage)
        for kind, plan in PLANS.items()
        for stage in (("upload",) if kind in {"helped", "clear"} else stages_of(plan))
    ],
)
OF_EVERY_KIND = pytest.mark.parametrize("kind", PLANS)


def round_of(kind, wrap=lambda grid: grid, calls=None, **options):
    """One round of ten clients whose calls of the train function are counted."""

    def counting(message, client):
        if calls is not None:
            calls[client] += 1
        return pull(message, client)

    policy = replace(OPEN, helper_key=HELPER_KEY)
    app = client_app(seed=1, policy=policy, train=counting)
    helper = InProcessHelper(ReplayedEntropy(b"helper")) if kind == "helped" else None
    return play(app, PLANS[kind], wrap=wrap, helper=helper, **options)


def once(script):
    """The script, for the first message that it hits of each node and stage."""
    hit = set()

    def at_first(message):
        key = (message.metadata.dst_node_id, stage_of(message))
        fault = None if key in hit else script(message)
        if fault is not None:
            hit.add(key)
        return fault

    return at_first


def on_the_wire(reply):
    return recorddict_to_proto(reply.content).SerializeToString(deterministic=True)


def assert_same_sum(one, other):
    for name, array in one.arrays.items():
        assert array.tobytes() == other.arrays[name].tobytes(), name
    assert one.grid.ledger == other.grid.ledger


@AT_EVERY_STAGE
def test_a_reply_that_got_lost_is_sent_again_and_the_sum_is_the_same_bit_for_bit(kind, stage):
    calls = Counter()
    script = once(losing(range(10), stage, Fault.LOST_REPLY))
    rough = round_of(kind, lambda grid: FaultyGrid(grid, script), calls)
    assert_same_sum(rough, round_of(kind))
    assert (rough.reports[0].attempts, rough.reports[0].lost) == (1, {})
    assert calls == dict.fromkeys(range(10), 1)


@OF_EVERY_KIND
def test_every_first_reply_may_get_lost(kind):
    calls = Counter()
    script = once(lambda message: Fault.LOST_REPLY if stage_of(message) else None)
    rough = round_of(kind, lambda grid: FaultyGrid(grid, script), calls)
    assert_same_sum(rough, round_of(kind))
    assert calls == dict.fromkeys(range(10), 1)


@AT_EVERY_STAGE
def test_a_message_that_got_lost_is_sent_again(kind, stage):
    script = once(losing(range(10), stage, Fault.DROPPED))
    rough = round_of(kind, lambda grid: FaultyGrid(grid, script))
    assert_same_sum(rough, round_of(kind))


@OF_EVERY_KIND
def test_without_retries_a_lost_reply_is_a_lost_client(kind):
    script = once(losing([3], "upload", Fault.LOST_REPLY))
    rough = round_of(kind, lambda grid: FaultyGrid(grid, script), retry_after=())
    assert rough.reports[0].lost == {"upload": 1}
    assert rough.reports[0].survivors == 9


class AskingTwice(WrappedGrid):
    """Asks every device of a stage the same twice, and hands out the second reply."""

    def __init__(self, grid, stage):
        super().__init__(grid)
        self.stage, self.pairs, self._first = stage, [], {}

    def push_messages(self, messages):
        batch = list(messages)
        ids = list(super().push_messages(batch))
        again = []
        for key, message in zip(ids, batch, strict=True):
            if stage_of(message) == self.stage:
                (first,) = super().pull_messages([key])
                again.append(self._twin(message, first))
        super().push_messages(again)
        return [message.metadata.message_id for message in batch]

    def _twin(self, message, first):
        asked = message.metadata
        twin = Message(message.content, asked.dst_node_id, asked.message_type, group_id="again")
        self._first[asked.message_id] = (twin, first)
        return twin

    def pull_messages(self, message_ids):
        for key in list(message_ids):
            if key not in self._first:
                yield from super().pull_messages([key])
                continue
            twin, first = self._first.pop(key)
            (second,) = super().pull_messages([twin.metadata.message_id])
            self.pairs.append((first, second))
            vars(second.metadata)["_reply_to_message_id"] = key
            yield second


@AT_EVERY_STAGE
def test_asked_twice_every_device_says_the_same_and_trains_once(kind, stage):
    calls, grids = Counter(), []

    def wrap(grid):
        grids.append(AskingTwice(grid, stage))
        return grids[0]

    played = round_of(kind, wrap, calls)
    assert len(grids[0].pairs) == 10
    assert all(on_the_wire(one) == on_the_wire(two) for one, two in grids[0].pairs)
    assert_same_sum(played, round_of(kind))
    assert calls == dict.fromkeys(range(10), 1)


class Repeating(WrappedGrid):
    """Hands out every reply twice, and the ones of earlier pulls again."""

    def __init__(self, grid):
        super().__init__(grid)
        self._old = []

    def pull_messages(self, message_ids):
        yield from self._old
        for reply in super().pull_messages(message_ids):
            self._old.append(reply)
            yield reply
            yield reply


@OF_EVERY_KIND
def test_late_and_duplicate_replies_are_counted_once(kind):
    rough, smooth = round_of(kind, Repeating), round_of(kind)
    assert_same_sum(rough, smooth)
    (report,) = rough.reports
    assert report.duplicates >= 10
    assert [replace(report, duplicates=0)] == smooth.reports


@OF_EVERY_KIND
def test_what_is_sent_again_is_counted_as_sent_and_what_got_lost_is_not_received(kind):
    script = once(losing([3], "upload", Fault.LOST_REPLY))
    rough = round_of(kind, lambda grid: FaultyGrid(grid, script)).reports[0].traffic
    smooth = round_of(kind).reports[0].traffic
    assert (rough.up_payload, rough.up_total) == (smooth.up_payload, smooth.up_total)
    assert (rough.uploads, rough.downloads) == (smooth.uploads, smooth.downloads + 1)
    assert rough.down_payload == smooth.down_payload * 11 // 10


@OF_EVERY_KIND
def test_an_error_of_the_app_is_final(kind):
    calls = Counter()

    def broken(message, client):
        calls[client] += 1
        if client == 3:
            msg = "the sensor is wet"
            raise OSError(msg)
        return pull(message, client)

    policy = replace(OPEN, helper_key=HELPER_KEY)
    helper = InProcessHelper(ReplayedEntropy(b"helper")) if kind == "helped" else None
    played = play(client_app(seed=1, policy=policy, train=broken), PLANS[kind], helper=helper)
    assert played.reports[0].lost == {"upload": 1}
    assert calls == dict.fromkeys(range(10), 1)


def test_a_device_that_is_gone_is_asked_once_more_and_costs_no_time():
    clock, asked = VirtualClock(), []
    gone = losing([3], "upload")

    def script(message):
        asked.append(stage_of(message))
        return gone(message)

    played = round_of("unsigned", lambda grid: FaultyGrid(grid, script), clock=clock)
    assert played.reports[0].lost == {"upload": 1}
    assert asked.count("upload") == 11
    assert clock.now() == 0.0


# One exchange


def questions(grid):
    return {n: Message(RecordDict(), n, "evaluate") for n in grid.get_node_ids()}


def test_a_device_may_come_back_as_long_as_there_is_patience():
    clock = VirtualClock()

    def script(message):
        return Fault.DROPPED if clock.now() < 12 and message.metadata.dst_node_id == 1001 else None

    with InProcessGrid(plain_app(), [{}] * 3, {}) as nodes:
        grid = FaultyGrid(nodes, script)
        replies = exchange(
            grid, questions(grid), seconds=600, clock=clock, retry_after=RETRY_WITH_PATIENCE
        )
        assert [(key, reply.has_content()) for key, reply in replies] == [
            (1000, True), (1002, True), (1001, True),
        ]  # fmt: skip
    assert clock.now() == pytest.approx(20.0, abs=4 * POLL_SECONDS)


def test_the_last_error_is_handed_over_when_patience_ends():
    clock, sent = VirtualClock(), []
    with InProcessGrid(plain_app(), [{}], {}) as nodes:
        grid = FaultyGrid(nodes, lambda _: Fault.DROPPED)
        asked = questions(grid)
        ((key, reply),) = exchange(
            grid, asked, seconds=600, clock=clock, retry_after=(0.0, 5.0), sent=sent.append
        )
    assert (key, reply.error.code) == (1000, ErrorCode.NODE_UNAVAILABLE)
    assert clock.now() == pytest.approx(5.0, abs=2 * POLL_SECONDS)
    assert len(sent) == 3
    assert [message.content for message in sent] == [asked[1000].content] * 3
    assert len({message.metadata.message_id for message in sent}) == 3


def test_no_retry_is_begun_or_waited_for_beyond_the_deadline():
    clock, sent = VirtualClock(), []
    with InProcessGrid(plain_app(), [{}], {}) as nodes:
        grid = FaultyGrid(nodes, lambda _: Fault.DROPPED)
        ((_, reply),) = exchange(
            grid, questions(grid), seconds=9.0, clock=clock, retry_after=(4.0, 60.0),
            sent=sent.append,
        )  # fmt: skip
    assert reply.has_error()
    assert clock.now() == pytest.approx(4.0, abs=2 * POLL_SECONDS)
    # What is sent again lives as long as the stage.
    assert [message.metadata.ttl for message in sent][1] == pytest.approx(5.0, abs=POLL_SECONDS)


def test_a_device_that_is_silent_is_not_asked_again():
    clock, sent = VirtualClock(), []
    with InProcessGrid(plain_app(), [{}] * 2, {}) as nodes:
        grid = SilentGrid(nodes, lambda message: message.metadata.dst_node_id == node_of(1))
        replies = exchange(
            grid, questions(grid), seconds=9.0, clock=clock, retry_after=(0.0,), sent=sent.append
        )
        assert [key for key, _ in replies] == [1000]
    assert len(sent) == 2
    assert clock.now() == pytest.approx(9.0, abs=2 * POLL_SECONDS)


@pytest.mark.parametrize(
    ("code", "again"),
    [
        (ErrorCode.MESSAGE_UNAVAILABLE, True),
        (ErrorCode.REPLY_MESSAGE_UNAVAILABLE, True),
        (ErrorCode.NODE_UNAVAILABLE, True),
        (ErrorCode.UNKNOWN, False),
        (ErrorCode.LOAD_CLIENT_APP_EXCEPTION, False),
        (ErrorCode.CLIENT_APP_RAISED_EXCEPTION, False),
        (ErrorCode.MOD_FAILED_PRECONDITION, False),
        (ErrorCode.INVALID_FAB, False),
        (ErrorCode.CLIENT_APP_CRASHED, False),
    ],
)
def test_only_what_got_lost_on_the_way_is_asked_for_again(code, again):
    class Failing(WrappedGrid):
        def pull_messages(self, message_ids):
            for reply in super().pull_messages(message_ids):
                if reply.has_error():
                    vars(reply.error)["_code"] = code
                yield reply

    clock, sent = VirtualClock(), []
    with InProcessGrid(plain_app(), [{}], {}) as nodes:
        grid = Failing(FaultyGrid(nodes, once(lambda _: Fault.DROPPED)))
        ((_, reply),) = exchange(
            grid, questions(grid), seconds=9.0, clock=clock, retry_after=(0.0,), sent=sent.append
        )
    assert reply.has_content() == again
    assert len(sent) == 1 + again


# Whole runs, on every engine


LOSSY = DropScript(
    seed=3, per_round=4, stages=("advertise", "share", "upload", "reveal"), lose="reply"
)


def test_a_drop_script_that_loses_replies_loses_no_client():
    labels = {node_of(client): str(client) for client in range(10)}

    def lossy(grid):
        return DroppingGrid(grid, LOSSY, describe_by(labels))

    calls = Counter()
    rough = round_of("unsigned", lossy, calls, rounds=3, labels=labels)
    smooth = round_of("unsigned", rounds=3, labels=labels)
    assert_same_sum(rough, smooth)
    assert [report.lost for report in rough.reports] == [{}] * 3
    assert sum(calls.values()) == 30
    assert all(
        lost.traffic.down_total > kept.traffic.down_total
        for lost, kept in zip(rough.reports, smooth.reports, strict=True)
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_a_whole_run_is_the_same_with_replies_that_get_lost(workers):
    rough, smooth = run_job(faults=LOSSY, workers=workers), run_job()
    assert rough.model == smooth.model
    assert [report.survivors for report in rough.reports] == [JOB.clients_per_round] * JOB.rounds


def test_a_server_app_without_retries_loses_the_clients_whose_replies_get_lost():
    faults = DropScript(stages=("upload",), lose="reply")
    job, recorder = replace(JOB, rounds=1, faults=faults), Recorder()
    run_in_process(
        build_server_app(recorder, check(job), retry_after=()),
        build_client_app(OPEN, entropy=replayed_entropy(0)),
        num_nodes=job.clients,
        run_config={"job": job.to_json()},
    )
    assert [report.lost for report in recorder.reports] == [{"upload": 1}]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_whole_run_on_ray_is_the_same_with_replies_that_get_lost():
    job = replace(JOB, faults=LOSSY)
    recorder = Recorder()
    run_on_ray(
        build_server_app(recorder, check(job)),
        build_client_app(OPEN, entropy=replayed_entropy(0), identity=simulated_identities(0)),
        job.clients,
        {"job": job.to_json()},
        cpus_per_client=1,
    )
    assert recorder.model == run_job().model
