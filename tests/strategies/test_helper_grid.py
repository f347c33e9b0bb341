"""Rounds with a seed helper on a grid: one message for each client, and the same sum."""

from dataclasses import replace

import pytest

from clients import DevicePolicy
from clients.client_app import build_client_app, replayed_entropy
from fedcore.crypto import ReplayedEntropy, SystemEntropy
from fedcore.engine import Fault, FaultyGrid, InProcessGrid, run_in_process
from fedcore.errors import ConfigurationError, RoundAbortedError
from fedcore.job import LocalHelper, RemoteHelper, check
from fedcore.pipeline import BOX, RECORD, SeedHelper
from strategies import SecureGrid
from strategies.helper_client import InProcessHelper
from strategies.helper_rounds import HelperLimits
from strategies.helper_service import HelperSettings, create_helper_key, serve
from strategies.server_app import build_server_app
from strategies.surroundings import connect_helper, helper_entropy
from tests.strategies.federation import (
    AUTHORITY,
    ENROLLED,
    ROOMY,
    assert_close,
    client_app,
    losing,
    play,
    stage_of,
    tampering,
    weighted_mean,
)
from tests.strategies.jobs import JOB, Recorder, run_job
from tests.strategies.test_faults import (
    VECTOR_RECORD,
    as_floats,
    assert_given_up,
    assert_mean_over,
    cut,
    emptied,
    garbled,
    lengthened,
    misnamed,
    nothing,
    numbered_metrics,
    raising_in,
)
from tests.strategies.test_helper_service import Authority, client_of
from tests.strategies.test_secure_grid import messages

VICTIMS = (2, 5, 7)
REST = [client for client in range(10) if client not in VICTIMS]


def plan_of(helper, **changes):
    secagg = SeedHelper(helper.public_key.hex(), **changes)
    return replace(ROOMY, secagg=secagg)


def pinning(helper, **changes):
    return DevicePolicy(helper_key=helper.public_key.hex(), **changes)


def play_with(helper, *outer, wrap=lambda grid: grid, policy=None, plan=None, **options):
    """A round of ten clients that pin this helper."""
    names = {"train", "identity"} & options.keys()
    about_app = {name: options.pop(name) for name in names}
    app = client_app(*outer, seed=1, policy=policy or pinning(helper), **about_app)
    return play(app, plan or plan_of(helper), helper=helper, wrap=wrap, **options)


class Reluctant:
    """A helper that fails at one of its calls: `uses` times, `after` so many good ones."""

    def __init__(self, call, uses=100, after=0):
        self.inner = InProcessHelper(ReplayedEntropy(b"reluctant"))
        self.public_key = self.inner.public_key
        self.calls = []
        self._failing, self._uses, self._after = call, uses, after

    def __getattr__(self, name):
        def call(plan, *arguments):
            self.calls.append(name)
            good = self.calls.count(name) <= self._after
            if name == self._failing and self._uses and not good:
                self._uses -= 1
                raise RoundAbortedError(stage="helper", needed=7, found=0, reason="it refuses")
            return getattr(self.inner, name)(plan, *arguments)

        return call


@pytest.fixture
def helper():
    return InProcessHelper(ReplayedEntropy(b"helper"))


@pytest.mark.parametrize("rounds", [1, 2])
def test_the_arrays_are_those_of_bonawitz_bit_for_bit(helper, rounds):
    one = play_with(helper, rounds=rounds)
    other = play(client_app(seed=1), ROOMY, rounds=rounds)
    for name, array in one.arrays.items():
        assert array.tobytes() == other.arrays[name].tobytes(), name
    assert [report.metrics for report in one.reports] == [
        report.metrics for report in other.reports
    ]
    assert one.grid.ledger == other.grid.ledger
    assert_close(play_with(helper).arrays, weighted_mean(range(10)), atol=1e-5)


def test_every_client_gets_one_message_and_sends_one(helper):
    played = play_with(helper)
    assert list(map(stage_of, played.wire.sent)) == ["upload"] * 10
    assert len(played.wire.received) == 10
    assert len({message.metadata.dst_node_id for message in played.wire.sent}) == 10
    (report,) = played.reports
    assert (report.traffic.uploads, report.traffic.downloads) == (10, 10)
    assert report.traffic.up_payload == 10 * 43 * 4
    assert (report.neighbours, report.threshold) == (0, 0)


def test_with_a_helper_less_crosses_the_wire(helper):
    one = play_with(helper).reports[0].traffic
    other = play(client_app(seed=1), ROOMY).reports[0].traffic
    assert one.up_total < other.up_total / 2
    assert one.down_total < other.down_total / 2


