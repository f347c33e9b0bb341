"""Devices get changes, and train from the coordinator's broadcast model bit for bit."""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord

from fedcore.codec import Delta, Full
from fedcore.engine import DroppingGrid, DropScript, WrappedGrid, to_arrays
from fedcore.errors import PeerProtocolError
from fedcore.pipeline import RECORD, NoSecAgg, RunPlan
from fedcore.pipeline.download import DOWNLOAD, LACKING, MODEL, UPDATE, Download
from fedcore.vectors import Entry, Layout
from tests.strategies.federation import OPEN, ROOMY, client_app, play, pull

DELTA = replace(ROOMY, downlink=Delta(8))
CLEAR = replace(DELTA, secagg=NoSecAgg(), dropout=0.3)


@dataclass
class Seen:
    """What the train functions of all devices were given, by client and in order."""

    models: dict[int, list[dict[str, np.ndarray]]] = field(default_factory=dict)

    def train(self, message, client):
        (record,) = message.content.array_records.values()
        self.models.setdefault(client, []).append(to_arrays(record))
        return pull(message, client)

    def bytes_of(self, client):
        return [b"".join(a.tobytes() for a in model.values()) for model in self.models[client]]


class Sleepers(WrappedGrid):
    """Shows the last node in some rounds only."""

    def __init__(self, grid, awake):
        super().__init__(grid)
        self._awake = awake
        self.round = 0

    def get_node_ids(self):
        nodes = sorted(super().get_node_ids())
        return nodes if self.round in self._awake else nodes[:-1]

    def push_messages(self, messages):
        batch = list(messages)
        self.round += any(DOWNLOAD in message.content for message in batch)
        return super().push_messages(batch)


def downloads(played):
    return [message for message in played.wire.sent if DOWNLOAD in message.content]


def sizes(played):
    return [len(m.content[MODEL][UPDATE].data) for m in downloads(played)]


@pytest.mark.parametrize("plan", [DELTA, CLEAR], ids=["masks", "clear"])
def test_all_devices_train_from_one_model_which_is_near_the_strategys(plan):
    seen = Seen()
    app = client_app(seed=1, train=seen.train, policy=OPEN)
    played = play(app, plan, rounds=5)
    exact = play(client_app(seed=1, policy=OPEN), replace(plan, downlink=Full()), rounds=5)
    for number in range(5):
        assert len({seen.bytes_of(client)[number] for client in range(10)}) == 1
    for name, array in played.arrays.items():
        np.testing.assert_allclose(array, exact.arrays[name], atol=0.03)


def test_the_model_itself_does_not_travel():
    played = play(client_app(seed=1), DELTA, rounds=3)
    assert len(downloads(played)) == 30
    assert not any("arrays" in message.content for message in downloads(played))
    first, later = sizes(played)[:10], sizes(played)[10:]
    assert max(later) <= max(first) < 4 * 43


def test_traffic_counts_the_model_as_it_travelled():
    played = play(client_app(seed=1), DELTA, rounds=2)
    last = played.reports[-1].traffic
    assert last.downloads == 10
    assert last.down_payload == sum(sizes(played)[10:])


def test_a_device_that_slept_gets_what_it_missed():
    seen = Seen()
    app = client_app(seed=1, train=seen.train)
    played = play(app, DELTA, rounds=51, wrap=lambda grid: Sleepers(grid, (0, 50)))
    assert len(seen.models[9]) == 2
    assert seen.bytes_of(9)[-1] == seen.bytes_of(0)[-1]
    by_node = {}
    for message in downloads(played):
        by_node.setdefault(message.metadata.dst_node_id, []).append(message)
    sleeper = min(by_node.values(), key=len)
    others = max(by_node.values(), key=len)
    missed = sum(len(m.content[MODEL][UPDATE].data) for m in others[1:])
    assert len(sleeper[-1].content[MODEL][UPDATE].data) <= min(missed + 4 * 51, 4 * 43 * 2)


