"""Clients that disappear, lie or break: the round is exact over the others, or it is not."""

from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedcore.codec import RandomK
from fedcore.engine import (
    DroppingGrid,
    DropScript,
    Fault,
    FaultyGrid,
    to_arrays,
    to_record,
)
from fedcore.pipeline import RECORD, VECTOR, NoSecAgg, Uniform
from strategies.surroundings import describe_by
from tests.fedcore.pipeline.rounds import private_plan
from tests.strategies.federation import (
    EVERY_STAGE,
    OPEN,
    ROOMY,
    SIGNED,
    SilentGrid,
    assert_close,
    client_app,
    initial,
    losing,
    node_of,
    play,
    pull,
    stage_of,
    tampering,
    weighted_mean,
)

VICTIMS = (2, 5, 7)
REST = [client for client in range(10) if client not in VICTIMS]
VECTOR_RECORD = f"{RECORD}.{VECTOR}"
# Who disappears only after its upload is in the sum, is in the mean.
IN_THE_MEAN = dict.fromkeys(("identify", "advertise", "share", "upload"), REST) | dict.fromkeys(
    ("endorse", "reveal"), range(10)
)


def assert_mean_over(played, survivors, *, attempts=1):
    assert_close(played.arrays, weighted_mean(survivors), atol=1e-5)
    (report,) = played.reports
    assert report.survivors == len(list(survivors))
    assert report.attempts == attempts
    assert [release.survivors for release in played.grid.ledger.releases] == [report.survivors]
    return report


def assert_given_up(played, *, attempts=2):
    """The strategy got nothing, and nothing was recorded as released."""
    (report,) = played.reports
    assert (report.survivors, report.attempts, len(report.aborted)) == (0, attempts, attempts)
    assert report.metrics == {}
    assert dict(played.result.arrays) == {}
    assert played.result.train_metrics_clientapp == {}
    return report


@pytest.mark.parametrize("fault", list(Fault))
@pytest.mark.parametrize(("plan", "stage"), EVERY_STAGE)
def test_the_round_is_exact_over_those_who_are_left(plan, stage, fault):
    played = play(plan=plan, wrap=lambda grid: FaultyGrid(grid, losing(VICTIMS, stage, fault)))
    report = assert_mean_over(played, IN_THE_MEAN[stage])
    assert report.lost == {stage: 3}
    assert report.aborted == ()


@pytest.mark.parametrize(
    ("plan", "stages"),
    [
        (ROOMY, ["advertise", "share", "upload", "reveal"]),
        (SIGNED, ["advertise", "upload", "endorse", "reveal"]),
        (SIGNED, ["share", "upload", "endorse", "reveal"]),
    ],
)
def test_losses_at_different_stages_add_up(plan, stages):
    scripts = [losing([victim], stage) for victim, stage in enumerate(stages)]

    def script(message):
        return next((fault for fault in (each(message) for each in scripts) if fault), None)

    played = play(plan=plan, wrap=lambda grid: FaultyGrid(grid, script))
    gone = sum(len(IN_THE_MEAN[stage]) < 10 for stage in stages)
    report = assert_mean_over(played, range(gone, 10))
    assert report.lost == dict.fromkeys(stages, 1)


def test_a_drop_script_makes_its_victims_disappear_in_every_round():
    script = DropScript(seed=3, per_round=2, stages=("share", "upload"))
    labels = {node_of(client): str(client) for client in range(10)}
    played = play(
        plan=ROOMY,
        rounds=4,
        wrap=lambda grid: DroppingGrid(grid, script, describe_by(labels)),
        labels=labels,
    )
    assert [report.survivors for report in played.reports] == [8] * 4
    assert all(sum(report.lost.values()) == 2 for report in played.reports)


@pytest.mark.parametrize(("plan", "stage"), EVERY_STAGE)
def test_too_many_losses_give_the_round_up_and_the_strategy_keeps_its_model(plan, stage):
    gone = losing(range(6), stage)
    played = play(plan=plan, wrap=lambda grid: FaultyGrid(grid, gone))
    report = assert_given_up(played)
    assert report.lost == {stage: 6}
    assert all("nothing was released" in reason for reason in report.aborted)
    assert played.grid.ledger.releases == ()


def test_a_model_is_kept_over_a_round_that_was_given_up():
    def script(message):
        hit = stage_of(message) == "upload" and message.content[RECORD]["round"] == 2
        return Fault.DROPPED if hit else None

    played = play(plan=ROOMY, rounds=3, wrap=lambda grid: FaultyGrid(grid, script))
    assert [report.survivors for report in played.reports] == [10, 0, 10]
    assert [release.round_number for release in played.grid.ledger.releases] == [1, 3]
    start = to_record({k: v.astype(np.float32) for k, v in weighted_mean(range(10)).items()})
    assert_close(played.arrays, weighted_mean(range(10), start), atol=2e-5)


