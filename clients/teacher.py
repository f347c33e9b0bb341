"""A device's teacher: a signed release, verified before it is believed.

The teacher says what local training is drawn towards, so a forged one could steer every
student. It comes as releases always come: from a folder whose signature is checked under
a key that reached the device by another way. It runs as released, in int8, on the
device's own examples; what it says about them stays there.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

from fedcore import training
from fedcore.data import Inputs
from fedcore.device import Classifier
from fedcore.errors import ConfigurationError
from fedcore.job import Job, NoDistillation, open_teacher

if TYPE_CHECKING:
    from fedcore.training import SoftTargets


def soft_targets(
    job: Job, node_config: Mapping[str, object], x: Inputs, classes: int
) -> SoftTargets | None:
    """Return the teacher's opinion on this device's examples; None without a teacher.

    Args:
        job: Says whether there is one, and how much it counts.
        node_config: May name the device's own copy of the release as `teacher-path`, and
            the key that it pins as `teacher-key`.
        x: Shape [n, *input_shape].
        classes: Of the student. The coordinator checked its copy of the teacher; this device's
            may be another.

    Raises:
        ConfigurationError: The release cannot be read, is not what was signed, or knows another
            number of classes.
        DataError: It was trained on inputs of another shape.
    """
    config = job.distillation
    if isinstance(config, NoDistillation):
        return None
    path = str(node_config.get("teacher-path", config.path))
    key = str(node_config.get("teacher-key", config.key))
    said = _teacher(path, key).predict(x)
    if said.probabilities.shape[1] != classes:
        msg = (
            f"distillation needs a teacher for {classes} classes, found one for "
            f"{said.probabilities.shape[1]} in {path}"
        )
        raise ConfigurationError(msg)
    return training.SoftTargets(said.probabilities, config.temperature, config.weight)


@lru_cache(maxsize=2)
def _teacher(path: str, key: str) -> Classifier:
    return Classifier(open_teacher(path, key))
