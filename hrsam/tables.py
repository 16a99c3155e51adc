"""Index tables of kernels: made without a loop over their rows, and brought to a device in one copy that nobody waits for.

Every pack of pictures needs tables that no other pack needs, so making them must cost next to nothing.  Until they leave they
are NumPy arrays of whole numbers: small steps take a fifth of what they take in PyTorch.  Rows of different lengths stand one
after the other, and pointers (rows + 1,) say where: row i is ``ptr[i]`` to ``ptr[i + 1]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache, wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

Table = NDArray[np.integer]
ALIGNMENT = 4  # elements: 16 bytes

P = ParamSpec("P")
R = TypeVar("R")
_HOLDERS: list[list[Any]] = []
_FORGET: list[Callable[[], None]] = []


def cached(maxsize: int) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """``functools.lru_cache`` for what builds tables; :func:`holding` sees what such functions return."""

    def decorate(build: Callable[P, R]) -> Callable[P, R]:
        remembered = lru_cache(maxsize)(build)

        @wraps(build)
        def tables(*args: P.args, **kwargs: P.kwargs) -> R:
            found = remembered(*args, **kwargs)  # type: ignore[arg-type]
            if not torch.compiler.is_compiling():
                for held in _HOLDERS:
                    held.append(found)
            return found

        _FORGET.append(remembered.cache_clear)
        return tables

    return decorate


def forget() -> None:
    """Empty the caches of all :func:`cached` functions, as if no layout had been seen."""
    for clear in _FORGET:
        clear()


@contextmanager
def holding() -> Iterator[list[Any]]:
    """A list of all tables that are asked for meanwhile.  A CUDA graph knows their addresses only, and caches drop what was
    not asked for lately, so who captures one keeps the list as long as the graph."""
    held: list[Any] = []
    _HOLDERS.append(held)
    try:
        yield held
    finally:
        _HOLDERS[:] = [each for each in _HOLDERS if each is not held]


def as_table(numbers: ArrayLike) -> Table:
    """Whole numbers, or a tensor of them on the CPU, as int32."""
    return np.asarray(numbers, np.int32)


def count_to(end: int) -> Table:
    """0, 1, … ``end`` − 1."""
    return np.arange(end, dtype=np.int32)


def pointers(counts: Table) -> Table:
    """Pointers (rows + 1,) of rows with ``counts`` (rows,) entries."""
    ptr = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=ptr[1:])
    return ptr


def row_of(ptr: Table) -> Table:
    """The row of each entry."""
    return np.repeat(count_to(len(ptr) - 1), np.diff(ptr))


def ranges(firsts: Table, counts: Table) -> tuple[Table, Table]:
    """Rows ``first, first + 1, … first + count − 1``: pointers and entries."""
    ptr = pointers(counts)
    return ptr, np.repeat(firsts - ptr[:-1], counts) + count_to(ptr[-1])


def pieces(starts: Table, ends: Table, sizes: Table | int) -> tuple[Table, Table, Table, Table]:
    """Sequences of tokens, from ``starts`` to ``ends`` (sequences,), cut into pieces of ``sizes`` tokens; the last piece of
    each is what is left.  First token, end and sequence of each piece, and pointers to the pieces of each sequence."""
    sizes = np.broadcast_to(as_table(sizes), starts.shape)
    ptr = pointers((ends - starts + sizes - 1) // sizes)
    sequence = row_of(ptr)
    firsts = (starts - ptr[:-1] * sizes)[sequence] + count_to(len(sequence)) * sizes[sequence]
    return firsts, np.minimum(firsts + sizes[sequence], ends[sequence]), sequence, ptr


def to_device(tables: Iterable[Table], device: torch.device) -> tuple[Tensor, ...]:
    """``tables`` as int32 tensors on ``device``: views of one buffer there.

    Each view begins at a multiple of 16 bytes, as tensors of their own do: for pointers that do not, Triton compiles kernels
    anew.  On a GPU the host does not wait for the copy; what is launched later on the same stream does.
    Raises ``RuntimeError`` while a CUDA graph is captured, which would copy again when it is replayed, from memory that is
    another's by then.
    """
    on_gpu = device.type == "cuda"
    if on_gpu and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "index tables of a layout that was not seen before cannot be made while a CUDA graph is captured; run what is "
            "captured once before"
        )
    tables = list(tables)
    starts = pointers(as_table([-(-part.size // ALIGNMENT) * ALIGNMENT for part in tables])).tolist()
    buffer = torch.empty(starts[-1], dtype=torch.int32, pin_memory=on_gpu)  # which PyTorch keeps until it is copied
    here = buffer.numpy()
    for start, part in zip(starts, tables):
        here[start : start + part.size] = part.ravel()
    there = buffer.to(device, non_blocking=on_gpu)
    return tuple(there[start : start + part.size].view(part.shape) for start, part in zip(starts, tables))
