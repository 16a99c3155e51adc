"""Triton kernels, one file for each op.  Importing this package never imports Triton."""

from __future__ import annotations

import logging
import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

logger = logging.getLogger("hrsam")


_FOUND_TRITON = find_spec("triton") is not None


def has_triton() -> bool:
    """Whether Triton is installed."""
    return _FOUND_TRITON


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _announce(choice: str, device: str) -> None:
    logger.info("impl='auto' uses %r for %s tensors", choice, device)


def resolve_impl(impl: str, tensor: Tensor) -> str:
    """The implementation that runs: ``"naive"``, ``"torch"`` or ``"triton"``.

    ``"auto"`` is ``"triton"`` for a CUDA tensor where Triton is installed and ``"torch"`` otherwise; the choice is
    logged once for each kind of device.  Any other value means what it says.
    Raises ``ValueError`` for an unknown name, and for ``"triton"`` where kernels cannot run on ``tensor``.
    """
    if impl == "auto":
        choice = "triton" if tensor.is_cuda and has_triton() else "torch"
        if not torch.compiler.is_compiling():
            _announce(choice, tensor.device.type)
        return choice
    if impl not in ("naive", "torch", "triton"):
        raise ValueError(f"there is no implementation {impl!r}; choose one of auto, naive, torch, triton")
    if impl == "triton":
        if not has_triton():
            raise ValueError(
                "impl='triton' was asked for but Triton is not installed; install hrsam[cuda] or use impl='auto'"
            )
        if not (tensor.is_cuda or interpreting()):
            raise ValueError(
                f"impl='triton' needs a CUDA tensor, got one on {tensor.device}; move it, use impl='auto', "
                "or set TRITON_INTERPRET=1 before Triton is imported"
            )
    return impl