@pytest.mark.parametrize(("plan", "stage"), EVERY_STAGE)
def test_the_second_attempt_succeeds_when_the_fault_is_gone(plan, stage):
    left = {"uses": 5}

    def script(message):
        if stage_of(message) != stage or not left["uses"]:
            return None
        left["uses"] -= 1
        return Fault.DROPPED

    played = play(plan=plan, wrap=lambda grid: FaultyGrid(grid, script), retry_after=())
    report = assert_mean_over(played, range(10), attempts=2)
    assert len(report.aborted) == 1
    assert report.lost == {}


def test_as_many_attempts_are_made_as_the_plan_allows():
    plan = replace(ROOMY, attempts=3)
    played = play(plan=plan, wrap=lambda grid: FaultyGrid(grid, losing(range(5), "share")))
    assert_given_up(played, attempts=3)


def raising_in(victims):
    def train(message, client):
        if client in victims:
            msg = "the sensor is wet"
            raise OSError(msg)
        return pull(message, client)

    return train


def test_a_client_that_raises_is_lost_at_its_upload():
    report = assert_mean_over(play(client_app(train=raising_in(VICTIMS)), ROOMY), REST)
    assert report.lost == {"upload": 3}


def without_model(content):
    return RecordDict({"metrics": MetricRecord({"num-examples": 3})})


def without_metrics(content):
    return RecordDict({"arrays": content["arrays"]})


def of_another_shape(content):
    arrays = ArrayRecord([np.zeros(43, np.float32)])
    return RecordDict({"arrays": arrays, "metrics": content["metrics"]})


def with_weight(value):
    def change(content):
        metrics = MetricRecord({"num-examples": value})
        return RecordDict({"arrays": content["arrays"], "metrics": metrics})

    return change


def with_too_many_metrics(content):
    metrics = {f"metric{index}": 1.0 for index in range(9)} | {"num-examples": 5}
    return RecordDict({"arrays": content["arrays"], "metrics": MetricRecord(metrics)})


@pytest.mark.parametrize(
    "spoil",
    [
        without_model,
        without_metrics,
        of_another_shape,
        with_weight(-1),
        with_weight(float("nan")),
        with_weight([1, 2]),
        with_too_many_metrics,
    ],
)
def test_a_train_function_that_returns_nonsense_loses_its_client_only(spoil):
    def train(message, client):
        content = pull(message, client)
        return spoil(content) if client in VICTIMS else content

    report = assert_mean_over(play(client_app(train=train), ROOMY), REST)
    assert report.lost == {"upload": 3}


def garbled(**changes):
    """Replace entries of the record; None removes one."""

    def tamper(content):
        record = dict(content[RECORD]) | changes
        content[RECORD] = ConfigRecord({k: v for k, v in record.items() if v is not None})
        return content

    return tamper


def cut(content):
    return change_bytes(content, lambda data: data[:-1])


def lengthened(content):
    return change_bytes(content, lambda data: data + b"\x00")


def emptied(content):
    return change_bytes(content, lambda _: b"")


def of_another_kind(content):
    return change_bytes(content, lambda data: data[:3] + bytes([data[3] % 8 + 1]) + data[4:])


def of_another_version(content):
    return change_bytes(content, lambda data: data[:2] + b"\x63" + data[3:])


def change_bytes(content, change):
    """Change the protocol message, wherever it is."""
    if VECTOR_RECORD in content:
        content[VECTOR_RECORD][VECTOR].data = change(content[VECTOR_RECORD][VECTOR].data)
    else:
        content[RECORD]["message"] = change(content[RECORD]["message"])
    return content


def nothing(content):
    return RecordDict()


def under_another_name(content):
    return RecordDict({f"other.{name}": record for name, record in content.items()})


def of_another_record_type(content):
    return RecordDict({RECORD: MetricRecord({"message": 1}), VECTOR_RECORD: ConfigRecord()})


@pytest.mark.parametrize(("plan", "stage"), EVERY_STAGE)
@pytest.mark.parametrize(
    "tamper",
    [
        cut,
        lengthened,
        emptied,
        of_another_kind,
        of_another_version,
        nothing,
        under_another_name,
        of_another_record_type,
    ],
)
def test_garbage_counts_as_silence(plan, stage, tamper):
    app = client_app(tampering(VICTIMS, stage, tamper), seed=1)
    report = assert_mean_over(play(app, plan), IN_THE_MEAN[stage])
    assert report.lost == {stage: 3}


