"""More are invited than are wanted: the first are enough, and the ledger says what was done."""

import gc
import weakref
from dataclasses import replace
from itertools import combinations

import pytest
from flwr.app import Message, RecordDict
from flwr.serverapp.strategy import FedAvg
from hypothesis import given
from hypothesis import strategies as st

from fedcore.codec import Clip
from fedcore.crypto import ReplayedEntropy
from fedcore.engine import InProcessGrid, VirtualClock, WrappedGrid
from fedcore.errors import ConfigurationError
from fedcore.job import FixedSize
from fedcore.job.sampling import invited
from fedcore.pipeline import Bonawitz, Modular, NoSecAgg, RunPlan, SeedHelper, Uniform
from fedcore.privacy import DistributedGaussian
from strategies import SecureGrid
from strategies.exchange import AT_ONCE, exchange
from strategies.goals import in_turn, stage_goals
from strategies.helper_client import InProcessHelper
from tests.strategies.federation import (
    OPEN,
    SIGNED,
    SilentGrid,
    assert_close,
    client_app,
    initial,
    node_of,
    plain_app,
    play,
    pull,
    stage_of,
    weighted_mean,
)
from tests.strategies.jobs import CLEAR, JOB, PLAIN, run_job
from tests.strategies.jobs import SIGNED as SIGNED_JOB

STAGES = ("advertise", "share", "upload", "reveal")
PLAN = RunPlan(dropout=0.4, secagg=Bonawitz(corrupt=0.0), stage_seconds=60.0)
"""Of ten, six are enough."""
KINDS = {
    "unsigned": PLAN,
    "signed": replace(SIGNED, dropout=0.4, stage_seconds=60.0),
    "clear": replace(PLAN, secagg=NoSecAgg()),
}
OF_EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


def trained():
    """A train function, and the set of the clients that it trained."""
    seen = set()

    def train(message, client):
        seen.add(client)
        return pull(message, client)

    return train, seen


@given(n=st.integers(2, 200), data=st.data())
def test_no_goal_is_below_what_the_plan_demands_or_above_what_is_wanted(n, data):
    wanted = data.draw(st.integers(1, n))
    minimum = data.draw(st.integers(1, wanted))
    goals = stage_goals(STAGES, invited=n, wanted=wanted, minimum=minimum)
    if wanted == n:
        assert goals == {}
        return
    assert goals["upload"] == wanted
    assert all(minimum <= goal <= wanted for goal in goals.values())


@given(rounds=st.lists(st.integers(1, 10**6), min_size=1, max_size=5, unique=True))
def test_the_turn_is_a_permutation_that_does_not_depend_on_the_order_of_the_clients(rounds):
    labels = {n: f"device-{n}" for n in range(30)}
    for number in rounds:
        turn = in_turn(labels, labels, f"0/{number}")
        assert sorted(turn) == list(labels)
        assert turn == in_turn(dict(reversed(labels.items())), labels, f"0/{number}")


@OF_EVERY_KIND
def test_the_mean_is_that_of_exactly_as_many_as_are_wanted(kind):
    train, seen = trained()
    played = play(client_app(policy=OPEN, seed=1, train=train), KINDS[kind], wanted=7)
    (report,) = played.reports
    assert report.survivors == 7
    assert report.invited == 10
    assert report.lost == {}
    assert report.surplus == 3
    assert 7 <= len(seen) <= 10
    counted = [set(group) for group in _groups(seen) if _is_mean(played.arrays, group)]
    assert len(counted) == 1


def _groups(seen):
    return combinations(sorted(seen), 7)


def _is_mean(arrays, group):
    expected = weighted_mean(group)
    return all(abs(arrays[name] - expected[name]).max() < 1e-5 for name in expected)


@OF_EVERY_KIND
def test_silent_devices_cost_no_deadline_while_enough_others_answer(kind):
    clock = VirtualClock()
    gone = {node_of(2), node_of(5)}
    played = play(
        client_app(policy=OPEN, seed=1), KINDS[kind], wanted=7, clock=clock,
        wrap=lambda grid: SilentGrid(grid, lambda m: m.metadata.dst_node_id in gone),
    )  # fmt: skip
    (report,) = played.reports
    assert report.survivors == 7
    assert clock.now() < 1.0


def test_without_over_selection_the_same_silence_costs_a_deadline():
    clock = VirtualClock()
    gone = {node_of(2), node_of(5)}
    played = play(
        client_app(seed=1), PLAN, clock=clock,
        wrap=lambda grid: SilentGrid(grid, lambda m: m.metadata.dst_node_id in gone),
    )  # fmt: skip
    assert played.reports[0].survivors == 8
    assert clock.now() >= 60.0


