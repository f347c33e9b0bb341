"""Prove that a 64-bit Arm board takes part: `make arm64-proof`, as root on Debian x86-64.

    FOLDER/root/    Debian 12 for arm64, made by debootstrap and run by QEMU's user emulation,
                    with the packages of the extras `train` and `device` and this checkout
    FOLDER/run/     keys, states and what the runs wrote

One board is emulated; the other one and the coordinator are this machine. They train two secure
rounds over TLS: a sum under masks only comes out if both processors derive the same keys, masks
and packed bytes. Then a release of this machine predicts on both.

What this does not show is speed, memory, and a board's sensors. torch is 2.10, the last one whose
wheel for Arm on PyPI needs no CUDA.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from lock import needed

from fedcore.crypto.signatures import VerifyKey
from fedcore.data import Digits, load
from fedcore.device import Classifier, open_release

ROOT = Path(__file__).resolve().parent.parent
MIRROR = "http://deb.debian.org/debian"
DEBIAN = ("bookworm", "python3,ca-certificates,libgomp1")
PYTHON = "3.11"  # of that Debian
TORCH = "2.10.0"
GLIBC = range(17, 37)
"""Minor versions of glibc 2 for which a wheel may have been built; pip wants each of them."""
ENVIRONMENT = Path("/opt/environment")
CHECKOUT = Path("/opt/fedcore")
STATE = Path("/opt/state")
SOURCES_ONLY = frozenset({"antlr4-python3-runtime"})
"""Pure Python without a wheel on PyPI: built here, for any processor."""
TOOLS = {
    "debootstrap": "debootstrap",
    "qemu-aarch64-static": "qemu-user-static",
    "update-binfmts": "binfmt-support",
    "unshare": "util-linux",
}
READY_SECONDS = 900.0
STOP_SECONDS = 60.0
ROUNDS = 2


class ProofError(Exception):
    """A step went wrong; the text says which, and what to do."""


def main() -> None:
    """Build the system, install, train, predict."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "build" / "arm64", help="2 GB are kept there"
    )
    folder = parser.parse_args().folder.resolve()
    try:
        check()
        own_mounts()
        began = time.monotonic()
        root, run = folder / "root", folder / "run"
        emulate()
        install_system(root)
        install_packages(root)
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir(parents=True)
        with mounted(root):
            train(root, run)
            predict(root, run)
    except (ProofError, subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        sys.exit(f"arm64-proof: {error}")
    say(f"proven in {time.monotonic() - began:.0f} s")


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"arm64-proof: {line}\n")
    sys.stdout.flush()


def check() -> None:
    """Refuse a machine on which this cannot work.

    Raises:
        ProofError: It is another kind of machine, or tools are missing.
    """
    if platform.system() != "Linux" or os.geteuid() != 0:
        msg = "needs Linux and root, for chroot and binfmt_misc"
        raise ProofError(msg)
    missing = sorted(package for tool, package in TOOLS.items() if shutil.which(tool) is None)
    if missing:
        msg = f"tools are missing: apt-get install {' '.join(missing)}"
        raise ProofError(msg)


def own_mounts() -> None:
    """Go on in a mount namespace of our own, so that nothing stays mounted."""
    if os.environ.get("FEDCORE_OWN_MOUNTS") == "1":
        return
    os.environ["FEDCORE_OWN_MOUNTS"] = "1"
    os.execvp("unshare", ["unshare", "--mount", sys.executable, *sys.argv])  # noqa: S606, S607 - ourselves


def emulate() -> None:
    """Let the kernel start programs for arm64 through QEMU.

    Raises:
        ProofError: The kernel does not.
    """
    binfmt = Path("/proc/sys/fs/binfmt_misc")
    if not (binfmt / "register").exists():
        run_tool("mount", "-t", "binfmt_misc", "binfmt_misc", str(binfmt))
    entry = binfmt / "qemu-aarch64"
    if not entry.exists():
        run_tool("update-binfmts", "--enable", "qemu-aarch64")
    if not entry.exists() or not entry.read_text(encoding="ascii").startswith("enabled"):
        msg = f"{entry} is not enabled: reinstall qemu-user-static"
        raise ProofError(msg)


