"""The laws of the house that neither ruff, mypy nor import-linter can check.

Layers are contracts in pyproject.toml. Here stand the rest: what an import
costs, which doors of Flower are open, what a package's front may hold, what a
file may mention, and that the lock pins what pyproject.toml asks for.
"""

import ast
import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("fedcore", "strategies", "clients", "experiments")
SOURCES = sorted(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))
HEAVY = {"torch", "opacus", "ray"}

TOP_LEVEL = {
    ".ci", ".dockerignore", ".editorconfig", ".gitattributes", ".gitignore", "CHANGELOG.md",
    "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "SECURITY.md", "clients", "conf", "docs",
    "experiments", "fedcore", "pyproject.toml", "requirements.lock", "strategies", "tests",
}  # fmt: skip

FLOWER_DOORS = {"flwr.app", "flwr.clientapp", "flwr.serverapp"}
# Files that reach behind those doors, each with what it takes there.
FLOWER_ADAPTERS: dict[str, set[str]] = {
    "fedcore/engine/flower_private.py": {
        *("flwr.common.constant", "flwr.common.serde", "flwr.proto", "flwr.supercore"),
    },
    "fedcore/engine/run.py": {"flwr.simulation"},
    "experiments/edge/flower_board.py": {  # no public way to answer a message in one's own process
        *("flwr.app.message", "flwr.cli.install", "flwr.clientapp.client_app"),
        *("flwr.clientapp.utils", "flwr.common", "flwr.proto", "flwr.supercore", "flwr.supernode"),
    },
    "experiments/bench_secagg.py": {"flwr.common.secure_aggregation"},  # what is compared
}

# Spelled so that this file does not match itself.
MACHINE_TRACES = re.compile(
    r"(?<![\w.])/(?:wo[r]k|ro[o]t|ho[m]e|Use[r]s)/"
    r"|(?:index|extra-index)-[u]rl|find-[l]inks|trusted-[h]ost|--[r]egistry"
    r"|://[^/\s]*\.(?:internal|local|corp|lan)\b"
    r"|(?<![\d.=])(?:10\.\d{1,3}|192\.168|172\.(?:1[6-9]|2\d|3[01]))(?:\.\d{1,3}){2}(?![\d.])"
)


def house_files() -> list[Path]:
    """All files of the repository: what git knows or would add, else what is not ignored."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listed.returncode == 0 and listed.stdout:
        names = listed.stdout.rstrip("\0").split("\0")
        return [path for path in (ROOT / name for name in names) if path.is_file()]
    ignored = [".git", *(line.rstrip("/") for line in lines_of(ROOT / ".gitignore"))]
    return [
        path
        for path in ROOT.rglob("*")
        if path.is_file()
        and not any(fnmatch(part, pattern) for part in inside(path).parts for pattern in ignored)
    ]


def inside(path: Path) -> Path:
    return path.relative_to(ROOT)


def lines_of(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported_modules(tree: ast.AST) -> set[str]:
    """Every module that an import statement anywhere in `tree` names.

    `from a import b` counts as `a.b` too: b may be a module.
    """
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def run_python(*arguments: str) -> tuple[str, set[str]]:
    """Run python in a new process; return its output and the top-level packages it imported."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    lines = done.stderr.splitlines()
    imports = [line for line in lines if line.startswith("import time:")]
    assert done.returncode == 0, "\n".join(line for line in lines if line not in imports)
    return done.stdout, {line.split("|")[-1].strip().partition(".")[0] for line in imports}


def is_command(path: Path) -> bool:
    """Whether `path` can be run with `python -m`: it guards a call of main by __name__."""
    return any(
        isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)
        for node in parse(path).body
    )


COMMANDS = sorted(
    f"experiments.{path.stem}" for path in (ROOT / "experiments").glob("*.py") if is_command(path)
)


@pytest.mark.parametrize("module", ["fedcore.secagg", "fedcore.device"])
def test_the_protocol_and_the_device_import_neither_torch_nor_flower(module):
    _, loaded = run_python("-c", f"import {module}")

    assert "fedcore" in loaded
    assert not loaded & (HEAVY | {"flwr", "sklearn", "hydra"})


def test_no_package_of_fedcore_imports_a_training_library_until_it_is_used():
    packages = sorted(inside(path).parent for path in SOURCES if path.name == "__init__.py")
    names = [".".join(path.parts) for path in packages if path.parts[0] == "fedcore"]

    _, loaded = run_python("-c", f"import {', '.join(names)}")

    assert not loaded & (HEAVY | {"datasets", "dp_accounting", "flwr_datasets", "onnx", "sklearn"})


@pytest.mark.parametrize("command", COMMANDS)
def test_asking_a_command_for_help_imports_neither_torch_nor_opacus_nor_ray(command):
    output, loaded = run_python("-m", command, "--help")

    assert len(output.split()) > 20
    assert not loaded & HEAVY