@pytest.mark.parametrize("plan", [DELTA, CLEAR], ids=["masks", "clear"])
@pytest.mark.parametrize("damage", ["lost", "older", "flipped", "misshapen"])
def test_a_device_whose_model_was_lost_or_damaged_asks_for_all_of_it(plan, damage):
    seen, state = Seen(), {}

    def harm(message, context, call_next):
        if DOWNLOAD not in message.content or context.node_config["partition-id"] != 4:
            return call_next(message, context)
        kept = context.state.get("fedcore.global-model")
        number = state["number"] = state.get("number", 0) + 1
        if number == 2 and kept is not None:
            state["first"] = kept
        if number == 3:
            model = kept["model"].numpy().copy()
            if damage == "lost":
                del context.state["fedcore.global-model"]
            if damage == "older":
                context.state["fedcore.global-model"] = state["first"]
            if damage == "flipped":
                model.view(np.uint32)[7] ^= 1 << 20
                context.state["fedcore.global-model"] = _record(model)
            if damage == "misshapen":
                context.state["fedcore.global-model"] = _record(model[:-1])
        return call_next(message, context)

    app = client_app(harm, seed=1, train=seen.train, policy=OPEN)
    played = play(app, plan, rounds=4)
    assert [report.survivors for report in played.reports] == [10] * 4
    assert seen.bytes_of(4) == seen.bytes_of(0)
    asked = [m for m in played.wire.received if LACKING in m.content.get(RECORD, {})]
    assert len(asked) == 1
    assert played.reports[2].traffic.uploads == 10
    assert len(downloads(played)) == 41


def _record(model):
    return ArrayRecord({"model": Array(model)})


def test_a_device_that_never_can_make_the_model_is_left_out():
    def refuse(message, context, call_next):
        if DOWNLOAD in message.content and context.node_config["partition-id"] == 4:
            data = message.content[MODEL][UPDATE].data
            message.content[MODEL][UPDATE].data = data[:-1] + bytes([data[-1] ^ 1])
        return call_next(message, context)

    played = play(client_app(refuse, seed=1), DELTA, rounds=2)
    assert [report.survivors for report in played.reports] == [9, 9]


def describe(message):
    fields = message.content[RECORD]
    return fields["round"], fields["stage"], fields["label"]


def test_a_dropped_upload_does_not_change_what_a_device_is_thought_to_have():
    seen = Seen()
    script = DropScript(per_round=1, stages=("upload",), seed=1)
    app = client_app(seed=1, train=seen.train)
    played = play(app, DELTA, rounds=6, wrap=lambda grid: DroppingGrid(grid, script, describe))
    assert [report.survivors for report in played.reports] == [9] * 6
    models = [seen.bytes_of(client)[-1] for client in range(10) if len(seen.models[client]) == 6]
    assert len(set(models)) == 1


def test_masked_and_clear_rounds_give_the_same_model():
    masked = play(client_app(seed=1), DELTA, rounds=4)
    clear = play(client_app(seed=1, policy=OPEN), CLEAR, rounds=4)
    for name, array in masked.arrays.items():
        assert array.tobytes() == clear.arrays[name].tobytes()


LAYOUT = Layout((Entry("w", (2, 3), "float32"), Entry("n", (), "int64")))


def test_a_download_survives_the_wire():
    download = Download("arrays", LAYOUT, bytes(32), b"data")
    assert Download.from_fields(download.to_fields(), b"data") == download


@pytest.mark.parametrize(
    "layout",
    ["", "{}", "[]", "[1]", '[["w"]]', '[["w",[2],"object"]]', '[["w",[-1],"float32"]]',
     '[["w",[true],"float32"]]', '[["w",2,"float32"]]', "[" * 10_000,
     '[["w",[9999999999],"int8"]]'],
)  # fmt: skip
def test_a_malformed_layout_is_refused(layout):
    fields = {"name": "arrays", "layout": layout, "version": bytes(32)}
    with pytest.raises(PeerProtocolError, match=r"layout must|arrays"):
        Download.from_fields(fields, b"")


def test_a_download_that_replaces_another_record_is_refused():
    def twice(message, context, call_next):
        if DOWNLOAD in message.content:
            message.content[DOWNLOAD]["name"] = RECORD
        return call_next(message, context)

    played = play(client_app(twice, seed=1), DELTA)
    assert played.reports[0].survivors == 0


def test_messages_without_a_download_are_answered_as_ever():
    played = play(client_app(seed=1), RunPlan())
    assert played.reports[0].survivors == 10
    assert not downloads(played)
