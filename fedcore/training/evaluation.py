"""Loss and accuracy of a model on labelled examples."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fedcore.errors import ConfigurationError
from fedcore.training.settings import Evaluation
from fedcore.training.sgd import as_tensor, check_examples, measure


def evaluate(
    model: nn.Module,
    x: npt.NDArray[np.float32],
    y: npt.NDArray[np.int64],
    batch_size: int = 1000,
) -> Evaluation:
    """Evaluate `model` where it is, without changing it or its mode.

    Args:
        model: Maps [batch, *input_shape] to logits.
        x: Shape [n, *input_shape].
        y: Shape [n].
        batch_size: Examples at once; bounds memory, not the result.

    Raises:
        ConfigurationError: There are no examples, or no room for them.
    """
    check_examples(x, y)
    if batch_size < 1:
        msg = f"batch_size must be at least 1, got {batch_size}"
        raise ConfigurationError(msg)
    device = str(next((weight.device for weight in model.parameters()), "cpu"))
    was_training = model.training
    model.eval()
    loss, correct = 0.0, 0
    try:
        with torch.inference_mode():
            for start in range(0, len(y), batch_size):
                rows = slice(start, start + batch_size)
                labels = as_tensor(y[rows], device)
                batch_loss, batch_correct = measure(model(as_tensor(x[rows], device)), labels)
                loss += batch_loss
                correct += batch_correct
    finally:
        model.train(was_training)
    return Evaluation(loss / len(y), correct / len(y), len(y))
