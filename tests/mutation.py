"""Do the tests notice? `python -m tests.mutation fedcore/secagg --minutes 20`.

Tests that pass with a fault in the code say nothing about its line. [DLS78] calls the
faults that survive what is left to test, or faults that change nothing.

    mutants     the code with one small fault each: tests/mutants.py
    tests       tests/fedcore/secagg for fedcore/secagg; run once without a fault, to learn
                how long each takes and which functions it enters
    run         a process that has loaded the libraries forks for each mutant; the child
                imports the mutated copy and runs the tests that enter the mutated function,
                the fastest first, until one fails. What runs on import concerns all tests
    verdict     killed: a test failed, or computed ten times as long; survived: all passed
    results     one line of JSON a mutant; with the same file, a later call goes on, or tries
                those again that survived (`--again`): first all with `--quick 1`, then these
                with all tests, saves most of the time, which is spent on survivors

[DLS78] https://doi.org/10.1109/C-M.1978.218136
"""

import argparse
import ast
import contextlib
import functools
import gc
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import hypothesis
import pytest

from tests.mutants import Mutant, mutants_of

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = (
    "cryptography.hazmat.primitives.ciphers.aead",
    "cryptography.hazmat.primitives.asymmetric.x25519",
    "cryptography.hazmat.primitives.asymmetric.ed25519",
    "cryptography.hazmat.primitives.kdf.hkdf",
    "numpy.random",
)
IMPORTING = 20.0  # seconds of computing until the first test
Place = tuple[str, int]  # file and first line of a function


@dataclass(frozen=True, slots=True)
class Knowledge:
    """What a run without a fault tells about the tests.

    Attributes:
        seconds: How long each takes.
        entered: The functions that each enters, with all caches empty.
        on_import: The functions that are entered before any test.
    """

    seconds: dict[str, float]
    entered: dict[str, set[Place]]
    on_import: set[Place]

    def tests_for(self, mutant: Mutant, quick: float | None) -> list[str]:
        """Return the tests that may notice, the most promising first.

        Where `quick` says so, only those that enter the function and take fewer seconds.
        """
        place = (str(mutant.path), mutant.entry)
        if mutant.entry is None:
            near = {test for test, places in self.entered.items() if _touches(places, mutant.path)}
        else:
            near = {test for test, places in self.entered.items() if place in places}
        if quick is not None:
            short = [test for test in near if self.seconds[test] < quick]
            return sorted(short, key=self.seconds.__getitem__)
        everything = not near or mutant.entry is None or place in self.on_import
        tests = self.seconds.keys() if everything else near
        return sorted(tests, key=lambda test: (test not in near, self.seconds[test]))


def _touches(places: set[Place], path: Path) -> bool:
    return any(file == str(path) for file, _ in places)


@dataclass(slots=True)
class Recorder:
    """A plugin that learns how long each test takes, and what it enters."""

    folder: Path
    knowledge: Knowledge = field(default_factory=lambda: Knowledge({}, {}, set()))
    _codes: set[object] = field(default_factory=set)
    _caches: list[object] = field(default_factory=list)

    def __post_init__(self) -> None:
        sys.setprofile(self._note)

    def _note(self, frame: object, event: str, _: object) -> None:
        if event == "call":
            self._codes.add(frame.f_code)

    def _places(self) -> set[Place]:
        """Return what was entered since the last call."""
        codes, self._codes = self._codes, set()
        inside = f"{self.folder}{os.sep}"
        return {
            (code.co_filename.removeprefix(inside), code.co_firstlineno)
            for code in codes
            if code.co_filename.startswith(inside)
        }

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        if not self.knowledge.entered:
            self.knowledge.on_import.update(self._places())
            cached = functools._lru_cache_wrapper
            self._caches = [thing for thing in gc.get_objects() if isinstance(thing, cached)]
        for cache in self._caches:
            cache.cache_clear()
        self._places()
        done = yield
        self.knowledge.entered[item.nodeid] = self._places()
        return done

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.knowledge.seconds.setdefault(report.nodeid, 0.0)
        self.knowledge.seconds[report.nodeid] += report.duration

    def pytest_sessionfinish(self) -> None:
        sys.setprofile(None)
        text = repr((self.knowledge.seconds, self.knowledge.entered, self.knowledge.on_import))
        (self.folder / "knowledge.txt").write_text(text, encoding="utf-8")


