"""Flower's own grid, on a client that answers as a SuperLink does, with devices that are slow."""

import threading
import time

import httpx
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedResponse, PullObjectResponse
from flwr.proto.runtime_pb2 import PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.superlink.grid.http_grid import HttpGrid

from fedcore.engine import InProcessGrid, downloads, unblocked, unblocked_for_good
from fedcore.engine.downloads import AT_ONCE, UnblockedGrid
from fedcore.engine.flower_private import ErrorCode, Identity, empty_run, set_message_id

RUN = 7


@pytest.fixture(autouse=True)
def identity():
    with Identity(1, RUN, 1).assumed():
        yield


class SuperLink:
    """Answers a grid of Flower's; replies are announced when they are given.

    Attributes:
        missing: Ids of messages whose replies are announced, and have not been uploaded.
    """

    def __init__(self):
        self.objects, self.announced, self.owner = {}, {}, {}
        self.missing, self.spoiled, self.away = set(), set(), set()
        self.late = {}
        self.confirmed, self.asked = [], []

    def announce(self, asked, value):
        reply = Message(RecordDict({"r": ConfigRecord({"value": value})}), reply_to=asked)
        set_message_id(reply, reply.object_id)
        tree = get_object_tree(reply)
        for key, part in get_all_nested_objects(reply).items():
            self.objects[key] = part.deflate()
            self.owner[key] = asked.metadata.message_id
        proto = message_to_proto(remove_content_from_message(reply))
        self.announced[asked.metadata.message_id] = (proto, tree)

    def PullMessages(self, request):  # noqa: N802
        self.asked.append(set(request.message_ids))
        found = [self.announced.pop(key) for key in request.message_ids if key in self.announced]
        return PullAppMessagesResponse(
            messages_list=[one for one, _ in found],
            message_object_trees=[tree for _, tree in found],
        )

    def PullObject(self, request):  # noqa: N802
        owner = self.owner[request.object_id]
        if owner in self.late:
            self.late[owner] -= 1
            self.missing -= {owner} if self.late[owner] == 0 else set()
        if owner in self.away:
            raise httpx.ConnectError("away")
        content = b"" if owner in self.missing else self.objects[request.object_id]
        if owner in self.spoiled:
            content = content[:-2] + b"\xff\xff"
        return PullObjectResponse(
            object_found=True, object_available=owner not in self.missing, object_content=content
        )

    def ConfirmMessageReceived(self, request):  # noqa: N802
        self.confirmed.append(request.message_object_id)
        return ConfirmMessageReceivedResponse()

    def close(self):
        pass


@pytest.fixture
def link():
    return SuperLink()


@pytest.fixture
def clock():
    """The grid's time, in a list of one."""
    return [0.0]


@pytest.fixture
def grid(link, clock):
    flowers = HttpGrid(token="t")
    flowers.set_run(empty_run(RUN))
    flowers._client = link
    found = UnblockedGrid(flowers, now=lambda: clock[0] or time.monotonic())
    yield found
    found.close()


def asked(number):
    message = Message(RecordDict({"n": ConfigRecord({"n": number})}), number + 10, "train")
    set_message_id(message, f"{number:064x}")
    return message


def value(reply):
    return reply.content["r"]["value"]


def ids(messages):
    return {message.metadata.message_id for message in messages}


def pull_all(grid, wanted, seconds=10.0):
    """Replies by the id that they answer, until all are there."""
    found, tries = {}, 0
    while set(wanted) - found.keys() and tries < seconds * 20:
        for reply in grid.pull_messages(set(wanted) - found.keys()):
            found[reply.metadata.reply_to_message_id] = reply
        tries += 1
        threading.Event().wait(0.05)
    return found


def test_only_a_grid_over_a_network_needs_it(link, grid):
    assert isinstance(unblocked_for_good(HttpGrid(token="t")), UnblockedGrid)
    assert unblocked_for_good(grid) is grid
    with InProcessGrid(lambda *_: None, [{}], {}) as other:
        assert unblocked_for_good(other) is other


def test_what_is_announced_and_uploaded_is_returned_by_the_same_call(link, grid):
    messages = [asked(number) for number in range(3)]
    for number, message in enumerate(messages[:2]):
        link.announce(message, number)
    replies = grid.pull_messages(ids(messages))
    assert sorted(map(value, replies)) == [0, 1]
    assert {r.metadata.reply_to_message_id for r in replies} == ids(messages[:2])
    assert len(link.confirmed) == 2
    assert grid.pull_messages(ids(messages[2:])) == []


