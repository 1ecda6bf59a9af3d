"""Settings for all tests: one thread, since tiny tensors gain nothing from more."""

import torch
from hypothesis import settings

torch.set_num_threads(1)

settings.register_profile("fcvgg", deadline=None, derandomize=True)
settings.load_profile("fcvgg")  # one suite, one result, however busy the machine
