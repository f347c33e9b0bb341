"""Do the tests notice? `python -m tests.mutation fedcore/secagg --minutes 20`.

A mutant is the code with one small fault: a comparison shifted, a constant off by one, a
`raise` that is not reached, `and` for `or`, a union for an intersection. Tests that still
pass say nothing about that line. [DLS78] calls the survivors what is left to test, or
faults that change nothing.

    edits       byte ranges of one file and what stands there instead, found in its syntax tree
    tests       tests/fedcore/secagg for fedcore/secagg, those of the mutated module first
    run         a process that has loaded the libraries forks for each mutant and lets the
                child import the mutated copy, so a mutant costs little but its tests
    verdict     killed: a test failed or did not end; survived: all passed, the slow as well

What does nothing at run time is left alone: annotations, decorators, messages, docstrings.

[DLS78] https://doi.org/10.1109/C-M.1978.218136
"""

import argparse
import ast
import contextlib
import importlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = (
    "cryptography.hazmat.primitives.ciphers.aead",
    "cryptography.hazmat.primitives.asymmetric.x25519",
    "cryptography.hazmat.primitives.asymmetric.ed25519",
    "cryptography.hazmat.primitives.kdf.hkdf",
    "numpy.random",
)
COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
    ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult, ast.Div: ast.Mult, ast.Mod: ast.Mult,
    ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitXor: ast.BitAnd,
}  # fmt: skip
BOOLEANS = {ast.And: ast.Or, ast.Or: ast.And}
Edit = tuple[ast.AST, str]


@dataclass(frozen=True, slots=True)
class Mutant:
    """One fault.

    Attributes:
        path: File, relative to the root.
        source: What it holds without the fault.
        line: Where.
        start: First byte that is replaced.
        end: The byte after the last one.
        new: What stands there instead.
    """

    path: Path
    source: bytes = field(repr=False)
    line: int
    start: int
    end: int
    new: str

    def applied(self) -> bytes:
        """Return the faulty file."""
        source = self.source
        return source[: self.start] + self.new.encode() + source[self.end :]

    def diff(self) -> str:
        """Return the lines that differ."""
        source = self.source
        first = source.rfind(b"\n", 0, self.start) + 1
        last = source.find(b"\n", self.end)
        old = source[first:last].decode()
        new = (source[first : self.start] + self.new.encode() + source[self.end : last]).decode()
        lines = [f"    - {line.strip()}" for line in old.splitlines()]
        return "\n".join(lines + [f"    + {line.strip()}" for line in new.splitlines()])


def mutants_of(house: Path, path: Path) -> list[Mutant]:
    """Return all mutants of the file `path` in the tree `house`."""
    source = (house / path).read_bytes()
    starts = [0, *(at + 1 for at, byte in enumerate(source) if byte == ord("\n"))]
    return [
        Mutant(
            path,
            source,
            node.lineno,
            starts[node.lineno - 1] + node.col_offset,
            starts[node.end_lineno - 1] + node.end_col_offset,
            new,
        )
        for node, new in edits(ast.parse(source))
    ]


def edits(tree: ast.AST) -> Iterator[Edit]:
    """Yield what may be replaced in `tree`, and by what."""
    if _is_silent(tree):
        return
    yield from _faults(tree)
    for name, value in ast.iter_fields(tree):
        if name in {"annotation", "returns", "decorator_list", "type_params"}:
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from edits(child)


def _is_silent(node: ast.AST) -> bool:
    """Whether a fault in `node` could only change a text or a type."""
    match node:
        case ast.Assign(targets=[ast.Name("msg" | "__all__")]) | ast.Import() | ast.ImportFrom():
            return True
        case ast.AnnAssign(annotation=ast.Name("TypeAlias")) | ast.JoinedStr():
            return True
        case ast.Call(func=ast.Name("TypeVar" | "cast")):
            return True
    return False


