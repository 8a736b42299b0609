"""Tests run side by side (pytest-xdist), one worker a core: each worker and each process that it starts gets one thread.

GPU kernels run on the real device where there is one; else Triton interprets them on CPU tensors.
"""

import importlib.metadata
import importlib.util
import os
import signal
from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from bitdistill.distributed import allocator, openmp

openmp.wait_briefly()
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # a shell's background job, whose children would ignore Ctrl-C, too
    signal.signal(signal.SIGINT, signal.default_int_handler)

import torch

with torch.device("cpu"):
    torch.empty(0)  # torch notes here which functions make tensors; a test that compiles has torch.empty replaced

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated, so before anything imports one


def _let_triton_3_6_count() -> None:
    """Triton 3.6 interprets ``range(0, n, step)`` with an n known at run time only with numpy before 2.4: it lacks __index__."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def with_index(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = with_index


if not CUDA and importlib.util.find_spec("triton") and importlib.metadata.version("triton").startswith("3.6."):
    _let_triton_3_6_count()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Modules with the most slow tests come first: begun last, one of them would run alone while the other workers wait."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(scope="session", autouse=True)
def malloc_as_it_is():
    """A test that starts a rank in this process leaves its allocator alone: other tests measure memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocator, "keep_freed_memory", lambda: False)
        yield


@pytest.fixture(scope="session")
def device() -> str:
    """Where the Triton kernels run: "cuda", or "cpu" when they are interpreted."""
    return "cuda" if CUDA else "cpu"


@pytest.fixture
def poisoned(monkeypatch):
    """`torch.empty` hands out NaN and 77, so that what a kernel does not write is seen."""
    empty = torch.empty

    def filled(*shape, **options):
        tensor = empty(*shape, **options)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 77)

    monkeypatch.setattr(torch, "empty", filled)


@pytest.fixture
def moved_bytes(monkeypatch):
    """``with moved_bytes() as moved: launch(...)``: the bytes that unmasked loads and stores of a launch touch.

    Counted in the interpreter, an address once an instruction: moved.loaded and moved.stored.
    """
    if CUDA:
        pytest.skip("bytes are counted in the interpreter")
    import numpy as np
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder

    @contextmanager
    def count():
        moved = SimpleNamespace(loaded=0, stored=0)
        load, store = builder.create_masked_load, builder.create_masked_store

        def touched(pointers, mask):
            size = pointers.get_element_ty().primitive_bitwidth // 8
            return np.unique(pointers.data[mask.data.astype(bool)]).size * size

        def counted_load(self, ptrs, mask, *rest, **options):
            moved.loaded += touched(ptrs, mask)
            return load(self, ptrs, mask, *rest, **options)

        def counted_store(self, ptrs, value, mask, *rest, **options):
            moved.stored += touched(ptrs, mask)
            return store(self, ptrs, value, mask, *rest, **options)

        with monkeypatch.context() as patch:
            patch.setattr(builder, "create_masked_load", counted_load)
            patch.setattr(builder, "create_masked_store", counted_store)
            yield moved

    return count
