"""
Without a GPU the kernels run in Triton's interpreter, called by the tests: the public functions take CPU tensors to the
references. One thread: these are thousands of small operations, which a second makes no faster, and twenty times slower
on a machine that is busy with something else.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"        # read when a kernel is decorated, so before any import of kernels

os.environ["HF_HUB_OFFLINE"] = "1"              # a hub id is looked for in the cache alone

torch.set_num_threads(1)


@pytest.fixture
def poisoned_empty(monkeypatch):
    """torch.empty is full of NaN, or of -7: what no program wrote cannot pass for computed."""
    def poisoned(make):
        def empty(*args, **kwargs):
            t = make(*args, **kwargs)
            return t.fill_(torch.nan if t.is_floating_point() else -7)
        return empty

    for make in (torch.empty, torch.empty_like):
        monkeypatch.setattr(torch, make.__name__, poisoned(make))


@pytest.fixture(autouse=True)
def in_bounds(monkeypatch):
    """In the interpreter: each address that a kernel reads or writes lies within one of the launch's tensors."""
    if torch.cuda.is_available():
        return
    from triton.runtime import interpreter
    spans = []

    def arguments(self, *args, plain=interpreter.GridExecutor._init_args_hst):
        result = plain(self, *args)
        storages = [a.untyped_storage() for a in result[0] if isinstance(a, torch.Tensor)]
        spans[:] = [(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages]
        return result

    def guarded(plain, mask_at, verb):
        def access(self, ptrs, *args):
            active = ptrs.data[args[mask_at].data]
            size = ptrs.get_element_ty().primitive_bitwidth // 8
            low, high = (int(active.min()), int(active.max()) + size) if active.size else spans[0]
            if not any(a <= low and high <= b for a, b in spans):
                raise IndexError(f"a kernel {verb} bytes {[(low - a, high - b) for a, b in spans]} from its tensors")
            return plain(self, ptrs, *args)
        return access

    builder = interpreter.InterpreterBuilder
    monkeypatch.setattr(interpreter.GridExecutor, "_init_args_hst", arguments)
    monkeypatch.setattr(builder, "create_masked_load", guarded(builder.create_masked_load, 0, "reads"))
    monkeypatch.setattr(builder, "create_masked_store", guarded(builder.create_masked_store, 1, "writes"))
