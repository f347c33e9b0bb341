"""Error feedback through the real grid: whoever is lost in a round loses no update."""

import pickle
from collections import defaultdict
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from clients import DevicePolicy
from clients.feedback import Feedback
from fedcore.codec import Clip, Dense, RandomK, Sketch, TopK
from fedcore.crypto import ReplayedEntropy
from fedcore.engine import Fault, FaultyGrid, InProcessGrid, to_arrays, to_record
from fedcore.pipeline import RECORD, NoSecAgg, SeedHelper
from fedcore.telemetry import RoundReport
from strategies import SecureGrid
from strategies.helper_client import InProcessHelper
from tests.fedcore.pipeline.rounds import round_plan
from tests.strategies.federation import ROOMY, SIGNED, client_app, node_of, stage_of

CLIENTS, DIM, LAST = 6, 12, 9
MODEL = {"w": np.zeros((3, 4), np.float32)}
HELPER_KEY = InProcessHelper(ReplayedEntropy(b"helper")).public_key.hex()
FEEDBACK = replace(
    ROOMY, error_feedback=True, sparsify=RandomK(0.4), clip=Clip(1.5), dropout=0.34, attempts=2
)
CLEAR = replace(FEEDBACK, secagg=NoSecAgg())
PLANS = {
    "masked": FEEDBACK,
    "signed": replace(FEEDBACK, secagg=SIGNED.secagg, sparsify=Sketch(0.5)),
    "helped": replace(FEEDBACK, secagg=SeedHelper(HELPER_KEY)),
    "clear": CLEAR,
    "compressed": replace(CLEAR, sparsify=Dense(), quantize=TopK(0.3, 8)),
}
OF_EVERY_KIND = pytest.mark.parametrize("kind", PLANS)


def delta_of(client: int, number: int) -> np.ndarray:
    """What a client would train in a round, whatever the model is."""
    rng = np.random.default_rng(1000 * client + number)
    return rng.normal(size=(3, 4)).astype(np.float32)


class Federation:
    """Devices that are restarted before every message, and the sum of all means."""

    def __init__(self, kind, folder=None, **options):
        self.plan, self.options = PLANS[kind], options
        self.nodes = [{}] * CLIENTS
        if folder is not None:
            self.nodes = [{"feedback": str(folder / str(client))} for client in range(CLIENTS)]
        self.contexts, self.trained = {}, defaultdict(dict)
        self.reports: list[RoundReport] = []
        self.arrived, self.told = np.zeros(DIM), defaultdict(list)

    def restarted(self, message, context, call_next):
        """A mod by which nothing survives but the Context, as bytes."""
        if stage_of(message) == "upload":
            self.told[context.node_config["partition-id"]].append(
                message.content[RECORD]["counted"]
            )
        copied = pickle.loads(pickle.dumps(context))
        if "feedback" in context.node_config and message.content[RECORD]["plan"]:
            copied.state = RecordDict()  # with a file of its own, it survives a SuperNode's end
        try:
            return call_next(message, copied)
        finally:
            context.state = copied.state
            self.contexts[context.node_config["partition-id"]] = context

    def train(self, message, client):
        number = message.content["config"]["server-round"]
        share = (100 + client) / 1024
        self.trained[client][number] = share * delta_of(client, number).ravel()
        metrics = MetricRecord({"num-examples": 100 + client})
        model = to_arrays(message.content["arrays"])["w"] + delta_of(client, number)
        return RecordDict({"arrays": to_record({"w": model}), "metrics": metrics})

    def play(self, script, takes_over_in=None):
        """Run rounds on a grid that loses what `script` says; return itself.

        Args:
            script: For `FaultyGrid`.
            takes_over_in: The round before which another coordinator takes over.
        """
        app = client_app(
            self.restarted, seed=1, train=self.train,
            policy=DevicePolicy(require_masks=False, helper_key=HELPER_KEY),
        )  # fmt: skip
        helper = InProcessHelper(ReplayedEntropy(b"helper"))
        with InProcessGrid(app, self.nodes, {}) as nodes:
            start = partial(
                SecureGrid, FaultyGrid(nodes, script), self.plan, on_round=self.reports.append,
                helper=helper, **self.options,
            )  # fmt: skip
            grid = start()
            for number in range(1, LAST):
                if number == takes_over_in:
                    grid = start(ledger=grid.ledger)
                for reply in grid.send_and_receive(self.messages(nodes, number)):
                    weight = reply.content["metrics"]["num-examples"]
                    mean = to_arrays(reply.content["arrays"])["w"].ravel()
                    self.arrived += mean.astype(np.float64) * weight / 1024
            self.counted = grid._counted
        return self

    def messages(self, nodes, number):
        content = RecordDict(
            {"arrays": to_record(MODEL), "config": ConfigRecord({"server-round": number})}
        )
        return [Message(content, node, "train") for node in nodes.get_node_ids()]

    def kept(self):
        """What all devices have not sent."""
        plan = round_plan(self.plan, round_number=LAST, run_id=self.run_id, clients=CLIENTS)
        total = np.zeros(DIM)
        for client, context in self.contexts.items():
            kept = Feedback(context).start(plan, self.counted.last(node_of(client)))
            total += 0 if kept is None else kept
        return total

    @property
    def run_id(self):
        return str(next(iter(self.contexts.values())).run_id)

    def assert_nothing_is_lost_or_counted_twice(self):
        expected = sum(sum(rounds.values()) for rounds in self.trained.values())
        np.testing.assert_allclose(self.arrived + self.kept(), expected, atol=3e-4)


