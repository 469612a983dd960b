"""One thread: these are thousands of small operations, which a second makes no faster, and twenty times slower on a
machine that is busy with something else."""

import torch

torch.set_num_threads(1)