def test_with_a_helper_too_the_first_are_enough():
    helper = InProcessHelper(ReplayedEntropy(b"helper"))
    plan = replace(PLAN, secagg=SeedHelper(public_key=helper.public_key.hex()))
    policy = replace(OPEN, helper_key=helper.public_key.hex())
    played = play(client_app(policy=policy, seed=1), plan, wanted=7, helper=helper)
    assert (played.reports[0].survivors, played.reports[0].surplus) == (7, 3)


@OF_EVERY_KIND
def test_what_comes_late_is_counted_and_changes_nothing(kind):
    played = {
        late: play(
            client_app(policy=OPEN, seed=1), KINDS[kind], wanted=None if late else 10,
            clock=(clock := VirtualClock()),
            wrap=lambda grid, late=late, clock=clock: SilentGrid(
                grid, lambda m: m.metadata.dst_node_id == node_of(3) and stage_of(m) == "upload",
                clock, 61.0 if late else None,
            ),
        )
        for late in (True, False)
    }  # fmt: skip
    assert played[True].reports[0].lost == {"upload": 1}
    assert_close(played[True].arrays, weighted_mean(set(range(10)) - {3}), atol=1e-5)
    for name, array in played[True].arrays.items():
        assert (array == played[False].arrays[name]).all()
    assert played[False].reports[0].late == 0


class SlowGrid(WrappedGrid):
    """Nodes answer some messages at once, and their answers take long to arrive."""

    def __init__(self, grid, slow, clock, seconds):
        super().__init__(grid)
        self._slow, self._clock, self._seconds = slow, clock, seconds
        self._under_way = {}

    def push_messages(self, messages):
        batch = list(messages)
        keys = list(super().push_messages(batch))
        for message, key in zip(batch, keys, strict=True):
            if self._slow(message):
                (reply,) = super().pull_messages([key])
                self._under_way[key] = self._clock.now() + self._seconds, reply
        return keys

    def pull_messages(self, message_ids):
        asked, now = set(message_ids), self._clock.now()
        there = [key for key in asked & self._under_way.keys() if self._under_way[key][0] <= now]
        yield from [self._under_way.pop(key)[1] for key in there]
        yield from super().pull_messages(asked - self._under_way.keys() - set(there))


def test_a_reply_of_an_earlier_round_is_dropped_in_a_later_one():
    clock = VirtualClock()
    outcomes = []
    slow = {(node_of(3), "1"), (node_of(4), "2")}

    def silent(message):
        whose = message.metadata.dst_node_id, message.metadata.group_id
        return whose in slow and stage_of(message) == "upload"

    played = play(
        client_app(seed=1), PLAN, rounds=2, clock=clock, on_outcome=lambda *o: outcomes.append(o),
        wrap=lambda grid: SlowGrid(grid, silent, clock, 61.0),
    )  # fmt: skip
    first, second = played.reports
    assert (first.lost, first.late) == ({"upload": 1}, 0)
    assert (second.lost, second.late) == ({"upload": 1}, 1)
    assert second.traffic.up_total > 0
    assert [node_of(3) in failed for _, failed in outcomes] == [True, False]
    assert [node_of(3) in alive for alive, _ in outcomes] == [False, True]


def test_the_plan_names_all_that_are_invited_and_the_noise_is_that_of_the_least_survivors():
    plan = RunPlan(
        clip=Clip(1.0), quantize=Modular(24), weighting=Uniform(), dropout=0.4,
        privacy=DistributedGaussian(noise_multiplier=4.0, delta=1e-3),
        secagg=Bonawitz(corrupt=0.0),
    )  # fmt: skip
    played = play(client_app(seed=1), plan, wanted=7)
    assert played.grid is not None
    (release,) = played.grid.ledger.releases
    assert (release.clients, release.survivors) == (10, 7)
    assert release.sampling == "unknown"  # of ten that were drawn, seven came first
    assert not release.amplification_claimed
    # Six are enough, and six shares make the noise that is claimed; seven make more.
    assert release.sigma_local * 6**0.5 >= release.noise_multiplier * release.norm * (1 - 1e-9)
    assert release.sigma_local * 5**0.5 < release.noise_multiplier * release.norm


