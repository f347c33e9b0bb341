"""The container of a board: what it copies is all that its command needs."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import deploy

ROOT = Path(deploy.__file__).parents[1]
TEXT = (ROOT / "experiments" / "templates" / "Containerfile").read_text()


def copied():
    """What comes from the repository, in both spellings of COPY."""
    lines = re.findall(r"^COPY (?!--from)(.*) (\S+)$", TEXT, re.MULTILINE)
    return [name for sources, _ in lines for name in sources.split()]


def words(instruction):
    found = re.search(rf"^{instruction} (\[.*\])$", TEXT, re.MULTILINE)
    return json.loads(found.group(1))


@pytest.fixture
def image(tmp_path):
    """The checkout as the container has it."""
    for name in copied():
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
        else:
            shutil.copyfile(ROOT / name, tmp_path / name)
    return tmp_path


def start(image, *arguments):
    program, *rest = [*words("ENTRYPOINT"), *arguments]
    assert program == "python"
    return subprocess.run(
        [sys.executable, *rest], cwd=image, capture_output=True, text=True, check=False
    )


def test_the_build_sees_what_it_copies_and_nothing_else():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert sorted(line[1:] for line in lines if line.startswith("!")) == sorted(copied())
    assert "*" in lines


def test_the_command_of_the_container_starts_from_what_was_copied(image):
    done = start(image, *words("CMD"))
    assert done.returncode == 0, done.stderr
    assert "--superlink" in done.stdout


def test_the_container_looks_for_keys_where_the_docs_mount_them(image):
    done = start(image, "--superlink", "fl.example.org:8443", "--partition", "0")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "/keys" in done.stderr
    assert "/keys:ro" in (ROOT / "docs" / "boards.md").read_text()


def test_a_node_in_the_container_runs_as_a_user_without_rights():
    last = TEXT.rindex("\nFROM ")
    assert re.search(r"^USER board$", TEXT[last:], re.MULTILINE)
