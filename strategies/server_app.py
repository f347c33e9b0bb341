"""The ServerApp: the same on every engine.

It reads one `Job` from the run configuration, finds the nodes, wraps the grid it was
given, and starts an unmodified Flower strategy on it:

    strategy > CohortGrid > SecureGrid > (DroppingGrid) > the engine's grid
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Strategy

from fedcore.crypto import Entropy, SystemEntropy
from fedcore.engine import (
    DroppingGrid,
    DropScript,
    HeavyTailed,
    InProcessGrid,
    PacedGrid,
    to_arrays,
    to_record,
    unblocked,
)
from fedcore.errors import BudgetExhaustedError, ConfigurationError
from fedcore.job import Buffered, Job, Poisson, Preflight, check, of_examples
from fedcore.job.levels import NOISE_KEY
from fedcore.models import Structured, Widths, build, fitting_widths, prune, pruned_widths
from fedcore.pipeline import (
    CoordinatorNoise,
    FreshNoise,
    SeedHelper,
)
from fedcore.privacy import MatrixGaussian, PrivacyLedger
from fedcore.telemetry import RoundReport
from fedcore.training import Evaluation, ExampleLevelPrivacy, evaluate, get_arrays, set_arrays
from strategies.backoff import Absences
from strategies.buffered_grid import BufferedGrid, check_ins_of
from strategies.checkpoint import Checkpoint
from strategies.checkpoints import (
    LOST,
    CheckpointFolder,
    Checkpoints,
    after_lost_rounds,
    job_digest,
)
from strategies.cohort import CohortGrid
from strategies.delegating import Delegating
from strategies.exchange import RETRY_AT_ONCE, RETRY_WITH_PATIENCE
from strategies.factory import build_strategy
from strategies.first import NO_DELTA
from strategies.fleet import find_fleet
from strategies.matrix_run import MatrixRun
from strategies.patience import patience_of
from strategies.plain_grid import PlainGrid
from strategies.progress import Arrays, Observer, Past, Progress, Resumed, StalledError
from strategies.pruning import PrunedStrategy
from strategies.refusals import most_frequent
from strategies.sampling import Cohorts, refused_size
from strategies.secure_grid import SecureGrid
from strategies.strategy_state import gathered_by, give_back
from strategies.surroundings import clock_of, connect_helper, describe_by, path_in

MOST_ABORTED_IN_A_ROW = 3


def build_server_app(
    observer: Observer | None = None,
    preflight: Preflight | None = None,
    *,
    entropy: Entropy | None = None,
    retry_after: Sequence[float] = RETRY_AT_ONCE,
    noise_file: Path | None = None,
    checkpoints: CheckpointFolder | None = None,
) -> ServerApp:
    """Return the ServerApp.

    Args:
        observer: Told about every round; nobody if None.
        preflight: Of the same job, if the caller has it already.
        entropy: Of the coordinator's secret choices, and of the noise that it adds; the
            operating system's if None. For simulations that must be repeatable.
        retry_after: As in `SecureGrid`.
        noise_file: Where the secret of correlated noise is kept; by default the file that the
            run configuration names as `noise-file`; if it names none, with the checkpoints, and
            without them only in memory.
        checkpoints: Where the run is kept after every round, and goes on from if it was kept
            there before; by default the folder that the run configuration names as
            `checkpoint`, and if it names none, nowhere.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        job = (
            Job.from_json(str(context.run_config["job"]))
            if context.run_config.get("job")
            else Job()
        )
        checked = preflight
        if checked is None:
            checked = check(job)
            job = checked.job  # its noise is stated now
        folder = checkpoints
        if folder is None and (named := path_in(context, "checkpoint")) is not None:
            folder = CheckpointFolder(named)
        with ExitStack() as stack:
            kept = None
            if folder is not None:
                kept = stack.enter_context(closing(Checkpoints(folder, job_digest(job))))
            _Run(
                stack.enter_context(unblocked(grid)),
                job,
                checked,
                observer,
                retry_after=retry_after,
                entropy=entropy or SystemEntropy(),
                noise_file=noise_file or path_in(context, "noise-file"),
                checkpoints=kept,
            ).start()

    return app


