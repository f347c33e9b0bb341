"""What runs on a board: verify a signed release, then classify. No torch, no Flower."""

from fedcore.device.runtime import Classifier, Prediction
from fedcore.device.store import VerifiedRelease, newest, open_release

__all__ = ["Classifier", "Prediction", "VerifiedRelease", "newest", "open_release"]