@dataclass(slots=True)
class Chosen:
    """A plugin that runs some tests in their order, each in its time, and names who fails."""

    folder: Path
    tests: Sequence[str]
    seconds: dict[str, float]

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        found = {item.nodeid: item for item in items}
        items[:] = [found[test] for test in self.tests]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        (self.folder / "running.txt").write_text(nodeid, encoding="utf-8")
        limit(3 + 10 * self.seconds[nodeid])


def limit(seconds: float) -> None:
    """End this process after so many seconds of computing, or 20 times as many of waiting."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, 20 * seconds)


def forked(folder: Path, arguments: Sequence[str], plugin: Callable[[], object]) -> int:
    """Run pytest in a fork whose world is `folder`, and return how it ended; 0 is well."""
    child = os.fork()
    if child == 0:
        status = 70
        try:
            status = _in_child(folder, arguments, plugin)
        except BaseException:  # noqa: BLE001 - a fork must end here whatever happens
            traceback.print_exc()
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def _in_child(folder: Path, arguments: Sequence[str], plugin: Callable[[], object]) -> int:
    output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(folder)
    sys.path = [str(folder), *(entry for entry in sys.path if entry not in {"", str(ROOT)})]
    for name in [name for name in sys.modules if name.split(".")[0] == "tests"]:
        del sys.modules[name]
    hypothesis.settings.register_profile(
        "mutation",
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    hypothesis.settings.load_profile("mutation")
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    options = ["-p", "no:cacheprovider", "--noconftest", "-o", "addopts="]
    options += ["-o", "filterwarnings="]  # pytest warns that the libraries were loaded before it
    options += ["--import-mode=importlib", "--tb=line", "-xq"]
    return int(pytest.main([*options, *arguments], [plugin()]))


@contextlib.contextmanager
def copy_of(house: Path) -> Iterator[Path]:
    """Give a folder with what the tests need, and no compiled files."""
    with tempfile.TemporaryDirectory(prefix="mutation-") as name:
        for part in ("fedcore", "tests"):
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(house / part, Path(name, part), ignore=ignored)
        shutil.copy(house / "pyproject.toml", name)
        yield Path(name)


def tests_of(path: Path) -> Path:
    """Return the folder of tests of the package that the module `path` is in."""
    folder = Path("tests", path.parent)
    while not (ROOT / folder).is_dir():
        folder = folder.parent
    return folder


def learn(house: Path, folders: Sequence[str]) -> Knowledge:
    """Run the tests on the code as it is.

    Raises:
        SystemExit: They do not pass.
    """
    with copy_of(house) as folder:
        if forked(folder, folders, lambda: Recorder(folder)) != 0:
            sys.exit("the tests must pass without a fault:\n" + (folder / "output.txt").read_text())
        text = (folder / "knowledge.txt").read_text(encoding="utf-8")
    return Knowledge(*ast.literal_eval(text))


def judge(
    house: Path, mutants: object, verdicts: object, knowledge: Knowledge, quick: float | None
) -> None:
    """Take mutants from one queue and put verdicts into another until None comes."""
    with copy_of(house) as folder:
        files = sorted({test.split("::")[0] for test in knowledge.seconds})
        sys.dont_write_bytecode = False
        forked(folder, ["--collect-only", *files], object)  # leaves compiled files behind
        sys.dont_write_bytecode = True
        while (mutant := mutants.get()) is not None:
            file = folder / mutant.path
            before = file.stat()
            file.write_bytes(mutant.applied())
            os.utime(file, (mutant.start, mutant.start))  # older than any compiled file
            begun = time.monotonic()
            killer = first_failure(folder, knowledge, knowledge.tests_for(mutant, quick))
            file.write_bytes(mutant.source)
            os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
            verdicts.put((mutant, killer, time.monotonic() - begun))


def first_failure(folder: Path, knowledge: Knowledge, tests: Sequence[str]) -> str | None:
    """Return the first test that fails or does not end; None if there is none."""
    running = folder / "running.txt"
    running.write_text("import", encoding="utf-8")

    def plugin() -> object:
        limit(IMPORTING)
        return Chosen(folder, tests, knowledge.seconds)

    files = sorted({test.split("::")[0] for test in tests})
    if not files:
        return None
    status = forked(folder, files, plugin)
    return None if status == 0 else running.read_text(encoding="utf-8")


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> None:
    """Mutate, test, report."""
    parser = argparse.ArgumentParser(description="Insert faults, and see whether a test fails.")
    parser.add_argument("paths", nargs="+", type=Path, help="files or packages, from the root")
    parser.add_argument("--minutes", type=float, default=20, help="a sample, if that is too short")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="which sample")
    parser.add_argument(
        "--quick", type=float, help="leave out tests that take more seconds, or run on import only"
    )
    parser.add_argument("--results", type=Path, help="a file that verdicts are added to")
    parser.add_argument("--again", action="store_true", help="try its survivors again")
    terms = parser.parse_args()
    files = [
        file.resolve().relative_to(ROOT)
        for path in terms.paths
        for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path])
    ]
    for library in LIBRARIES:
        importlib.import_module(library)
    with copy_of(ROOT) as house:  # the tree may be edited meanwhile
        faults = [mutant for file in files for mutant in mutants_of(house, file)]
        random.Random(terms.seed).shuffle(faults)
        judged = verdicts_in(terms.results)
        wanted = False if terms.again else None
        left = [mutant for mutant in faults if judged.get(mutant.key) is wanted]
        knowledge = learn(house, sorted({str(tests_of(file)) for file in files}))
        say(
            f"{len(faults)} mutants of {len(files)} files, {len(left)} to try; "
            f"{len(knowledge.seconds)} tests take {sum(knowledge.seconds.values()):.0f} s"
        )
        for mutant, killer, seconds in hunt(house, left, knowledge, terms):
            judged[mutant.key] = killer is not None
            record(terms.results, mutant, killer, seconds)
    report([mutant for mutant in faults if mutant.key in judged], judged, len(faults))


def hunt(
    house: Path, faults: Sequence[Mutant], knowledge: Knowledge, terms: argparse.Namespace
) -> Iterator[tuple[Mutant, str | None, float]]:
    """Yield each mutant, the test that killed it, and the seconds taken, until the time is up."""
    context = get_context("fork")
    waiting, verdicts = context.Queue(), context.Queue()
    workers = [
        context.Process(target=judge, args=(house, waiting, verdicts, knowledge, terms.quick))
        for _ in range(terms.processes)
    ]
    for worker in workers:
        worker.start()
    end, fed, told = time.monotonic() + 60 * terms.minutes, 0, 0
    while True:
        if time.monotonic() < end and fed < len(faults) and fed - told < 2 * terms.processes:
            waiting.put(faults[fed])
            fed += 1
        elif told < fed:
            yield verdicts.get()
            told += 1
        else:
            break
    for _ in workers:
        waiting.put(None)
    for worker in workers:
        worker.join()


def verdicts_in(results: Path | None) -> dict[str, bool]:
    """Return which mutants were killed, and which survived, by the last word on each."""
    if results is None or not results.exists():
        return {}
    lines = map(json.loads, results.read_text(encoding="utf-8").splitlines())
    return {line["mutant"]: line["killer"] is not None for line in lines}


def record(results: Path | None, mutant: Mutant, killer: str | None, seconds: float) -> None:
    """Print who survived, and add the verdict to the file."""
    if killer is None:
        say(f"survived  {mutant.path}:{mutant.line}\n{mutant.diff()}")
    if results is not None:
        line = {"mutant": mutant.key, "line": mutant.line, "killer": killer}
        line |= {"seconds": round(seconds, 2), "diff": mutant.diff()}
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def report(tested: Sequence[Mutant], judged: dict[str, bool], total: int) -> None:
    """Say how many were killed, by file."""
    killed = Counter(mutant.path for mutant in tested if judged[mutant.key])
    for path, count in sorted(Counter(mutant.path for mutant in tested).items()):
        say(f"{path}: {killed[path]} of {count} killed")
    sample = "all" if len(tested) == total else f"a sample of {total}"
    say(f"killed {killed.total()} of {len(tested)} mutants ({sample}): "
        f"{100 * killed.total() / max(len(tested), 1):.1f} %")  # fmt: skip


if __name__ == "__main__":
    main()
