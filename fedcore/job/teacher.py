"""The teacher of a distillation: read, verified, and checked against what is learnt."""

from __future__ import annotations

from pathlib import Path

from fedcore.crypto.signatures import VerifyKey
from fedcore.data import Dataset
from fedcore.device import VerifiedRelease, open_release
from fedcore.errors import ConfigurationError, VerificationError
from fedcore.job.levels import of_devices
from fedcore.job.optimisation import ReleaseTeacher
from fedcore.job.settings import Job
from fedcore.privacy import NoPrivacy


def open_teacher(path: str, key: str) -> VerifiedRelease:
    """Return the verified release in `path`, signed by the owner of the public key in `key`.

    Raises:
        ConfigurationError: A file is missing or malformed, or the signature is another's.
    """
    try:
        pinned = VerifyKey.from_pem(Path(key).read_bytes())
    except OSError as error:
        msg = f"distillation.key must be a readable PEM file, got {key}: {error.strerror}"
        raise ConfigurationError(msg) from error
    try:
        return open_release(Path(path), pinned)
    except VerificationError as error:
        msg = f"distillation.path must be a release signed by distillation.key: {error}"
        raise ConfigurationError(msg) from error


def teacher_warnings(job: Job, config: ReleaseTeacher, dataset: Dataset) -> tuple[str, ...]:
    """Check that the teacher knows the inputs and classes of `dataset`; return second thoughts.

    A student learns from its teacher's training data too, through the teacher. What that cost
    was accounted when the teacher was trained; this run's epsilon only adds to it.

    Raises:
        ConfigurationError: As `open_teacher`, or it was made for something else.
    """
    description = open_teacher(config.path, config.key).manifest.description
    found = (tuple(description.inputs.shape), len(description.labels))
    expected = (tuple(dataset.input_shape), dataset.classes)
    if found != expected:
        msg = (
            f"distillation needs a teacher for inputs {list(expected[0])} and {expected[1]} "
            f"classes, found one for {list(found[0])} and {found[1]} in {config.path}"
        )
        raise ConfigurationError(msg)
    if isinstance(of_devices(job.privacy), NoPrivacy):
        return ()
    return (
        f"the teacher was released with epsilon {description.provenance.epsilon:.3g}: what it "
        "says of its own training data reaches the student, so this run's epsilon comes on top",
    )