def install_system(root: Path) -> None:
    """Make a Debian for arm64, once."""
    stamp = root / ".installed"
    if stamp.exists():
        return
    say("installing Debian for arm64 (five to ten minutes) ...")
    shutil.rmtree(root, ignore_errors=True)
    root.parent.mkdir(parents=True, exist_ok=True)
    release, packages = DEBIAN
    options = ("--foreign", "--arch=arm64", "--variant=minbase", f"--include={packages}")
    run_tool("debootstrap", *options, release, str(root), MIRROR)
    run_tool("chroot", str(root), "/debootstrap/debootstrap", "--second-stage")
    (root / "etc" / "hosts").write_text("127.0.0.1 localhost\n", encoding="ascii")
    stamp.touch()


def install_packages(root: Path) -> None:
    """Put the wheels of all that fedcore[train,device] needs into the system, and this checkout.

    pip runs here and picks wheels for the board; it would judge by this machine what else they
    need, so the list comes from this environment.
    """
    wanted = needed("fedcore[train,device]") | {"torch": TORCH}
    pins = [f"{name}=={version}" for name, version in sorted(wanted.items())]
    stamp = root / ".packages"
    if not stamp.exists() or stamp.read_text(encoding="ascii").split() != pins:
        say(f"installing {len(pins)} packages for arm64 ...")
        environment = root / ENVIRONMENT.relative_to("/")
        shutil.rmtree(environment, ignore_errors=True)
        inside(root, "/usr/bin/python3", "-m", "venv", "--without-pip", str(ENVIRONMENT))
        site = environment / "lib" / f"python{PYTHON}" / "site-packages"
        platforms = [f"manylinux_2_{minor}_aarch64" for minor in GLIBC] + ["manylinux2014_aarch64"]
        wheels = [pin for pin in pins if pin.split("==")[0] not in SOURCES_ONLY]
        pip(
            *("install", "--no-deps", "--only-binary=:all:", "--target", str(site)),
            *(part for tag in platforms for part in ("--platform", tag)),
            *("--python-version", PYTHON, "--implementation", "cp", *wheels),
        )
        pure = [pin for pin in pins if pin not in wheels]
        pip("install", "--no-deps", "--target", str(site), *pure)
        move_scripts(site / "bin", environment / "bin")
        stamp.write_text("\n".join(pins), encoding="ascii")
    copy = root / CHECKOUT.relative_to("/")
    shutil.rmtree(copy, ignore_errors=True)
    names = run_tool("git", "-C", str(ROOT), "ls-files", "-z").stdout.split("\0")
    for name in filter(None, names):
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target)


def move_scripts(made: Path, to: Path) -> None:
    """Move scripts that pip wrote for this machine's Python to where the board's Python is."""
    for script in made.iterdir():
        content = script.read_bytes()
        if content.startswith(b"#!"):
            content = f"#!{ENVIRONMENT}/bin/python3\n".encode() + content.split(b"\n", 1)[1]
        target = to / script.name
        target.write_bytes(content)
        target.chmod(0o755)
    shutil.rmtree(made)


@contextmanager
def mounted(root: Path) -> Iterator[None]:
    """Give the system its devices and processes; not /sys, with which onnxruntime crashes."""
    with ExitStack() as stack:
        for kind, name in (("proc", "proc"), ("tmpfs", "dev/shm")):
            (root / name).mkdir(parents=True, exist_ok=True)
            run_tool("mount", "-t", kind, kind, str(root / name))
            stack.callback(run_tool, "umount", "--lazy", str(root / name))
        yield


