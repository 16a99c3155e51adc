import multiprocessing
import os
from importlib.util import find_spec
from multiprocessing import forkserver

import pytest
import torch

from tests.interpreter import patch_language_once

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before any test imports one
if "PYTEST_XDIST_WORKER" in os.environ:  # each test process has its core
    torch.set_num_threads(1)
elif "OMP_NUM_THREADS" not in os.environ:  # two pools of different sizes fight for the cores
    torch.set_num_threads(2)

# What tests fork from, imported once: seconds that each process would take by itself.
FORKED_FROM = ("accelerate", "cv2", "torch._dynamo", "torch.utils.tensorboard", "hrsam.bench.drills", "hrsam.cli",
               "hrsam.distill", "hrsam.evaluate", "pytest", "tests.tiny_training")  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def one_forkserver():
    """A process has one server to fork from, and what it has imported is settled by whoever starts it: the same for all."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        yield
        return
    forkserver.set_forkserver_preload(list(FORKED_FROM))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forkserver, "set_forkserver_preload", lambda modules: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter():
    if find_spec("triton") is None:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch_language_once(patch)
        yield


@pytest.fixture
def quick_processes(monkeypatch):
    """Processes that the library starts afresh are forked from a server that has imported everything.

    They get the same pickled work, the same pipes and the same parent, without the seconds of a new interpreter.
    """
    get_context, quick = multiprocessing.get_context, "forkserver" in multiprocessing.get_all_start_methods()

    def context(method=None):
        return get_context("forkserver" if quick and method == "spawn" else method)

    monkeypatch.setattr(multiprocessing, "get_context", context)


@pytest.fixture
def nan_in_new_memory():
    """``torch.empty`` returns NaN, so memory that nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def one_thread():
    """Sums of more threads round differently, and small models gain nothing from them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def small_preset(one_thread):
    """The preset ``test``, trained on the CPU: runs are equal to the bit with one number of threads."""
    from hrsam.models.presets import PRESETS
    from tests.builders import small_config

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "test", small_config)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield
