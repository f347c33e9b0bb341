"""Settings that all tests share."""

import os

import torch
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
# Two busy cores make any single example late; what counts is the suite's time.
settings.register_profile("fedcore", deadline=None)
settings.load_profile("fedcore")