def losing(*losses):
    """Lose (client, round, attempts or None for all, stage, fault), each as often as it comes."""
    seen = defaultdict(int)

    def script(message):
        if not message.has_content() or RECORD not in message.content.config_records:
            return None
        fields = message.content[RECORD]
        client, key = message.metadata.dst_node_id - 1000, (fields["round"], fields["stage"])
        seen[client, key] += 1
        for victim, number, attempts, stage, fault in losses:
            hit = (victim, (number, stage)) == (client, key)
            if hit and (attempts is None or seen[client, key] in attempts):
                return fault
        return None

    return script


@OF_EVERY_KIND
@pytest.mark.parametrize("fault", list(Fault))
def test_devices_lost_in_some_rounds_lose_no_update(kind, fault):
    losses = [(client, number, None, "upload", fault)
              for client, number in [(0, 1), (1, 2), (0, 3), (0, 4), (3, 4), (2, 8)]]  # fmt: skip
    played = Federation(kind, retry_after=()).play(losing(*losses))
    assert [report.survivors for report in played.reports] == [5, 5, 5, 4, 6, 6, 6, 5]
    assert played.told[0][-1] == 7
    if fault is Fault.LOST_REPLY:
        assert played.told[0] == [0, 0, 2, 2, 2, 5, 6, 7]
    played.assert_nothing_is_lost_or_counted_twice()


@OF_EVERY_KIND
def test_a_reply_that_arrives_at_the_second_try_counts_once(kind):
    losses = [(client, number, (1,), "upload", Fault.LOST_REPLY)
              for client in range(CLIENTS) for number in (2, 3)]  # fmt: skip
    played = Federation(kind).play(losing(*losses))
    smooth = Federation(kind).play(losing())
    assert [report.survivors for report in played.reports] == [CLIENTS] * (LAST - 1)
    np.testing.assert_array_equal(played.arrived, smooth.arrived)
    np.testing.assert_array_equal(played.kept(), smooth.kept())
    played.assert_nothing_is_lost_or_counted_twice()


@OF_EVERY_KIND
def test_a_round_given_up_once_or_for_good_loses_no_update(kind):
    once = [(client, 2, (1,), "upload", Fault.LOST_REPLY) for client in range(3)]
    for_good = [(client, 4, None, "upload", Fault.LOST_REPLY) for client in range(3)]
    played = Federation(kind, retry_after=()).play(losing(*once, *for_good))
    assert [report.attempts for report in played.reports] == [1, 2, 1, 2, 1, 1, 1, 1]
    assert [report.survivors for report in played.reports] == [6, 6, 6, 0, 6, 6, 6, 6]
    assert played.told[0] == [0, 1, 1, 2, 3, 3, 3, 5, 6, 7]
    played.assert_nothing_is_lost_or_counted_twice()


@OF_EVERY_KIND
def test_devices_that_lose_all_but_their_disk_between_rounds_lose_no_update(kind, tmp_path):
    losses = [(0, 2, None, "upload", Fault.LOST_REPLY), (3, 4, None, "upload", Fault.DROPPED)]
    played = Federation(kind, tmp_path, retry_after=()).play(losing(*losses))
    beside = Federation(kind, retry_after=()).play(losing(*losses))
    np.testing.assert_array_equal(played.arrived, beside.arrived)
    np.testing.assert_array_equal(played.kept(), beside.kept())
    played.assert_nothing_is_lost_or_counted_twice()


@pytest.mark.parametrize("kind", ["masked", "signed"])
def test_a_device_that_uploads_and_then_is_gone_is_in_the_sum(kind):
    stage = "endorse" if kind == "signed" else "reveal"
    played = Federation(kind, retry_after=()).play(
        losing((1, 3, None, stage, Fault.DROPPED), (2, 5, None, stage, Fault.LOST_REPLY))
    )
    assert [report.survivors for report in played.reports] == [CLIENTS] * (LAST - 1)
    played.assert_nothing_is_lost_or_counted_twice()


@OF_EVERY_KIND
def test_who_is_gone_in_the_attempt_that_counts_keeps_what_it_trained_for_the_first(kind):
    first = [(client, 3, (1,), "upload", Fault.LOST_REPLY) for client in range(3)]
    second = (4, 3, (2,), "upload", Fault.DROPPED)
    played = Federation(kind, retry_after=()).play(losing(*first, second))
    assert [report.survivors for report in played.reports] == [6, 6, 5, 6, 6, 6, 6, 6]
    assert played.told[4] == [0, 1, 2, 2, 4, 5, 6, 7]
    played.assert_nothing_is_lost_or_counted_twice()


@OF_EVERY_KIND
def test_a_coordinator_that_takes_over_gives_nothing_a_second_time(kind):
    """It knows from the ledger that there were rounds, and not who was in them."""
    lost = (1, 5, None, "upload", Fault.LOST_REPLY)
    played = Federation(kind, retry_after=()).play(losing(lost), takes_over_in=4)
    assert played.told[0] == list(range(8))
    assert played.told[1] == [0, 1, 2, 3, 4, 4, 6, 7]
    played.assert_nothing_is_lost_or_counted_twice()


def test_without_error_feedback_devices_are_told_nothing():
    federation = Federation("clear")
    federation.plan = replace(CLEAR, error_feedback=False)
    federation.play(losing())
    assert federation.told[0] == [0] * (LAST - 1)
