from math import inf

from flwr.app import Message, RecordDict

from fedcore.engine import FaultyGrid, InProcessGrid
from strategies.plain_grid import PlainGrid
from strategies.wire_bytes import array_bytes, content_bytes
from tests.strategies.federation import RecordingGrid, initial, losing, node_of, plain_app


def exchanged(labels, *, kind="train", wrap=lambda grid: grid, clients=4):
    reports = []
    with InProcessGrid(plain_app(), [{}] * clients, {}) as nodes:
        wire = RecordingGrid(nodes)
        grid = PlainGrid(wrap(wire), labels, reports.append)
        content = RecordDict({"arrays": initial()})
        messages = [Message(content, node, kind) for node in reversed(nodes.get_node_ids())]
        replies = list(grid.send_and_receive(messages, timeout=60))
    return replies, reports, wire


def test_replies_come_in_the_order_of_the_labels_whatever_the_engine_does():
    labels = {node_of(n): name for n, name in enumerate(["10", "9", "b", "a"])}
    replies, _, _ = exchanged(labels)
    assert [labels[reply.metadata.src_node_id] for reply in replies] == ["9", "a", "b", "10"]


def test_a_report_counts_what_crossed_the_wire():
    labels = {node_of(n): str(n) for n in range(4)}
    _, (report,), wire = exchanged(labels)
    traffic = report.traffic
    assert traffic.down_total == sum(content_bytes(message.content) for message in wire.sent)
    assert traffic.up_total == sum(content_bytes(message.content) for message in wire.received)
    assert traffic.up_payload == sum(array_bytes(message.content) for message in wire.received)
    assert (traffic.uploads, traffic.downloads) == (4, 4)
    assert traffic.up_payload >= 4 * 43 * 4
    assert (report.invited, report.survivors, report.lost) == (4, 4, {})
    assert report.epsilon == inf


def test_lost_clients_are_counted():
    def script(message):
        return losing([1, 2], "")(message)

    labels = {node_of(n): str(n) for n in range(4)}
    replies, (report,), _ = exchanged(labels, wrap=lambda grid: FaultyGrid(grid, script))
    assert sum(reply.has_error() for reply in replies) == 2
    assert (report.survivors, report.lost, report.traffic.uploads) == (2, {"upload": 2}, 2)


def test_only_training_is_reported_and_rounds_are_counted():
    labels = {node_of(n): str(n) for n in range(2)}
    _, reports, _ = exchanged(labels, kind="evaluate", clients=2)
    assert reports == []