@pytest.mark.parametrize("fault", list(Fault))
def test_the_round_is_exact_over_those_who_uploaded(helper, fault):
    gone = losing(VICTIMS, "upload", fault)
    report = assert_mean_over(play_with(helper, wrap=lambda grid: FaultyGrid(grid, gone)), REST)
    assert report.lost == {"upload": 3}


def test_too_many_losses_give_the_round_up(helper):
    gone = losing(range(4), "upload")
    played = play_with(helper, wrap=lambda grid: FaultyGrid(grid, gone))
    assert assert_given_up(played).lost == {"upload": 4}
    assert played.grid.ledger.releases == ()


def test_a_client_that_cannot_train_is_lost_alone(helper):
    report = assert_mean_over(play_with(helper, train=raising_in(VICTIMS)), REST)
    assert report.lost == {"upload": 3}


def with_a_box(change):
    def tamper(content):
        return garbled(**{BOX: change(content[RECORD][BOX])})(content)

    return tamper


@pytest.mark.parametrize(
    "tamper",
    [
        cut,
        lengthened,
        emptied,
        nothing,
        as_floats,
        misnamed,
        numbered_metrics,
        with_a_box(lambda box: None),
        with_a_box(lambda box: "text"),
        with_a_box(lambda box: b""),
        with_a_box(lambda box: box[:-1]),
        with_a_box(lambda box: box[:-1] + bytes([box[-1] ^ 1])),
        with_a_box(lambda box: (9).to_bytes(4, "little") + box[4:]),
    ],
)
def test_garbage_counts_as_silence(helper, tamper):
    report = assert_mean_over(play_with(helper, tampering(VICTIMS, "upload", tamper)), REST)
    assert report.lost == {"upload": 3}


def test_an_upload_under_somebody_elses_box_counts_as_silence(helper):
    kept = {}

    def lend(content):
        kept["box"] = content[RECORD][BOX]
        return content

    def borrow(content):
        return garbled(**{BOX: kept["box"]})(content)

    outer = tampering([1], "upload", lend), tampering([2], "upload", borrow)
    survivors = [client for client in range(10) if client != 2]
    assert assert_mean_over(play_with(helper, *outer), survivors).lost == {"upload": 1}


def test_a_box_in_the_name_of_somebody_who_has_not_answered_yet_keeps_nobody_out(helper):
    # A replayed run makes the same boxes: client 2 knows what client 9 will send.
    sent = play_with(helper).wire.received[9].content[RECORD][BOX]
    again = InProcessHelper(ReplayedEntropy(b"helper"))
    played = play_with(again, tampering([2], "upload", with_a_box(lambda box: sent)))
    survivors = [client for client in range(10) if client != 2]
    assert assert_mean_over(played, survivors).lost == {"upload": 1}


def test_devices_that_pin_another_helper_are_lost_and_the_others_go_on(helper):
    right, wrong = (
        client_app(seed=1, policy=pinning(pinned))
        for pinned in (helper, InProcessHelper(SystemEntropy()))
    )

    def app(message, context):
        strange = context.node_config["partition-id"] in VICTIMS
        return (wrong if strange else right)(message, context)

    report = assert_mean_over(play(app, plan_of(helper), helper=helper), REST)
    assert report.lost == {"upload": 3}


def test_an_unknown_helper_in_the_plan_is_refused_by_all_devices(helper):
    played = play_with(helper, plan=replace(ROOMY, secagg=SeedHelper("ab" * 32)))
    assert_given_up(played)
    assert not any(VECTOR_RECORD in message.content for message in played.wire.crossed)


def test_a_grid_without_helper_refuses_the_plan_before_anything_is_sent(helper):
    with InProcessGrid(client_app(policy=pinning(helper)), [{}] * 10, {}) as nodes:
        grid = SecureGrid(nodes, plan_of(helper))
        with pytest.raises(ConfigurationError, match="needs a helper: pass one to SecureGrid"):
            grid.send_and_receive(messages(grid), timeout=60)
        assert grid.ledger.releases == ()


@pytest.mark.parametrize("call", ["open", "deposit", "close"])
def test_a_helper_that_refuses_ends_the_attempt_and_the_strategy_keeps_its_model(call):
    helper = Reluctant(call)
    played = play_with(helper, rounds=2)
    assert [report.survivors for report in played.reports] == [0, 0]
    assert all("it refuses" in reason for reason in played.reports[0].aborted)
    assert helper.calls.count(call) == 4  # two attempts each
    assert dict(played.result.arrays) == {}
    assert played.grid.ledger.releases == ()


@pytest.mark.parametrize("call", ["open", "deposit", "close"])
def test_the_second_attempt_succeeds_when_the_helper_is_back(call):
    played = play_with(Reluctant(call, uses=1))
    report = assert_mean_over(played, range(10), attempts=2)
    assert "it refuses" in report.aborted[0]