@pytest.mark.parametrize("changes", [{}, CLEAR, PLAIN, SIGNED_JOB], ids=str)
def test_a_job_with_over_selection_wants_its_clients_per_round_and_invites_more(changes):
    settings = {"sampling": FixedSize(over_selection=1.5), "clients_per_round": 4, "dropout": 0.4}
    recorder = run_job(**settings, **changes)
    assert [(r.invited, r.survivors, r.surplus) for r in recorder.reports] == [(6, 4, 2)] * 3
    assert recorder.model == run_job(**settings, **changes).model


def test_masked_and_unmasked_over_selection_may_differ_in_who_is_first_but_not_in_how_many():
    settings = {"sampling": FixedSize(over_selection=1.5), "clients_per_round": 4, "dropout": 0.4}
    masked, clear = run_job(**settings), run_job(**settings, **CLEAR)
    assert [r.survivors for r in masked.reports] == [r.survivors for r in clear.reports]
    assert masked.model == clear.model  # in process the turn decides, and it is the same


def test_the_first_devices_are_others_in_other_rounds():
    seen = []

    def train(message, client):
        seen.append(client)
        return pull(message, client)

    plan = replace(PLAN, secagg=NoSecAgg())
    counted = []
    play(
        client_app(policy=OPEN, seed=1, train=train), plan, wanted=7, rounds=6,
        on_outcome=lambda alive, _: counted.append(frozenset(alive)),
    )  # fmt: skip
    turns = {tuple(seen[start : start + 7]) for start in range(0, len(seen), 10)}
    assert len(turns) == 6


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sampling": FixedSize(over_selection=1.4)}, "invites 9 devices to get 6 updates"),
        (
            {"sampling": FixedSize(over_selection=1.3), "dropout": 0.1},
            "dropout must be at least 0.25",
        ),
    ],
)
def test_over_selection_that_cannot_work_is_refused_with_the_repair(changes, said):
    with pytest.raises(ConfigurationError, match=said):
        replace(JOB, **changes)


@pytest.mark.parametrize("factor", [0.99, 2.1, float("nan")])
def test_over_selection_out_of_range_is_refused(factor):
    with pytest.raises(ConfigurationError, match="over_selection must be in"):
        FixedSize(over_selection=factor)


@given(wanted=st.integers(1, 10_000), percent=st.integers(100, 200))
def test_as_many_are_invited_as_the_factor_says_and_no_rounding_adds_one(wanted, percent):
    sampling = FixedSize(over_selection=percent / 100)
    assert invited(sampling, wanted) == -(-wanted * percent // 100)


class Listing(WrappedGrid):
    """Hands over a list, as a grid over a network does, and knows which replies are alive."""

    def __init__(self, grid):
        super().__init__(grid)
        self.alive = weakref.WeakSet()
        self.largest = 0

    def pull_messages(self, message_ids):
        replies = list(super().pull_messages(message_ids))
        self.largest = max(self.largest, len(replies))
        return replies


class Watching(WrappedGrid):
    """Knows how many vectors are held at once."""

    def __init__(self, grid):
        super().__init__(grid)
        self.alive = weakref.WeakSet()
        self.most = 0

    def pull_messages(self, message_ids):
        for reply in super().pull_messages(message_ids):
            if reply.has_content() and reply.content.array_records:
                self.alive.add(reply)
                self.most = max(self.most, len(self.alive))
            yield reply
            del reply


@OF_EVERY_KIND
def test_vectors_are_added_as_they_come_and_never_held_together(kind):
    gc.collect()
    with InProcessGrid(client_app(policy=OPEN, seed=1), [{}] * 12, {}) as nodes:
        watching = Watching(nodes)
        grid = SecureGrid(watching, KINDS[kind])
        FedAvg(fraction_evaluate=0.0).start(grid=grid, initial_arrays=initial(), num_rounds=1)
    assert grid.ledger.releases[0].survivors == 12
    assert watching.most <= 2  # the one at hand, and the one before it


def test_of_a_grid_that_hands_over_lists_few_replies_are_taken_at_once():
    clock = VirtualClock()
    with InProcessGrid(plain_app(), [{}] * 50, {}) as grid:
        nodes = grid.get_node_ids()
        listing = Slow(Listing(grid), clock)
        questions = {n: Message(RecordDict(), n, "evaluate") for n in nodes}
        replies = dict(exchange(listing, questions, seconds=9.0, clock=clock))
    assert len(replies) == 50
    assert listing.largest <= AT_ONCE


class Slow(Listing):
    """Has nothing at the first look, and everything at the second."""

    def __init__(self, grid, clock):
        super().__init__(grid)
        self._clock = clock

    def pull_messages(self, message_ids):
        return super().pull_messages(message_ids) if self._clock.now() else []