def train(root: Path, run: Path) -> None:
    """Train secure rounds with an emulated and a native board.

    Raises:
        ProofError: A round lost a board, or the processor is another one.
    """
    machine = inside(root, "/usr/bin/python3", "-c", "import platform; print(platform.machine())")
    if machine.stdout.strip() != "aarch64":
        msg = f"expected aarch64 inside {root}, found {machine.stdout.strip()!r}"
        raise ProofError(msg)
    port = free_port()
    deploy("certs", "--out", run / "keys", "--count", 2)
    state = root / STATE.relative_to("/")
    shutil.rmtree(state, ignore_errors=True)
    shutil.copytree(run / "keys" / "device-1", state / "keys")
    link = ("--superlink", f"localhost:{port}")
    coordinator = ("--keys", run / "keys" / "coordinator", "--state", run / "coordinator")
    coordinator = (*coordinator, "--port", port)
    with ExitStack() as stack:
        stack.enter_context(going_on(native("superlink", *coordinator), ROOT, run / "superlink"))
        keys = ("--keys", STATE / "keys", "--state", STATE / "node", "--partition", 0)
        emulated = ("node", *keys, *link)
        at = ("chroot", root, "/usr/bin/env", f"--chdir={CHECKOUT}")
        board = (*at, ENVIRONMENT / "bin" / "python3", "-m", "experiments.deploy", *emulated)
        say("starting the emulated board ...")
        stack.enter_context(going_on(board, ROOT, run / "arm64"))
        keys = ("--keys", run / "keys" / "device-2", "--state", run / "node", "--partition", 1)
        other = native("node", *keys, *link)
        stack.enter_context(going_on(other, ROOT, run / "native"))
        say(f"training {ROUNDS} secure rounds ...")
        began = time.monotonic()
        job = (f"rounds={ROUNDS}", "clients=2", "clients_per_round=2", "stage_seconds=900")
        done = deploy("submit", *coordinator, "--out", run / "trained", *job)
    summary = json.loads((run / "trained" / "summary.json").read_text(encoding="utf-8"))
    lines = (run / "trained" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    survivors = [json.loads(line)["survivors"] for line in lines]
    if survivors != [2] * ROUNDS:
        msg = f"expected 2 boards in each of {ROUNDS} sums, found {survivors}: {done.stdout}"
        raise ProofError(msg)
    accuracy, seconds = summary["accuracy"], time.monotonic() - began
    say(f"{ROUNDS} rounds with both boards in {seconds:.0f} s, accuracy {accuracy:.3f}")


def predict(root: Path, run: Path) -> None:
    """Run one release on both processors.

    Raises:
        ProofError: They do not predict the same.
    """
    say("predicting with a release ...")
    out, board = run / "released", root / STATE.relative_to("/") / "released"
    job = ("rounds=5", "clients=10", "clients_per_round=10", "secagg=none", "release=onnx_int8")
    run_tool(sys.executable, "-m", "experiments.train", *job, f"output={out}", cwd=ROOT)
    key = VerifyKey.from_pem((out / "signing.key.pub").read_bytes())
    x = load(Digits()).x_test
    classes = Classifier(open_release(out / "model", key)).predict(x).classes
    np.savez(out / "samples.npz", x=x, reference=classes)
    shutil.copytree(out, board)
    files = ("--release", "model", "--key", "signing.key.pub", "--data", "samples.npz", "--json")
    at = ("/usr/bin/env", f"--chdir={STATE / 'released'}", f"PYTHONPATH={CHECKOUT}")
    found = inside(root, *at, f"{ENVIRONMENT}/bin/python3", "-m", "fedcore.device", *files)
    agreement = json.loads(found.stdout)["agreement"]
    if agreement < 1:
        msg = f"the two processors agree on {agreement:.4f} of {len(x)} predictions only"
        raise ProofError(msg)
    say(f"both processors predict the same for all {len(x)} samples")


def native(*arguments: object) -> tuple[object, ...]:
    """Return a command of `experiments.deploy` for this machine."""
    return (sys.executable, "-m", "experiments.deploy", *arguments)


def deploy(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command of `experiments.deploy` to its end."""
    return run_tool(*native(*arguments), cwd=ROOT)


@contextmanager
def going_on(command: Sequence[object], folder: Path, log: Path) -> Iterator[None]:
    """Start a command that says when it is ready and goes on; stop it in the end.

    Raises:
        ProofError: It ended, or said nothing for too long.
    """
    log = log.with_suffix(".log")
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603 - our own command lines
            list(map(str, command)), cwd=folder, stdout=output, stderr=output, env=environment
        )
    try:
        deadline = time.monotonic() + READY_SECONDS
        while not any(word in (said := log.read_text("utf-8")) for word in ("connected", "ready")):
            if process.poll() is not None or time.monotonic() > deadline:
                msg = f"{log.stem} did not start: {said[-500:]}"
                raise ProofError(msg)
            time.sleep(0.5)
        yield
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def inside(root: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the emulated system."""
    return run_tool("chroot", str(root), *command)


def pip(*arguments: str) -> None:
    """Run this environment's pip."""
    quiet = ("--disable-pip-version-check", "--no-input", "--quiet")
    run_tool(sys.executable, "-m", "pip", *arguments[:1], *quiet, *arguments[1:])


def run_tool(*command: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command to its end.

    Raises:
        ProofError: It failed; the text ends with what it said last.
    """
    words = list(map(str, command))
    done = subprocess.run(  # noqa: S603 - our own command lines
        words, cwd=cwd, capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = (done.stdout + done.stderr)[-800:]
        msg = f"{' '.join(words)[:300]} ended with {done.returncode}: {said}"
        raise ProofError(msg)
    return done


def free_port() -> int:
    """Return a port of loopback that nobody listens on."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port


if __name__ == "__main__":
    main()
