"""
Without a GPU the kernels run in Triton's interpreter, called by the tests: the public functions take CPU tensors to the
references. One thread: these are thousands of small operations, which a second makes no faster, and twenty times slower
on a machine that is busy with something else.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"        # read when a kernel is decorated, so before any import of kernels

torch.set_num_threads(1)