@pytest.mark.parametrize("stage", ["identify", "advertise", "share", "endorse", "reveal"])
@pytest.mark.parametrize(
    "tamper", [garbled(message="text"), garbled(message=7), garbled(message=None)]
)
def test_a_message_of_another_type_counts_as_silence(stage, tamper):
    app = client_app(tampering(VICTIMS, stage, tamper), seed=1)
    assert assert_mean_over(play(app, SIGNED), IN_THE_MEAN[stage]).lost == {stage: 3}


def as_floats(content):
    data = content[VECTOR_RECORD][VECTOR].data
    content[VECTOR_RECORD] = ArrayRecord({VECTOR: Array(np.frombuffer(data, np.uint8))})
    return content


def misnamed(content):
    content[VECTOR_RECORD] = ArrayRecord({"other": content[VECTOR_RECORD][VECTOR]})
    return content


def numbered_metrics(content):
    return garbled(metrics=[1, 2])(content)


def single_metric(content):
    return garbled(metrics="loss")(content)


@pytest.mark.parametrize("tamper", [as_floats, misnamed, numbered_metrics, single_metric])
@pytest.mark.parametrize("secagg", [ROOMY.secagg, NoSecAgg()], ids=lambda secagg: secagg.kind)
def test_an_upload_of_another_form_counts_as_silence(tamper, secagg):
    app = client_app(tampering(VICTIMS, "upload", tamper), seed=1, policy=OPEN)
    report = assert_mean_over(play(app, replace(ROOMY, secagg=secagg)), REST)
    assert report.lost == {"upload": 3}


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda _: b"", lambda data: data * 2])
def test_in_the_clear_a_vector_of_another_length_counts_as_silence(change):
    app = client_app(
        tampering(VICTIMS, "upload", lambda content: change_bytes(content, change)), policy=OPEN
    )
    assert_mean_over(play(app, replace(ROOMY, secagg=NoSecAgg())), REST)


def test_swapped_stages_count_as_silence():
    kept = {}

    def first(content):
        kept["advertisement"] = content[RECORD]["message"]
        return content

    def second(content):
        content[RECORD]["message"] = kept["advertisement"]
        return content

    app = client_app(tampering([2], "advertise", first), tampering([2], "share", second), seed=1)
    survivors = [client for client in range(10) if client != 2]
    assert assert_mean_over(play(app, ROOMY), survivors).lost == {"share": 1}


def test_somebody_elses_message_counts_as_silence_where_it_can_be_told():
    kept = {}

    def lend(content):
        kept["shares"] = content[RECORD]["message"]
        return content

    def borrow(content):
        content[RECORD]["message"] = kept["shares"]
        return content

    app = client_app(tampering([1], "share", lend), tampering([2], "share", borrow), seed=1)
    survivors = [client for client in range(10) if client != 2]
    assert assert_mean_over(play(app, ROOMY), survivors).lost == {"share": 1}


class RepeatingGrid(SilentGrid):
    """Hands every reply of some nodes out twice."""

    def __init__(self, grid):
        super().__init__(grid, lambda _: False)

    def pull_messages(self, message_ids):
        for reply in super().pull_messages(message_ids):
            yield reply
            if reply.metadata.src_node_id in map(node_of, VICTIMS):
                yield reply


@pytest.mark.parametrize("secagg", [ROOMY.secagg, NoSecAgg()], ids=lambda secagg: secagg.kind)
def test_a_reply_that_arrives_twice_counts_once(secagg):
    played = play(client_app(policy=OPEN), replace(ROOMY, secagg=secagg), wrap=RepeatingGrid)
    assert_mean_over(played, range(10))


def with_another_last_share(content):
    data = content[RECORD]["message"]
    content[RECORD]["message"] = data[:-4] + bytes(4)
    return content


BOTH = pytest.mark.parametrize("plan", [ROOMY, SIGNED], ids=["unsigned", "signed"])


@BOTH
@pytest.mark.parametrize("gone", [[], [0]], ids=["of a seed", "of a key"])
def test_one_false_share_is_left_out(plan, gone):
    app = client_app(tampering([1], "reveal", with_another_last_share), seed=1)
    played = play(app, plan, wrap=lambda grid: FaultyGrid(grid, losing(gone, "upload")))
    assert_mean_over(played, range(len(gone), 10))


