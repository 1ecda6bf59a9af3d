"""Settings for all tests: one thread, since tiny tensors gain nothing from more."""

import torch

torch.set_num_threads(1)
