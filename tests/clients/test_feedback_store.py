"""What a device has not sent outlives its process, or the device says why not."""

import os
import stat
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Context, RecordDict

from clients.feedback import Feedback
from clients.feedback_store import InContext, LastUpload, OnDisk, store_of
from fedcore.codec import Clip, RandomK
from fedcore.errors import ConfigurationError, LocalProtocolError
from fedcore.pipeline import NoSecAgg, RunPlan, Uniform, bind_round
from fedcore.pipeline.upload import LocalUpdate, make_upload
from tests.fedcore.pipeline.rounds import entropy_of, round_plan

RUN = RunPlan(
    clip=Clip(0.7), sparsify=RandomK(0.3), error_feedback=True, weighting=Uniform(),
    secagg=NoSecAgg(),
)  # fmt: skip
LAST = LastUpload(
    node_id=2**64 - 1,
    plan=round_plan(RUN).to_bytes(),
    payload=bytes(range(256)),
    whole=np.linspace(-1, 1, 12, dtype=np.float32),
    before=np.ones(12, np.float32),
)


def node(path=None, node_id=1000):
    """The Context of a process that has just begun."""
    config = {} if path is None else {"feedback": str(path)}
    return Context(1, node_id, config, RecordDict(), {})


@pytest.fixture(params=[InContext, OnDisk])
def store(request, tmp_path):
    return request.param(RecordDict() if request.param is InContext else tmp_path / "feedback")


def upload(context, number, delta=1.0, counted=0):
    """Answer a round as the mod does."""
    plan, feedback = round_plan(RUN, round_number=number), Feedback(context)
    earlier = feedback.start(plan, counted)
    update = LocalUpdate(np.full(12, delta, np.float32), 1, {})
    feedback.keep(plan, make_upload(bind_round(plan), update, earlier, entropy_of(number)), earlier)


def start(context, number, counted):
    return Feedback(context).start(round_plan(RUN, round_number=number), counted)


@pytest.mark.parametrize("before", [LAST.before, None], ids=["later", "first"])
@pytest.mark.parametrize("payload", [LAST.payload, b""], ids=["compressed", "summed"])
def test_what_was_saved_last_is_loaded(store, before, payload):
    assert store.load() is None
    store.save(replace(LAST, whole=np.zeros(12, np.float32)))
    store.save(replace(LAST, before=before, payload=payload))
    found = store.load()
    assert (found.node_id, found.plan, found.payload) == (LAST.node_id, LAST.plan, payload)
    np.testing.assert_array_equal(found.whole, LAST.whole)
    assert found.whole.dtype == np.float32
    if before is None:
        assert found.before is None
    else:
        np.testing.assert_array_equal(found.before, before)


def test_only_a_node_that_names_a_file_has_one(tmp_path):
    assert isinstance(store_of(node()), InContext)
    assert store_of(node(tmp_path / "kept")) == OnDisk(tmp_path / "kept")


def test_a_process_that_begins_anew_repays_what_was_lost(tmp_path):
    path = tmp_path / "kept"
    for number in (1, 2, 3):
        upload(node(path), number)
    np.testing.assert_array_equal(start(node(path), 4, 0), np.full(12, 3.0))
    assert start(node(), 4, 0) is None


def test_with_a_file_nothing_is_left_in_the_context(tmp_path):
    context = node(tmp_path / "kept")
    upload(context, 1)
    assert list(context.state) == []


def test_with_another_node_id_what_may_have_counted_is_not_sent_again(tmp_path):
    """What the coordinator says of a node that it has not seen before is said of nobody."""
    path = tmp_path / "kept"
    upload(node(path), 1)
    counted = start(node(path), 2, 1)
    assert 0 < np.abs(counted).sum() < 12
    np.testing.assert_array_equal(start(node(path, node_id=1001), 2, 0), counted)


def test_the_file_is_for_its_owner_alone(tmp_path):
    before = os.umask(0)
    try:
        upload(node(tmp_path / "kept"), 1)
    finally:
        os.umask(before)
    assert [stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()] == [0o600]


@pytest.mark.parametrize("call", ["os.write", "os.fsync", "pathlib.Path.replace"])
def test_what_cannot_be_kept_is_not_sent_and_what_was_kept_stays(tmp_path, monkeypatch, call):
    path = tmp_path / "kept"
    upload(node(path), 1)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(call, full)
        with pytest.raises(ConfigurationError, match=r"No space left on device.*nothing may be"):
            upload(node(path), 2)
    np.testing.assert_array_equal(start(node(path), 2, 0), np.ones(12))


def test_a_file_with_any_byte_changed_is_refused(tmp_path):
    path = tmp_path / "kept"
    OnDisk(path).save(LAST)
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(ConfigurationError, match="kept is damaged: restore the disk"):
            OnDisk(path).load()
    path.write_bytes(whole[:-1])
    with pytest.raises(ConfigurationError, match="is damaged"):
        OnDisk(path).load()


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ConfigurationError, match=r"cannot be read: Is a directory"):
        OnDisk(tmp_path).load()
    with pytest.raises(ConfigurationError, match=r"cannot be kept \(No such file"):
        OnDisk(tmp_path / "gone" / "kept").save(LAST)


@pytest.mark.parametrize(("name", "value"), [("node", 3), ("node", "me"), ("payload", "text")])
def test_a_damaged_context_is_our_own_mistake(name, value):
    records = RecordDict()
    InContext(records).save(LAST)
    records["fedcore.feedback.sent"][name] = value
    with pytest.raises(LocalProtocolError, match="what this device kept of its last upload"):
        InContext(records).load()
    del records["fedcore.feedback"]
    with pytest.raises(LocalProtocolError, match="what this device kept of its last upload"):
        InContext(records).load()
