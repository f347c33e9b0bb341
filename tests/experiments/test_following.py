"""A run is followed to its end, whoever is killed meanwhile: a SuperLink that tests play."""

import json
import subprocess
import sys
from contextlib import contextmanager

import pytest

from experiments.following import (
    CHECKPOINT,
    Following,
    Patience,
    RunFailedError,
    UnreachableError,
    read_note,
    user_of,
)
from fedcore.errors import ConfigurationError

WHOLE = {"completed_rounds": 2, "rounds": 2, "stopped": None}


def line(number, survivors=3):
    return {
        "round": number,
        "survivors": survivors,
        "invited": 3,
        "accuracy": None,
        "epsilon": 1.0,
        "seconds": 1.0,
        "aborted": [] if survivors else ["lost"],
    }


class Stage:
    """A SuperLink, its ServerApp and the time, that follow a script.

    Each start runs the next of `acts`, functions that change the folder; each answer to the
    question how runs are is the next of a run's statuses, the last one for ever.
    """

    def __init__(self, output, *acts, away=()):
        self.output, self.acts, self.away = output, list(acts), list(away)
        self.runs, self.stopped, self.said, self.time = {}, [], [], 0.0

    def sleep(self, seconds):
        self.time += seconds

    def _answer(self):
        if self.away and self.away[0][0] <= self.time < self.away[0][1]:
            msg = "gone"
            raise UnreachableError(msg)

    def start(self):
        self._answer()
        run_id = str(len(self.runs) + 1)
        self.runs = {run_id: list(self.acts.pop(0)(self) or ["finished:completed"]), **self.runs}
        return run_id

    def stop(self, run_id):
        self._answer()
        self.stopped.append(run_id)

    def statuses(self):
        self._answer()
        found = {}
        for run_id, statuses in self.runs.items():
            status = statuses.pop(0) if len(statuses) > 1 else statuses[0]
            found[run_id] = (status, "why")
        return found

    def write(self, summary=None, rounds=()):
        (self.output / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rounds))
        if summary is not None:
            (self.output / "summary.json").write_text(json.dumps(summary))

    def following(self, **patience):
        return Following(
            self, self.output, self.said.append, rehearsal=False, patience=Patience(**patience),
            sleep=self.sleep, now=lambda: self.time,
        )  # fmt: skip


def finishing(stage):
    stage.write(WHOLE, [line(1), line(2)])


def killed(stage):
    stage.write(None, [line(1)])
    return ["running", "finished:failed"]


def test_a_run_that_ends_by_itself_is_started_once(tmp_path):
    stage = Stage(tmp_path, finishing)
    (tmp_path / CHECKPOINT).mkdir()
    assert stage.following().start() == WHOLE
    assert list(stage.runs) == ["1"]
    assert not (tmp_path / CHECKPOINT).exists()
    assert [said for said in stage.said if said.startswith("round")] == [
        "round 1: 3 of 3 devices, epsilon 1, 1 s",
        "round 2: 3 of 3 devices, epsilon 1, 1 s",
    ]


def test_a_run_that_was_killed_is_started_again_and_its_rounds_are_told_once(tmp_path):
    stage = Stage(tmp_path, killed, finishing)
    assert stage.following().start() == WHOLE
    assert list(stage.runs) == ["2", "1"]
    assert "run 1 is lost (why): going on from its checkpoint" in stage.said
    assert sum(said.startswith("round 1") for said in stage.said) == 1


def test_a_run_whose_end_flower_did_not_hear_of_is_ended_again(tmp_path):
    def unheard(stage):
        finishing(stage)
        return ["finished:failed"]

    stage = Stage(tmp_path, unheard, finishing)
    assert stage.following().start() == WHOLE
    assert list(stage.runs) == ["2", "1"]


def test_a_run_that_says_why_it_ended_is_not_started_again(tmp_path):
    def refusing(stage):
        stage.write({"completed_rounds": 0, "stopped": "expected 4 nodes, found 3"})
        return ["finished:failed"]

    stage = Stage(tmp_path, refusing)
    with pytest.raises(RunFailedError, match="expected 4 nodes, found 3"):
        stage.following().start()


def test_a_run_that_a_person_stopped_is_not_started_again_until_it_is_resumed(tmp_path):
    def stopped(stage):
        stage.write(None, [line(1)])
        return ["finished:stopped"]

    stage = Stage(tmp_path, stopped, finishing)
    with pytest.raises(RunFailedError, match="finished:stopped"):
        stage.following().start()
    assert stage.following().resume() == WHOLE


def test_starting_again_without_a_round_in_between_has_an_end(tmp_path):
    stage = Stage(tmp_path, *[lambda stage: ["finished:failed"]] * 9)
    with pytest.raises(RunFailedError, match=r"started 4 times without holding a round.*--resume"):
        stage.following(restarts=3).start()
    assert len(stage.runs) == 4


def test_rounds_in_which_somebody_survived_count_as_progress_and_lost_ones_do_not(tmp_path):
    def after(*rounds):
        def act(stage):
            stage.write(None, rounds)
            return ["finished:failed"]

        return act

    acts = [after(line(1), *[line(2)] * (n > 2), line(9, survivors=0)) for n in range(4)]
    assert Stage(tmp_path, *acts, finishing).following(restarts=3).start() == WHOLE
    with pytest.raises(RunFailedError, match="3 times"):
        Stage(tmp_path, *[acts[0]] * 9).following(restarts=2).start()


