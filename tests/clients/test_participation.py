"""A device counts for itself how often it takes part."""

import pytest

from clients import DevicePolicy
from clients import journal as journal_module
from clients.journal import Answer, AnsweredJournal
from clients.memory import ProtocolMemory
from clients.participation import Spacing, spacing_of
from fedcore.errors import PeerProtocolError
from fedcore.pipeline import NoSecAgg
from fedcore.privacy import MatrixGaussian
from tests.clients.coordinator import Coordinator, new_context, training_app
from tests.fedcore.pipeline.rounds import private_plan, round_plan

SPACING = Spacing(separation=3, participations=2)
NOISE = MatrixGaussian(
    noise_multiplier=1.0, delta=1e-5, bands=3, min_separation=3, participations=2
)
RUN = private_plan(privacy=NOISE)


@pytest.fixture(params=["memory", "journal"])
def take(request, tmp_path):
    """Takes part in a round of a run, as far as the device's memory or journal lets it."""
    context, journal = new_context(0), AnsweredJournal(tmp_path / "answers")

    def memory_takes(number, attempt=1, run_id="run", run=RUN):
        plan = round_plan(run, round_number=number, attempt=attempt, run_id=run_id)
        ProtocolMemory(context).begin(plan)

    def journal_takes(number, attempt=1, run_id="run", run=RUN):
        spacing = spacing_of(round_plan(run))
        # Opened anew each time: what counts is on disk.
        AnsweredJournal(journal.path).claim(run_id, Answer(number, attempt), spacing)
        AnsweredJournal(journal.path).claim(run_id, Answer(number, attempt, 1), spacing)

    return memory_takes if request.param == "memory" else journal_takes


@pytest.mark.parametrize("early", [2, 3])
def test_a_round_too_early_is_refused_and_the_first_that_is_not_is_answered(take, early):
    take(1)
    with pytest.raises(PeerProtocolError, match="took part in round 1 and sits out until round 4"):
        take(early)
    take(4)


def test_one_round_too_many_is_refused_for_ever(take):
    take(1)
    take(10)
    for number in (13, 1000):
        with pytest.raises(PeerProtocolError, match="took part in 2 rounds of the run, as many as"):
            take(number)


def test_attempts_of_a_round_are_one_participation(take):
    take(1)
    take(1, attempt=2)
    take(4)
    take(4, attempt=2)
    with pytest.raises(PeerProtocolError, match="in 2 rounds"):
        take(7)


def test_without_correlated_noise_a_device_may_take_part_in_every_round(take):
    for number in range(1, 6):
        take(number, run=private_plan())


def test_a_journal_written_before_rounds_were_counted_is_read(tmp_path):
    path = tmp_path / "answers"
    journal = AnsweredJournal(path)
    journal.claim("run", Answer(5, 1))
    body = '{"run":[5,1,0]}'
    path.write_text(f"{journal_module._FORMAT}\n{journal_module._digest(body)}\n{body}\n")
    assert journal.last("run") == Answer(5, 1)
    with pytest.raises(PeerProtocolError, match="sits out"):
        journal.claim("run", Answer(6, 1), SPACING)


def test_only_correlated_noise_demands_a_distance():
    assert spacing_of(round_plan(RUN)) == SPACING
    assert spacing_of(round_plan(private_plan())) is None


@pytest.mark.parametrize("run", [RUN, private_plan(privacy=NOISE, secagg=NoSecAgg())])
def test_a_device_refuses_an_early_round_before_it_trains(run):
    trained = []

    def train(message, context):
        trained.append(context.node_id)
        return message.content

    app = training_app(DevicePolicy(require_masks=False), train=train)
    first = Coordinator(app, run)
    ProtocolMemory(first.contexts[0]).begin(first.plan)
    second = Coordinator(app, run, {"round_number": 2}, contexts=first.contexts)
    with pytest.raises(PeerProtocolError, match="sits out until round 4"):
        second.ask(0, second.message("advertise" if second.bound.secagg else "upload"))
    assert trained == []