def _faults(node: ast.AST) -> Iterator[Edit]:
    match node:
        case ast.Raise():
            yield node, "pass"
        case ast.If(body=body) if not any(isinstance(line, ast.Raise) for line in body):
            first, last = body[0], body[-1]
            block = ast.copy_location(ast.Pass(), first)
            block.end_lineno, block.end_col_offset = last.end_lineno, last.end_col_offset
            yield block, "pass"
        case ast.Constant(bool() as value):
            yield node, repr(not value)
        case ast.Constant(int() | float() as value):
            yield node, f"({value + 1!r})"
            yield node, f"({value - 1!r})"
        case ast.expr():
            for other in _faulty(node):
                yield node, f"({ast.unparse(other)})"


def _faulty(node: ast.expr) -> Iterator[ast.expr]:
    match node:
        case ast.Compare(left, ops, comparators):
            for at, operator in enumerate(ops):
                other = [*ops[:at], COMPARISONS[type(operator)](), *ops[at + 1 :]]
                yield ast.Compare(left, other, comparators)
        case ast.BoolOp(op, values):
            yield ast.BoolOp(BOOLEANS[type(op)](), values)
        case ast.BinOp(left, op, right) if type(op) in OPERATORS:
            yield ast.BinOp(left, OPERATORS[type(op)](), right)
        case ast.UnaryOp(ast.Not() | ast.USub(), operand):
            yield operand
        case ast.IfExp(test, body, orelse):
            yield ast.IfExp(test, orelse, body)
        case ast.Call(ast.Name("sorted"), [argument], _):
            yield ast.Call(ast.Name("list"), [argument], [])