@BOTH
def test_false_shares_end_the_attempt_and_not_the_run(plan):
    # After client 0 is gone its key is reconstructed, and seen not to be its own.
    app = client_app(tampering([1, 2], "reveal", with_another_last_share), seed=1)
    played = play(app, plan, wrap=lambda grid: FaultyGrid(grid, losing([0], "upload")))
    report = assert_given_up(played)
    assert "aborted at unmasking" in report.aborted[0]
    assert played.grid.ledger.releases == ()


@pytest.mark.parametrize("fault", list(Fault))
def test_a_sum_whose_shares_were_asked_for_is_paid_for_if_devices_add_the_noise(fault):
    """The attempt ends here, but replies that came too late lie with the coordinator."""
    plan = private_plan(dropout=0.3, secagg=ROOMY.secagg)
    script = losing(range(6), "reveal", fault)
    played = play(plan=plan, wrap=lambda grid: FaultyGrid(grid, script), retry_after=())
    assert_given_up(played)
    assert [release.survivors for release in played.grid.ledger.releases] == [10, 10]
    assert played.reports[0].epsilon == played.grid.ledger.epsilon
    early = play(plan=plan, wrap=lambda grid: FaultyGrid(grid, losing(range(6), "upload", fault)))
    assert early.grid.ledger.releases == ()


def measuring_differently(victims):
    def train(message, client):
        content = pull(message, client)
        if client in victims:
            content["metrics"]["private-score"] = 1.0
        return content

    return train


@pytest.mark.parametrize("secagg", [ROOMY.secagg, NoSecAgg()], ids=lambda secagg: secagg.kind)
def test_clients_with_different_metrics_end_the_round_with_a_reason(secagg):
    app = client_app(train=measuring_differently(VICTIMS), policy=OPEN)
    report = assert_given_up(play(app, replace(ROOMY, secagg=secagg)))
    assert "different metrics" in report.aborted[0]
    assert "private-score" in report.aborted[0]


@BOTH
def test_clients_with_different_metrics_are_noticed_before_the_sum_is_revealed(plan):
    played = play(client_app(train=measuring_differently(VICTIMS)), plan)
    assert "reveal" not in set(map(stage_of, played.wire.sent))
    assert played.grid.ledger.releases == ()


@pytest.mark.parametrize(
    ("plan", "count"), [(private_plan(dropout=0.3, secagg=ROOMY.secagg), 1), (ROOMY, 9)]
)
def test_a_client_that_names_more_metrics_than_there_are_counts_as_silent(plan, count):
    # Under noise there are none: one liar must not cost the others a round of budget.
    tamper = garbled(metrics=["injected"] * count)
    played = play(client_app(tampering([4], "upload", tamper), seed=1), plan)
    assert (played.reports[0].survivors, played.reports[0].lost) == (9, {"upload": 1})
    assert len(played.grid.ledger.releases) == 1


def test_a_cohort_without_examples_is_given_up_and_its_sum_is_in_the_ledger():
    def train(message, client):
        content = pull(message, client)
        content["metrics"]["num-examples"] = 0
        return content

    played = play(client_app(train=train), ROOMY)
    report = assert_given_up(played)
    assert "no examples" in report.aborted[0]
    # The sum was revealed, in both attempts, before anybody could know that it is empty.
    assert len(played.grid.ledger.releases) == 2


def test_a_cohort_without_examples_is_no_problem_where_examples_do_not_count():
    def train(message, client):
        content = pull(message, client)
        content["metrics"]["num-examples"] = 0
        return content

    played = play(client_app(train=train), replace(ROOMY, weighting=Uniform()))
    assert played.reports[0].survivors == 10


def test_error_feedback_of_an_aborted_attempt_is_not_lost():
    """The second attempt starts from the residual that the first one started from."""
    plan = replace(ROOMY, error_feedback=True, sparsify=RandomK(0.5))
    left = {"uses": 0}

    def script(message):
        if stage_of(message) != "reveal" or not left["uses"]:
            return None
        left["uses"] -= 1
        return Fault.DROPPED

    def run(failures):
        left["uses"] = 0

        def wrap(grid):
            left["uses"] = failures
            return FaultyGrid(grid, script)

        return play(client_app(seed=1), plan, rounds=2, wrap=wrap, retry_after=())

    smooth, rough = run(0), run(5)
    assert [report.attempts for report in smooth.reports] == [1, 1]
    assert [report.attempts for report in rough.reports] == [2, 1]
    # Rounding differs from attempt to attempt, what is rounded does not.
    assert_close(rough.arrays, smooth.arrays, atol=1e-5)
    changed = to_arrays(initial())
    assert any(np.abs(smooth.arrays[name] - changed[name]).max() > 1e-3 for name in changed)