def test_nobody_waits_for_a_device_that_announced_and_died(link, grid):
    dead, *others = messages = [asked(number) for number in range(4)]
    link.missing = ids([dead])
    for number, message in enumerate(messages):
        link.announce(message, number)
    replies = pull_all(grid, ids(others))
    assert sorted(map(value, replies.values())) == [1, 2, 3]
    link.missing = set()  # its link is back, and it finishes its upload
    (late,) = pull_all(grid, ids([dead])).values()
    assert value(late) == 0


def test_what_is_uploaded_just_after_its_announcement_is_there_at_once(link, grid, monkeypatch):
    message = asked(0)
    link.announce(message, 8)
    link.missing, link.late = ids([message]), dict.fromkeys(ids([message]), 5)
    monkeypatch.setattr(downloads, "PROMPT_SECONDS", 60.0)
    backoffs = []  # Flower draws the length of each; its first one is a second
    monkeypatch.setattr("random.uniform", lambda low, high: backoffs.append(high) or low)
    (reply,) = grid.pull_messages(ids([message]))
    assert value(reply) == 8
    assert not backoffs


def test_an_announced_reply_is_asked_for_once(link, grid):
    message = asked(0)
    link.missing = ids([message])
    link.announce(message, 5)
    assert [grid.pull_messages(ids([message])) for _ in range(3)] == [[], [], []]
    assert link.asked == [ids([message])]


def test_a_reply_that_cannot_be_read_is_the_error_of_its_device_alone(link, grid):
    good, bad = asked(0), asked(1)
    link.spoiled = ids([bad])
    for number, message in enumerate((good, bad)):
        link.announce(message, number)
    replies = pull_all(grid, ids([good, bad]))
    assert value(replies[good.metadata.message_id]) == 0
    error = replies[bad.metadata.message_id].error
    assert error.code == ErrorCode.UNKNOWN
    assert "cannot be read" in error.reason


def test_a_reply_that_the_superlink_cannot_give_is_lost_on_the_way(link, grid):
    message = asked(0)
    link.announce(message, 0)
    link.away = ids([message])
    (reply,) = pull_all(grid, ids([message])).values()
    assert reply.error.code == ErrorCode.MESSAGE_UNAVAILABLE


def test_no_more_are_asked_for_while_many_are_on_their_way_unless_those_stalled(
    link, grid, clock, monkeypatch
):
    clock[0] = 1.0
    monkeypatch.setattr(downloads, "PROMPT_SECONDS", 0.01)
    slow = [asked(number) for number in range(AT_ONCE)]
    link.missing = ids(slow)
    for message in slow:
        link.announce(message, 1)
    assert grid.pull_messages(ids(slow)) == []
    other = asked(99)
    link.announce(other, 99)
    assert grid.pull_messages(ids([other])) == []
    assert len(link.asked) == 1  # they may be large: first they must arrive
    clock[0] += downloads.STALLED_SECONDS
    (reply,) = pull_all(grid, ids([other])).values()
    assert value(reply) == 99


def test_a_reply_that_nobody_asks_for_any_more_is_dropped(link, grid, clock):
    clock[0] = 1.0
    kept, abandoned = asked(0), asked(1)
    link.missing = ids([kept, abandoned])
    for message in (kept, abandoned):
        link.announce(message, 0)
    assert grid.pull_messages(ids([kept, abandoned])) == []
    link.missing = set()
    threading.Event().wait(2.5)  # both arrive meanwhile
    clock[0] += downloads.ABANDONED_SECONDS
    (reply,) = grid.pull_messages(ids([kept]))
    assert reply.metadata.reply_to_message_id == kept.metadata.message_id
    assert grid.pull_messages(ids([abandoned])) == []


def test_a_grid_that_is_closed_lets_its_process_end(link, grid):
    message = asked(0)
    link.missing = ids([message])
    link.announce(message, 0)
    before = threading.active_count()
    assert grid.pull_messages(ids([message])) == []
    assert threading.active_count() > before
    with unblocked(grid):
        pass
    deadline = time.monotonic() + 20
    while threading.active_count() > before and time.monotonic() < deadline:
        threading.Event().wait(0.1)
    assert threading.active_count() <= before