class Stopwatch:
    """A plugin that knows how long each test took, and which failed."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: object) -> None:
        self.seconds[report.nodeid] += report.duration


def run_tests(folder: Path, arguments: Sequence[str], seconds: float) -> int | None:
    """Run pytest in a fork whose world is `folder`; None if it had to be ended."""
    child = os.fork()
    if child == 0:
        status = 70
        try:
            status = _in_child(folder, arguments)
        except BaseException:  # noqa: BLE001 - a fork must end here whatever happens
            traceback.print_exc()
        finally:
            os._exit(status)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _in_child(folder: Path, arguments: Sequence[str]) -> int:
    output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(folder)
    sys.path = [str(folder), *(entry for entry in sys.path if entry not in {"", str(ROOT)})]
    sys.modules.pop("tests", None)
    sys.dont_write_bytecode = True
    hypothesis.settings.register_profile(
        "mutation",
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    hypothesis.settings.load_profile("mutation")
    watch = Stopwatch()
    options = ["-p", "no:cacheprovider", "-p", "no:xdist", "--noconftest", "-o", "addopts="]
    options += ["-o", "filterwarnings="]  # pytest warns that the libraries were loaded before it
    status = pytest.main(
        [*options, "--import-mode=importlib", "--tb=line", "-xq", *arguments], [watch]
    )
    lines = (f"{seconds:.3f} {test}" for test, seconds in watch.seconds.items())
    (folder / "seconds.txt").write_text("\n".join(lines), encoding="utf-8")
    return int(status)


@contextlib.contextmanager
def copy_of(house: Path) -> Iterator[Path]:
    """Give a folder with what the tests need, and no compiled files."""
    with tempfile.TemporaryDirectory(prefix="mutation-") as name:
        for part in ("fedcore", "tests"):
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(house / part, Path(name, part), ignore=ignored)
        shutil.copy(house / "pyproject.toml", name)
        yield Path(name)


def judge(
    house: Path, mutants: object, verdicts: object, slow: Sequence[str], seconds: float
) -> None:
    """Take mutants from one queue and put verdicts into another until None comes."""
    with copy_of(house) as folder:
        while (mutant := mutants.get()) is not None:
            (folder / mutant.path).write_bytes(mutant.applied())
            quick = [option for test in slow for option in ("--deselect", test)]
            own, others = tests_of(mutant.path)
            for tests in ([*own, *quick] if own else [], [*others, *quick], slow):
                status = run_tests(folder, tests, seconds) if tests else 0
                if status != 0:
                    break
            (folder / mutant.path).write_bytes(mutant.source)
            verdicts.put((mutant, status != 0))


def tests_of(path: Path) -> tuple[list[str], list[str]]:
    """Return the test files of a package: those of the module `path`, and the others."""
    folder = ROOT / "tests" / path.parent
    while not folder.is_dir():
        folder = folder.parent
    files = sorted(folder.glob("test_*.py"))
    own = [file for file in files if path.stem in file.stem]
    others = [file for file in files if file not in own]
    return _names(own), _names(others)


def _names(files: Sequence[Path]) -> list[str]:
    return [str(file.relative_to(ROOT)) for file in files]


def slow_tests(house: Path, paths: Sequence[Path], limit: float) -> tuple[list[str], float]:
    """Run the tests on the code as it is; return those above `limit` and the time of all.

    Raises:
        SystemExit: They do not pass.
    """
    tests = sorted({test for path in paths for group in tests_of(path) for test in group})
    with copy_of(house) as folder:
        if run_tests(folder, tests, 900) != 0:
            sys.exit("the tests must pass without a fault:\n" + (folder / "output.txt").read_text())
        taken = [line.split(" ", 1) for line in (folder / "seconds.txt").read_text().splitlines()]
    slow = [test for seconds, test in taken if float(seconds) > limit]
    return slow, sum(float(seconds) for seconds, _ in taken)


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> None:
    """Mutate, test, report."""
    parser = argparse.ArgumentParser(description="Insert faults, and see whether a test fails.")
    parser.add_argument("paths", nargs="+", type=Path, help="files or packages, from the root")
    parser.add_argument("--minutes", type=float, default=20, help="a sample, if that is too short")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--slower-than", type=float, default=0.5, help="seconds; tried last")
    parser.add_argument("--seed", type=int, default=0, help="which sample")
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
        slow, seconds = slow_tests(house, files, terms.slower_than)
        say(
            f"{len(faults)} mutants of {len(files)} files; the tests take {seconds:.0f} s, "
            f"{len(slow)} of them are tried last"
        )
        survivors, killed = hunt(house, faults, slow, terms, 30 + 4 * seconds)
    report(survivors, killed, len(faults))


def hunt(
    house: Path,
    faults: Sequence[Mutant],
    slow: Sequence[str],
    terms: argparse.Namespace,
    seconds: float,
) -> tuple[list[Mutant], list[Mutant]]:
    """Return who survived and who was killed before the time was up."""
    context = get_context("fork")
    waiting, verdicts = context.Queue(), context.Queue()
    workers = [
        context.Process(target=judge, args=(house, waiting, verdicts, slow, seconds))
        for _ in range(terms.processes)
    ]
    for worker in workers:
        worker.start()
    end, fed = time.monotonic() + 60 * terms.minutes, 0
    survivors: list[Mutant] = []
    killed: list[Mutant] = []
    while True:
        in_flight = fed - len(survivors) - len(killed)
        if time.monotonic() < end and fed < len(faults) and in_flight < 2 * terms.processes:
            waiting.put(faults[fed])
            fed += 1
            continue
        if not in_flight:
            break
        mutant, dead = verdicts.get()
        (killed if dead else survivors).append(mutant)
        if not dead:
            say(f"survived  {mutant.path}:{mutant.line}\n{mutant.diff()}")
    for _ in workers:
        waiting.put(None)
    for worker in workers:
        worker.join()
    return survivors, killed


def report(survivors: Sequence[Mutant], killed: Sequence[Mutant], total: int) -> None:
    """Say how many were killed, by file."""
    tested = len(survivors) + len(killed)
    lost = Counter(mutant.path for mutant in survivors)
    for path, count in sorted(Counter(m.path for m in (*survivors, *killed)).items()):
        say(f"{path}: {count - lost[path]} of {count} killed")
    sample = "all" if tested == total else f"a sample of {total}"
    say(f"killed {len(killed)} of {tested} mutants ({sample}): "
        f"{100 * len(killed) / max(tested, 1):.1f} %")  # fmt: skip


if __name__ == "__main__":
    main()