def test_a_round_that_a_helper_refuses_leaves_the_model_of_the_round_before():
    helper = Reluctant("close", after=1)
    played = play_with(helper, rounds=2)
    assert [report.survivors for report in played.reports] == [10, 0]
    assert [report.attempts for report in played.reports] == [1, 2]
    assert_close(played.arrays, weighted_mean(range(10)), atol=1e-5)
    assert [release.round_number for release in played.grid.ledger.releases] == [1]


def test_a_helper_with_limits_of_its_own_ends_the_attempt_with_its_words():
    helper = InProcessHelper(ReplayedEntropy(b"helper"), HelperLimits(clients=9))
    report = assert_given_up(play_with(helper))
    assert "clients in 2..9, found 10" in report.aborted[0]


def admitting_enrolled():
    return InProcessHelper(ReplayedEntropy(b"helper"), authority=bytes.fromhex(AUTHORITY))


def test_a_helper_that_admits_enrolled_devices_only_leaves_out_the_others():
    helper = admitting_enrolled()
    plan = plan_of(helper, authority=AUTHORITY)
    policy = pinning(helper, authority=AUTHORITY)
    everybody = play_with(helper, plan=plan, policy=policy)
    assert_mean_over(everybody, range(10))

    def some(context):
        outside = context.node_config["partition-id"] in VICTIMS
        return None if outside else ENROLLED(context)

    played = play_with(admitting_enrolled(), plan=plan, policy=policy, identity=some)
    assert assert_mean_over(played, REST).lost == {"upload": 3}
    # Without signatures in the plan nobody signs, and this helper takes no box.
    assert_given_up(play_with(admitting_enrolled()))


# A second party over gRPC


@pytest.fixture(scope="module")
def tls(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("tls"), "ours")


@pytest.fixture(scope="module")
def server(tls, tmp_path_factory):
    folder = tmp_path_factory.mktemp("helper")
    create_helper_key(folder / "secret", SystemEntropy())
    settings = HelperSettings(
        folder=str(folder),
        secret_key=str(folder / "secret"),
        client_authority=tls.path,
        address="127.0.0.1:0",
        **tls.issue("helper"),
    )
    with serve(settings) as running:
        yield running


def test_a_remote_helper_gives_the_same_bytes(server, tls, helper):
    with client_of(server, tls) as remote:
        played = play_with(remote, rounds=2)
    local = play_with(helper, rounds=2)
    for name, array in played.arrays.items():
        assert array.tobytes() == local.arrays[name].tobytes(), name
    assert [report.survivors for report in played.reports] == [10, 10]
    assert server.rounds.open_rounds == 0


def test_a_remote_helper_that_is_gone_ends_the_attempt(tls, server):
    gone = client_of(server, tls, address="127.0.0.1:1")
    with gone as remote:
        report = assert_given_up(play_with(remote))
    assert "the helper at 127.0.0.1:1: UNAVAILABLE" in report.aborted[0]


def run_job_with(helper, key, **changes):
    job = replace(JOB, rounds=1, secagg=SeedHelper(), helper=helper, **changes)
    recorder = Recorder()
    run_in_process(
        build_server_app(recorder, check(job)),
        build_client_app(DevicePolicy(helper_key=key), entropy=replayed_entropy(job.seed)),
        num_nodes=job.clients,
        run_config={"job": job.to_json()},
    )
    return recorder


def test_a_job_connects_to_its_helper_and_fills_in_its_key(server, tls):
    local_key = InProcessHelper(helper_entropy(JOB.seed)).public_key.hex()
    local = run_job_with(LocalHelper(), local_key)
    remote_key = server.rounds.public_key.hex()
    files = tls.issue("job")
    remote = RemoteHelper(f"127.0.0.1:{server.port}", remote_key, tls.path, **files)
    assert local.model == run_job_with(remote, remote_key).model == run_job(rounds=1).model
    connected, key = connect_helper(replace(JOB, helper=remote))
    with connected:
        assert (connected.status().public_key.hex(), key) == (remote_key, remote_key)


def test_a_jobs_local_helper_follows_from_its_seed():
    keys = [connect_helper(replace(JOB, seed=seed))[1] for seed in (0, 0, 1)]
    assert keys[0] == keys[1] != keys[2]


def test_a_remote_helper_whose_files_are_missing_is_refused_before_the_run():
    nowhere = RemoteHelper("127.0.0.1:1", "ab" * 32, "no.pem", "no.pem", "no.key")
    with pytest.raises(ConfigurationError, match=r"no\.pem cannot be read"):
        connect_helper(replace(JOB, helper=nowhere))
