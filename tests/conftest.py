import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before any test imports one
if "PYTEST_XDIST_WORKER" in os.environ:  # each test process has its core
    torch.set_num_threads(1)
elif "OMP_NUM_THREADS" not in os.environ:  # two pools of different sizes fight for the cores
    torch.set_num_threads(2)


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