def test_flower_is_entered_by_its_public_doors_only():
    wrong = {}
    for path in SOURCES:
        name = inside(path).as_posix()
        allowed = FLOWER_DOORS | FLOWER_ADAPTERS.get(name, set())
        behind = {
            module
            for module in imported_modules(parse(path))
            if module.startswith("flwr.")
            and not any(module == door or module.startswith(f"{door}.") for door in allowed)
        }
        if behind:
            wrong[name] = sorted(behind)

    assert not wrong, f"import from {sorted(FLOWER_DOORS)} instead"


def test_every_adapter_still_needs_the_exception_it_was_granted():
    for name, doors in FLOWER_ADAPTERS.items():
        modules = imported_modules(parse(ROOT / name))
        assert all(
            any(module == door or module.startswith(f"{door}.") for module in modules)
            for door in doors
        ), f"{name} no longer imports all of {sorted(doors)}"


def is_re_export(node: ast.stmt) -> bool:
    """Whether `node` belongs to a package's front: an import, `__all__`, or a lazy import.

    Lazy are imports for type checkers, a literal that says where names live, and the
    module's `__getattr__` (PEP 562).
    """
    match node:
        case ast.ImportFrom():
            return True
        case ast.Assign(targets=[ast.Name()], value=ast.List() | ast.Dict()):
            return isinstance(ast.literal_eval(node.value), list | dict)
        case ast.If(test=ast.Name("TYPE_CHECKING"), body=body, orelse=[]):
            return all(isinstance(line, ast.ImportFrom) for line in body)
        case ast.FunctionDef(name="__getattr__"):
            return True
    return False


FRONTS = sorted(path.parent for path in SOURCES if path.name == "__init__.py")


@pytest.mark.parametrize(
    "package",
    # fedcore's own front is the exception: it says its version.
    [package for package in FRONTS if package.name != "fedcore"],
    ids=lambda package: inside(package).as_posix(),
)
def test_the_front_of_a_package_re_exports_and_does_nothing_else(package):
    docstring, *body = parse(package / "__init__.py").body

    assert isinstance(docstring, ast.Expr)
    assert isinstance(docstring.value, ast.Constant)
    assert [ast.unparse(node) for node in body if not is_re_export(node)] == []


@pytest.mark.parametrize("package", FRONTS, ids=lambda package: inside(package).as_posix())
def test_a_package_has_every_name_that_it_offers(package):
    module = import_module(".".join(inside(package).parts))

    offered = getattr(module, "__all__", [])
    assert [name for name in offered if not hasattr(module, name)] == []
    assert len(offered) == len(set(offered))


def test_nothing_in_the_repository_names_a_machine_or_a_private_host():
    found = []
    for path in house_files():
        data = path.read_bytes()
        if b"\0" in data:
            continue
        for number, line in enumerate(data.decode("utf-8").splitlines(), start=1):
            if MACHINE_TRACES.search(line):
                found.append(f"{inside(path)}:{number}: {line.strip()[:80]}")

    assert not found


def test_the_trace_pattern_knows_what_it_looks_for():
    traces = [
        "/ho" + "me/ada/model", "see /ho" + "me/data", "pip --extra-index-u" + "rl x",
        "https://registry.inter" + "nal/simple", "http://10.1" + ".2.3:80",
        "192." + "168.0.1",
    ]  # fmt: skip
    harmless = [
        "https://arxiv.org/abs/2203.03761",
        "model/work/file",
        "10.1.2",
        "curand==10.3.5.147",
    ]

    assert all(MACHINE_TRACES.search(text) for text in traces)
    assert not any(MACHINE_TRACES.search(text) for text in harmless)


def test_the_top_level_holds_only_what_the_architecture_names():
    strangers = {inside(path).parts[0] for path in house_files()} - TOP_LEVEL

    assert not strangers, "move it into a room of docs/architecture.md, or add it to .gitignore"


def test_the_lock_pins_a_fitting_version_of_everything_that_is_asked_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = dict(line.split("==") for line in lines_of(ROOT / "requirements.lock"))
    asked = [
        requirement
        for group in [project["dependencies"], *project["optional-dependencies"].values()]
        for requirement in map(Requirement, group)
        if requirement.name != project["name"]
    ]

    assert len(asked) > 10
    for requirement in asked:
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement}: run `make lock`"


def test_the_lock_is_sorted_and_holds_nothing_but_names_and_public_versions():
    lines = lines_of(ROOT / "requirements.lock")
    names = [line.split("==")[0] for line in lines]

    assert names == sorted(set(names))
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.!]*", line) for line in lines)


def test_the_licence_is_the_one_that_the_package_declares():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")

    assert project["license"] == "Apache-2.0"
    assert "Apache License\n                           Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
