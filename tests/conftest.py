import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before any test imports one
if "OMP_NUM_THREADS" not in os.environ:  # two pools of different sizes fight for the cores
    torch.set_num_threads(2)


@pytest.fixture
def nan_in_new_memory():
    """``torch.empty`` returns NaN, so memory that nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