def test_a_superlink_that_is_away_is_waited_for(tmp_path):
    def going_on(stage):
        stage.write(None, [line(1)])
        stage.away = [(1.0, 300.0)]
        return ["running", "finished:completed"]

    stage = Stage(tmp_path, going_on)
    sleep, at = stage.sleep, []

    def sleeping(seconds):
        sleep(seconds)
        if stage.time > 310 and not at:
            at.append(stage.write(WHOLE, [line(1), line(2)]))

    stage.sleep = sleeping
    assert stage.following().start() == WHOLE
    assert list(stage.runs) == ["1"]
    told = [said for said in stage.said if "SuperLink" in said]
    assert told[0] == "the SuperLink does not answer: waiting for it"
    assert told[1].startswith("the SuperLink is back after 28")


def test_a_superlink_that_stays_away_ends_the_command_and_says_how_to_go_on(tmp_path):
    def gone(stage):
        stage.away = [(0.0, 1e9)]
        return ["running"]

    stage = Stage(tmp_path, gone, finishing)
    with pytest.raises(RunFailedError, match=r"did not answer for 10 min.*submit --resume"):
        stage.following(outage_seconds=600).start()
    stage.away = []
    stage.runs["1"] = ["finished:failed"]
    assert stage.following().resume() == WHOLE


def test_a_superlink_that_is_not_there_at_first_is_not_waited_for(tmp_path):
    stage = Stage(tmp_path, finishing, away=[(0.0, 1e9)])
    with pytest.raises(ConfigurationError):
        stage.following().start()
    assert stage.time == 0


def test_a_start_whose_answer_got_lost_is_not_made_twice(tmp_path):
    def lost(stage):
        stage.runs = {"1": ["running", "finished:completed"]}
        stage.write(WHOLE, [line(1), line(2)])
        msg = "the answer"
        raise UnreachableError(msg)

    stage = Stage(tmp_path, lost)
    with pytest.raises(UnreachableError):
        stage.following().start()
    assert stage.following().resume() == WHOLE
    assert list(stage.runs) == ["1"]


def test_a_run_that_goes_on_is_followed_by_another_command(tmp_path):
    def going_on(stage):
        stage.write(None, [line(1)])
        raise_at.append(stage.time)
        return ["running"]

    raise_at = []
    stage = Stage(tmp_path, going_on)

    def killed_here(seconds):
        raise KeyError

    stage.sleep = killed_here
    with pytest.raises(KeyError):
        stage.following().start()
    assert read_note(tmp_path).run_id == "1"
    finishing(stage)
    stage.runs["1"] = ["finished:completed"]
    assert stage.following().resume() == WHOLE
    assert (list(stage.runs), stage.stopped) == (["1"], [])


def test_an_interrupt_stops_the_run(tmp_path):
    def going_on(stage):
        return ["running"]

    stage = Stage(tmp_path, going_on)

    def interrupted(seconds):
        raise KeyboardInterrupt

    stage.sleep = interrupted
    with pytest.raises(KeyboardInterrupt):
        stage.following().start()
    assert stage.stopped == ["1"]


@contextmanager
def another_process(folder):
    """A process that writes checkpoints there."""
    code = (
        "import sys; from pathlib import Path; "
        "from strategies.checkpoints import CheckpointFolder, Checkpoints; "
        f"kept = Checkpoints(CheckpointFolder(Path({str(folder)!r})), 'job'); "
        "print('ready', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout.readline() == b"ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_the_lock_of_the_checkpoints_names_the_process_that_lives(tmp_path):
    assert user_of(tmp_path) == 0
    with another_process(tmp_path) as process:
        assert user_of(tmp_path) == process.pid
    assert user_of(tmp_path) == 0


def test_a_server_app_that_died_is_noticed_before_the_superlink_notices(tmp_path):
    alive = []

    def dying(stage):
        stage.write(None, [line(1)])
        alive.append(another_process(tmp_path / CHECKPOINT))
        alive.append(alive[0].__enter__())
        return ["running"]

    stage = Stage(tmp_path, dying, finishing)
    sleep = stage.sleep

    def sleeping(seconds):
        sleep(seconds)
        if stage.time == 10:
            alive[1].kill()
            alive[1].wait()

    def stopped_already(run_id):
        stage.stopped.append(run_id)
        msg = "it is finished"
        raise ConfigurationError(msg)

    stage.sleep, stage.stop = sleeping, stopped_already
    try:
        assert stage.following().start() == WHOLE
    finally:
        alive[0].__exit__(None, None, None)
    assert stage.stopped == ["1"]
    assert "run 1 is lost (its ServerApp died): going on from its checkpoint" in stage.said
    assert stage.time < 30


@pytest.mark.parametrize("error", [ConfigurationError, UnreachableError])
def test_a_run_that_cannot_be_stopped_is_named_after_an_interrupt(tmp_path, error):
    stage = Stage(tmp_path, lambda stage: ["running"])

    def interrupted(seconds):
        raise KeyboardInterrupt

    def refusing(run_id):
        msg = "gone"
        raise error(msg)

    stage.sleep, stage.stop = interrupted, refusing
    with pytest.raises(KeyboardInterrupt):
        stage.following().start()
    assert "run 1 may go on, it could not be stopped: gone" in stage.said


def test_a_server_app_that_was_given_up_but_lives_is_never_joined_by_a_second(tmp_path):
    with another_process(tmp_path / CHECKPOINT) as process:
        stage = Stage(tmp_path, killed, finishing)
        with pytest.raises(RunFailedError, match=f"process {process.pid} still writes"):
            stage.following().start()
        assert list(stage.runs) == ["1"]


@pytest.mark.parametrize("text", ["", "[]", '{"run": 1}', "\xff"])
def test_a_damaged_note_is_one_line(tmp_path, text):
    (tmp_path / "run.json").write_bytes(text.encode("latin1"))
    with pytest.raises(ConfigurationError, match=r"run.json cannot be read"):
        Stage(tmp_path).following().resume()