class _Run:
    """One run of a job on a grid."""

    def __init__(
        self,
        grid: Grid,
        job: Job,
        preflight: Preflight,
        observer: Observer | None,
        *,
        retry_after: Sequence[float],
        entropy: Entropy,
        noise_file: Path | None,
        checkpoints: Checkpoints | None,
    ) -> None:
        self._job = job
        self._retry_after = retry_after
        self._entropy = entropy
        self._noise_file = noise_file
        self._preflight = preflight
        self._observer = observer
        self._clock = clock_of(job, grid)
        dataset = preflight.dataset
        self._model = build(job.model, dataset.input_shape, dataset.classes, job.seed)
        self._widths: Widths | None = None
        self._report: RoundReport | None = None
        local = of_examples(job.privacy)
        self._examples = (
            None
            if local is None
            else PrivacyLedger(delta=local.delta, epsilon_budget=local.epsilon_budget)
        )
        self._aborted_in_a_row = 0
        self._checkpoints = checkpoints
        self._past: list[Past] = []
        self._arrays: Arrays = get_arrays(self._model)
        self._unpruned: Arrays | None = None
        self._began = self._clock.now()
        self._nodes = grid if isinstance(grid, InProcessGrid) else None
        self._strategy = self._fresh_strategy()
        self._kept_ledger = PrivacyLedger(delta=NO_DELTA)
        found = None if checkpoints is None else self._found(checkpoints)
        known = None if found is None or self._nodes is not None else found.labels
        fleet = find_fleet(grid, job, self._clock, known)
        self._labels, self._profiles = dict(fleet.labels), fleet.profiles
        self._rounds, self._secure = self._wrap(grid, found)
        self._initial = self._evaluate() if observer is not None else None
        if found is not None:
            self._go_on(found)

    def start(self) -> None:
        """Run the strategy until its last round, or until the budget is spent."""
        job, over = self._job, len(self._past)
        if self._observer is not None and self._initial is not None:
            self._observer.started(job, self._preflight, self._initial)
            if over:
                ledger, examples = self._ledgers()
                past = tuple(self._past)
                self._observer.resumed(
                    Resumed(past, self._arrays, self._unpruned, ledger, examples)
                )
        self._save()
        if over >= job.rounds:
            return
        try:
            Delegating(self._strategy, over).start(
                grid=self._rounds,
                initial_arrays=to_record(self._arrays),
                num_rounds=job.rounds - over,
                timeout=job.stage_seconds,
                train_config=self._train_config(),
                evaluate_fn=lambda number, record: self._after_round(over + number, record),
            )
        except (BudgetExhaustedError, StalledError) as error:
            # The last model was handed to the observer; nothing of this round was released.
            if self._observer is not None:
                self._observer.stopped(str(error))

    def _fresh_strategy(self) -> Strategy:
        job = self._job
        cohort = 0 if isinstance(job.sampling, Poisson) else job.invited
        fresh = partial(build_strategy, job.strategy, cohort=cohort)
        if isinstance(job.pruning, Structured):
            return PrunedStrategy(fresh, self._shrunk, job.pruning.after_round)
        return fresh()

    def _found(self, checkpoints: Checkpoints) -> Checkpoint | None:
        """Return where the run goes on, with the nodes of a simulation as they were then."""
        found, job = checkpoints.latest(), self._job
        if found is None:
            return None
        self._kept_ledger = found.ledger  # of rounds that are over
        repeatable = checkpoints.folder.repeatable
        if repeatable and self._nodes is None and job.error_feedback and found.round_number:
            msg = (
                "error_feedback=true keeps on each device what it has not sent, and this engine "
                "forgets that with its process: start anew, or use engine=in_process, which keeps "
                "it in the checkpoint"
            )
            raise ConfigurationError(msg)
        if not repeatable:
            found = after_lost_rounds(
                found,
                checkpoints.begun,
                self._preflight.example_release,
                private=job.plan is not None and job.plan.private,
            )
        if self._nodes is not None:
            self._nodes.restore_nodes(found.nodes)
        return found

    def _go_on(self, found: Checkpoint) -> None:
        """Take over what an earlier process had when it stopped."""
        self._past = list(found.past)
        self._arrays, self._unpruned = found.model, found.unpruned
        self._examples = found.examples
        self._began = self._clock.now() - (self._past[-1].seconds if self._past else 0.0)
        give_back(self._strategy, found.strategy)
        self._load(found.model)
        for past in reversed(self._past):
            if past.report.survivors or LOST in past.report.aborted:
                break
            self._aborted_in_a_row += 1
        self._aborted_in_a_row %= MOST_ABORTED_IN_A_ROW  # who starts again wants another try

    def _wrap(self, grid: Grid, found: Checkpoint | None) -> tuple[Grid, SecureGrid | None]:
        job, plan, noise = self._job, self._job.plan, self._noise(found)
        over = 0 if found is None else found.round_number
        if isinstance(job.faults, DropScript):
            grid = DroppingGrid(grid, job.faults, describe_by(self._labels))
        if isinstance(job.pace, HeavyTailed):
            grid = PacedGrid(grid, job.pace, describe_by(self._labels), self._clock)
        cohorts = self._cohorts = Cohorts(
            self._labels,
            job.sampling,
            size=job.invited,
            devices=len(self._labels) if self._profiles else job.clients,
            seed=job.seed,
            entropy=self._entropy,
            first_round=over + 1,
            spacing=noise if isinstance(noise, MatrixRun) else None,
            absences=Absences(job.backoff, None if found is None else found.absences),
        )
        wanted = job.clients_per_round if job.invited > job.clients_per_round else None
        if plan is None:
            nothing = PrivacyLedger(delta=NO_DELTA)
            plain = PlainGrid(
                grid,
                self._labels,
                self._keep,
                on_begin=lambda number: self._note(number, nothing),
                after_round=over,
                wanted=wanted,
                seed=job.seed,
                on_outcome=cohorts.note,
            )
            return CohortGrid(plain, cohorts, on_skip=plain.skip_round), None
        helper = None
        if isinstance(plan.secagg, SeedHelper):
            helper, key = connect_helper(job)
            plan = replace(plan, secagg=replace(plan.secagg, public_key=key))
        make: Callable[..., SecureGrid] = SecureGrid
        if isinstance(job.schedule, Buffered):
            kept = self._checkpoints
            check_ins = check_ins_of(
                job,
                job.schedule,
                grid,
                self._clock,
                self._labels,
                resumable=self._nodes is not None and kept is not None and kept.folder.repeatable,
                found=None if found is None else found.check_ins,
            )
            make = partial(BufferedGrid, check_ins=check_ins)
        secure = make(
            grid,
            plan,
            on_round=self._keep,
            labels=self._labels,
            helper=helper,
            clock=self._clock,
            drawn=None if isinstance(job.schedule, Buffered) else cohorts.executed,
            retry_after=self._retry_after,
            noise=noise,
            ledger=None if found is None else found.ledger,
            state=None if found is None else found.grid,
            note=self._note,
            wanted=wanted,
            patience=patience_of(job, plan, self._preflight.layouts[0], self._profiles),
            on_outcome=cohorts.note,
        )
        if isinstance(job.schedule, Buffered):
            return secure, secure
        refusal = partial(refused_size, plan, self._preflight.layouts)
        return CohortGrid(secure, cohorts, refusal=refusal, on_skip=secure.skip_round), secure

    def _noise(self, found: Checkpoint | None) -> CoordinatorNoise:
        """Return what the coordinator adds to sums, if the job wants that."""
        privacy = self._job.privacy
        if not isinstance(privacy, MatrixGaussian):
            return FreshNoise(self._entropy)
        if found is not None and found.noise is not None:
            return MatrixRun.from_bytes(found.noise)
        folder = None if self._checkpoints is None else self._checkpoints.folder
        path = self._noise_file
        if path is None and folder is not None and not folder.repeatable:
            path = folder.path / "noise"
        if found is None or path is None:
            begun = MatrixRun.resume(path) if path is not None and path.exists() else None
            # Stopped before the first checkpoint, and so before the first round.
            if begun is not None and folder is not None and not (begun.tape.last or begun.taken):
                return begun
            return MatrixRun.start(privacy, self._entropy, path)
        run = MatrixRun.resume(path)
        run.check(privacy, self._kept_ledger)
        run.waste(found.round_number)
        return run

    def _note(self, round_number: int, ledger: PrivacyLedger) -> None:
        if self._checkpoints is not None:
            self._checkpoints.note(round_number, ledger)

    def _save(self) -> None:
        """Keep everything; from here on the round that was held last is over for good."""
        if self._checkpoints is None:
            return
        secure = self._secure
        noise = None if secure is None else secure.noise
        ledger = PrivacyLedger(delta=NO_DELTA) if secure is None else secure.ledger
        self._checkpoints.save(
            Checkpoint(
                job=self._checkpoints.job,
                round_number=len(self._past),
                past=tuple(self._past),
                ledger=ledger,
                examples=self._examples,
                model=self._arrays,
                unpruned=self._unpruned,
                strategy=gathered_by(self._strategy),
                grid=None if secure is None else secure.state,
                noise=noise.to_bytes() if isinstance(noise, MatrixRun) and not noise.path else None,
                nodes={} if self._nodes is None else self._nodes.node_states(),
                labels=self._labels,
                check_ins=secure.kept if isinstance(secure, BufferedGrid) else None,
                absences=self._cohorts.absences.known,
            )
        )

    def _keep(self, report: RoundReport) -> None:
        self._report = replace(report, paused=self._cohorts.paused)

    def _after_round(self, round_number: int, record: ArrayRecord) -> MetricRecord | None:
        """Test the new model and tell the observer; Flower calls it after each round."""
        if self._report is None:
            self._check_next_round(round_number + 1)
            return None
        arrays = to_arrays(record)
        self._load(arrays)
        last = round_number == self._job.rounds
        tested = last or round_number % self._job.evaluate_every == 0
        evaluation = self._evaluate() if tested else None
        ledger, examples = self._account(round_number)
        report = replace(self._report, epsilon=ledger.epsilon) if ledger.releases else self._report
        seconds = self._clock.now() - self._began
        progress = Progress(report, evaluation, arrays, ledger, examples, seconds)
        pruning = self._job.pruning
        if isinstance(pruning, Structured) and round_number <= pruning.after_round:
            self._unpruned = arrays
        self._arrays = arrays
        self._past.append(progress.past)
        if self._observer is not None:
            self._observer.round_finished(progress)
        self._save()
        self._check_progress(report)
        if not last:
            self._check_next_round(round_number + 1)
        if evaluation is None:
            return None
        return MetricRecord({"loss": evaluation.loss, "accuracy": evaluation.accuracy})

    def _check_progress(self, report: RoundReport) -> None:
        """Stop a run in which nothing gets through any more."""
        self._aborted_in_a_row = 0 if report.survivors else self._aborted_in_a_row + 1
        if self._aborted_in_a_row >= MOST_ABORTED_IN_A_ROW:
            why = report.aborted[-1] if report.aborted else "no client answered"
            why += most_frequent(report.refusals)
            msg = f"{self._aborted_in_a_row} rounds in a row were aborted; the last one: {why}"
            raise StalledError(msg)

    def _train_config(self) -> ConfigRecord:
        """Return what devices are told beside the model: the noise of their training."""
        local = of_examples(self._job.privacy)
        return ConfigRecord({} if local is None else {NOISE_KEY: local.stated_noise})

    def _account(self, round_number: int) -> tuple[PrivacyLedger, PrivacyLedger | None]:
        """Return the ledger of this run, and that of its examples if it counts devices."""
        release = self._preflight.example_release
        if self._examples is not None and release is not None:
            self._examples = self._examples.record(replace(release, round_number=round_number))
        return self._ledgers()

    def _ledgers(self) -> tuple[PrivacyLedger, PrivacyLedger | None]:
        """Return the ledger of this run, and the other one if both units are counted."""
        if self._examples is not None and isinstance(self._job.privacy, ExampleLevelPrivacy):
            return self._examples, None
        ledger = PrivacyLedger(delta=NO_DELTA) if self._secure is None else self._secure.ledger
        return ledger, self._examples

    def _check_next_round(self, round_number: int) -> None:
        """Stop before local training exceeds its budget; sums are checked by `SecureGrid`.

        Raises:
            BudgetExhaustedError: The round must not begin.
        """
        release = self._preflight.example_release
        if self._examples is not None and release is not None:
            self._examples.record(replace(release, round_number=round_number))

    def _load(self, arrays: Arrays) -> None:
        """Put `arrays` into a model of their size: before or after pruning."""
        job, dataset = self._job, self._preflight.dataset
        widths = fitting_widths(job.model, job.pruning, arrays)
        if widths != self._widths:
            self._widths = widths
            self._model = build(job.model, dataset.input_shape, dataset.classes, job.seed, widths)
        set_arrays(self._model, arrays)

    def _shrunk(self, record: ArrayRecord) -> ArrayRecord:
        """Return the pruned model; as it is if it was pruned before."""
        widths = pruned_widths(self._job.model, self._job.pruning)
        self._load(to_arrays(record))
        if widths is None or self._widths == widths:
            return record
        small = prune(self._model, self._preflight.dataset.input_shape, widths)
        return to_record(get_arrays(small))

    def _evaluate(self) -> Evaluation:
        dataset = self._preflight.dataset
        return evaluate(self._model, dataset.x_test, dataset.y_test)


app = build_server_app(retry_after=RETRY_WITH_PATIENCE)
