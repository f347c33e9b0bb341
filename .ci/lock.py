"""Write requirements.lock: the versions of this environment that fedcore really needs.

Starts at fedcore with its `dev` extra, which contains every other one, and follows
the requirements that the installed packages declare. What else lies in the
environment is left out. Local versions (`+cpu`) are cut: which build of torch
fits is the installing machine's choice, its version is ours.
"""

from __future__ import annotations

import platform
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = "fedcore[dev]"
HEADER = f"""\
# Exact versions for `make run` and `make test`, taken from Python {platform.python_version()}.
# To refresh: install what you want into .venv, run `make lock`, then `make test`.
"""


def needed(root: str) -> dict[str, str]:
    """Return name -> version of all that `root` requires here, itself excluded."""
    start = Requirement(root)
    waiting = [(start.name, extra) for extra in ("", *start.extras)]
    seen: set[tuple[str, str]] = set()
    versions: dict[str, str] = {}
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        found = distribution(name)
        versions[name] = Version(found.version).public
        for requirement in map(Requirement, found.requires or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                child = canonicalize_name(requirement.name)
                waiting += [(child, wanted) for wanted in ("", *requirement.extras)]
    del versions[start.name]
    return versions


def main() -> None:
    """Replace the lock at the repository's root."""
    lines = [f"{name}=={version}\n" for name, version in sorted(needed(ROOT).items())]
    lock = Path(__file__).resolve().parent.parent / "requirements.lock"
    lock.write_text(HEADER + "".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
