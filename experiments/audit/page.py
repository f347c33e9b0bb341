"""The page of an audit: `attack.html`, which needs no other file, no script and no network."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.report import environment
from fedcore import __version__
from fedcore.job import Job

if TYPE_CHECKING:
    from experiments.audit.run import Finding

PAGE = "attack.html"


def write_page(folder: Path, job: Job, findings: Sequence[Finding]) -> Path:
    """Write the page into `folder` and return its path."""
    images = {
        finding.suite: "data:image/png;base64," + b64encode(finding.picture).decode()
        for finding in findings
    }
    template = environment().get_template("attack.html")
    page = template.render(job=job, findings=findings, images=images, version=__version__)
    path = folder / PAGE
    path.write_text(page, encoding="utf-8")
    return path
