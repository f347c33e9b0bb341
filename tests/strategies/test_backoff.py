"""Devices that fail again and again are asked less often, and nothing is claimed for the draw."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.crypto import ReplayedEntropy
from fedcore.engine import DropScript
from fedcore.errors import ConfigurationError
from fedcore.job import Everyone, ExponentialBackOff, FixedSize, NoBackOff, Poisson
from fedcore.pipeline import Modular, Uniform
from fedcore.privacy import DistributedGaussian, Drawn, MatrixGaussian
from strategies.backoff import Absence, Absences
from strategies.checkpoints import CheckpointFolder
from strategies.sampling import Cohorts
from tests.strategies.jobs import CLEAR, JOB, PLAIN, Recorder, run_job

LABELS = {1000 + n: f"device-{n}" for n in range(12)}
POLICY = ExponentialBackOff(after=2, first=1, most=8)


def cohorts(absences, sampling=None, size=4):
    return Cohorts(
        LABELS, sampling or FixedSize(), size=size, devices=12, seed=1,
        entropy=ReplayedEntropy(b"x"), absences=absences,
    )  # fmt: skip


@given(
    after=st.integers(1, 5), first=st.integers(1, 5), more=st.integers(0, 50),
    failures=st.integers(0, 10**9),
)  # fmt: skip
def test_pauses_double_from_the_first_to_the_longest(after, first, more, failures):
    policy = ExponentialBackOff(after=after, first=first, most=first + more)
    pause = policy.pause(failures)
    if failures < after:
        assert pause == 0
    else:
        assert first <= pause <= first + more
        assert pause == min(first + more, 2 * policy.pause(failures - 1) or first)


def test_a_device_that_never_answers_is_drawn_ever_less_often():
    absences = Absences(POLICY)
    drawn = cohorts(absences, size=11)
    rounds = []
    for number in range(1, 41):
        cohort = drawn.current()
        if 1000 in cohort:
            rounds.append(number)
        drawn.note(set(cohort) - {1000}, {1000} & set(cohort))
        drawn.finish()
    gaps = [later - earlier for earlier, later in pairwise(rounds)]
    assert gaps == sorted(gaps)
    assert gaps[-1] >= 9
    assert len(rounds) < 10


def test_one_answer_ends_a_series_of_failures():
    absences = Absences(POLICY)
    for number in (1, 2, 3):
        absences.note(number, [], ["device-0"])
    assert absences.remaining("device-0", 4) == 2
    absences.note(4, ["device-0"], [])
    assert absences.known == {}
    assert absences.remaining("device-0", 5) == 0


def test_a_round_that_is_tried_twice_is_failed_once():
    absences = Absences(POLICY)
    absences.note(1, [], ["device-0"])
    absences.note(1, [], ["device-0"])
    assert absences.known == {"device-0": Absence(1, 1)}
    absences.note(1, ["device-0"], [])  # the second try went well after all
    assert absences.known == {}


def test_without_a_policy_nothing_is_noted_and_nobody_is_left_out():
    absences = Absences(NoBackOff())
    absences.note(1, [], ["device-0"])
    assert absences.known == {}
    kept = Absences(NoBackOff(), {"device-0": Absence(9, 1)})
    assert kept.paused(LABELS.values(), 2) == frozenset()


def test_a_cohort_keeps_its_size_by_asking_those_whose_pause_is_nearly_over():
    known = {label: Absence(2 + place, 1) for place, label in enumerate(sorted(LABELS.values()))}
    drawn = cohorts(Absences(ExponentialBackOff(after=1, most=1 << 12), known))
    drawn.finish()  # the second round: everybody pauses
    shortest = sorted(LABELS.values())[:4]
    assert sorted(LABELS[node] for node in drawn.current()) == shortest


@pytest.mark.parametrize("sampling", [FixedSize(), Poisson()])
def test_nothing_is_known_of_a_draw_that_left_somebody_out(sampling):
    absences = Absences(ExponentialBackOff(after=1, first=2, most=2))
    drawn = cohorts(absences, sampling)
    assert drawn.executed(drawn.current()).sampling != "unknown"
    drawn.note([], [1000])
    assert drawn.executed(drawn.current()).sampling != "unknown"  # this draw left out nobody
    for _ in range(2):
        drawn.finish()
        assert 1000 not in drawn.current()
        assert drawn.paused == 1
        assert drawn.executed(drawn.current()) == Drawn()
    drawn.finish()
    assert drawn.executed(drawn.current()) != Drawn()


SOME = {"backoff": POLICY, "rounds": 6, "clients_per_round": 6, "dropout": 0.4}


@pytest.mark.parametrize("changes", [{}, CLEAR, PLAIN], ids=["masked", "clear", "plain"])
def test_devices_that_the_network_loses_are_left_out_and_the_run_goes_on(changes):
    dead = DropScript(per_round=2, stages=("upload",), seed=3)
    settings = SOME | {"faults": dead, "backoff": ExponentialBackOff(after=1)}
    recorder = run_job(**settings, **changes)
    assert sum(report.paused for report in recorder.reports) > 0
    assert all(report.survivors for report in recorder.reports)


def test_a_run_that_goes_on_leaves_out_the_same_devices(tmp_path):
    settings = SOME | {
        "faults": DropScript(per_round=2, stages=("upload",), seed=3),
        "backoff": ExponentialBackOff(after=1),
    }

    class Interrupted(Recorder):
        def round_finished(self, progress):
            super().round_finished(progress)
            if progress.report.round_number == 3:
                raise KeyboardInterrupt

    whole = run_job(**settings)
    folder = CheckpointFolder(tmp_path, repeatable=True)
    with pytest.raises(KeyboardInterrupt):
        run_job(**settings, recorder=Interrupted(), checkpoints=folder)
    rest = run_job(**settings, checkpoints=folder)
    assert rest.model == whole.model
    assert rest.reports == whole.reports[-len(rest.reports) :]
    assert sum(report.paused for report in rest.reports) > 0


NOISE = {
    "quantize": Modular(24),
    "weighting": Uniform(),
    "clients": 12,
    "privacy": DistributedGaussian(noise_multiplier=8.0, delta=1e-3, amplification=True),
}


SPACED = MatrixGaussian(
    noise_multiplier=8.0, delta=1e-3, bands=1, min_separation=1, participations=6
)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (NOISE | {"sampling": Poisson()}, "amplification counts a choice from all devices"),
        ({"sampling": Everyone(), "clients_per_round": 8}, "sampling=everyone invites all"),
        (
            NOISE
            | {
                "privacy": MatrixGaussian(
                    noise_multiplier=8.0, delta=1e-3, bands=1, min_separation=1, participations=6
                )
            },
            "more often than privacy=matrix_gaussian plans for",
        ),
    ],
)
def test_back_off_that_cannot_be_right_is_refused(changes, said):
    with pytest.raises(ConfigurationError, match=said):
        replace(JOB, backoff=POLICY, **changes)


@pytest.mark.parametrize("wrong", [{"after": 0}, {"first": 0}, {"first": 9, "most": 8}])
def test_back_off_out_of_range_is_refused(wrong):
    with pytest.raises(ConfigurationError, match=r"backoff\.\w+ must be in"):
        ExponentialBackOff(**wrong)


def test_every_failure_counts_once_however_many_rounds_there_are():
    absences, failed = Absences(POLICY), Counter()
    for number in range(1, 20):
        absences.note(number, [], ["device-1"])
        failed["device-1"] += 1
        assert absences.known["device-1"] == Absence(failed["device-1"], number)
