"""One file of cached teacher embeddings, a shard: safetensors that also hold the SHA-256 of each embedding.

A shard is written whole or not at all, its list is part of it, and its name follows from what it holds: writing it again
gives the same file.  Nothing of a shard is used that does not have the hash it was written with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor

from hrsam.checkpoint import write_atomically
from hrsam.models.sam_vit import PATCH
from hrsam.weightfile import WeightsError, open_file

LIST = "hrsam_targets"  # the one entry of a shard's metadata: several would be written in any order
STORED = {"float32": ("F32", torch.float32), "bfloat16": ("BF16", torch.bfloat16), "float16": ("F16", torch.float16)}


class DamagedTargets(ValueError):
    """A shard that does not hold what was written."""


class MissingTarget(ValueError):
    """A picture whose embedding is not there."""


@dataclass(frozen=True)
class TargetKind:
    """What an embedding depends on beside the picture.

    ``teacher``: SHA-256 of its weight file; ``channels`` of its embeddings; ``side`` in pixels; ``computed``, ``stored``: names
    of dtypes; ``transform``: version of the way from file to pixels.
    """

    teacher: str
    channels: int
    side: int
    computed: str
    stored: str
    transform: int

    def key(self, picture: bytes) -> str:
        """Name of the embedding of a picture, given as the bytes of its file: SHA-256 of all there is to it."""
        parts = hashlib.sha256(picture).hexdigest(), *map(str, asdict(self).values())
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, g, g) of an embedding, g = ⌈side / 16⌉."""
        grid = -(-self.side // PATCH)
        return self.channels, grid, grid

    @property
    def nbytes(self) -> int:
        """Size of an embedding as it is stored."""
        channels, rows, columns = self.shape
        return channels * rows * columns * STORED[self.stored][1].itemsize

    @property
    def folder(self) -> str:
        """Name of the folder that embeddings of this kind lie in."""
        return f"{self.teacher[:12]}-{self.side}-{self.computed}-{self.stored}-v{self.transform}"


def write_shard(folder: Path, kind: TargetKind, targets: Mapping[str, Tensor]) -> Path:
    """Write embeddings (C, g, g), by key, into ``folder``; ``OSError`` when the disk does not take them."""
    tensors = {key: target.to("cpu", STORED[kind.stored][1]).contiguous() for key, target in targets.items()}
    text = json.dumps({"kind": asdict(kind), "targets": {key: _digest(tensor) for key, tensor in tensors.items()}})
    payload = to_bytes(tensors, {LIST: f"{hashlib.sha256(text.encode()).hexdigest()} {text}"})
    name = hashlib.sha256("\n".join(tensors).encode()).hexdigest()[:16]
    return write_atomically(folder / f"{name}.safetensors", lambda file: file.write(payload))


def read_list(path: Path, kind: TargetKind) -> dict[str, str]:
    """SHA-256 of each embedding of a shard, by key.  Only the head of the file is read.

    Raises :class:`DamagedTargets` when the head is not what was written, or what it says does not fit the file or ``kind``.
    """
    with _opened(path) as file:
        checksum, _, text = (file.metadata() or {}).get(LIST, "").partition(" ")
        if hashlib.sha256(text.encode()).hexdigest() != checksum:
            raise DamagedTargets(_damaged(path, "its list does not have the checksum it was written with"))
        try:
            listed = json.loads(text)
            found, targets = listed["kind"], dict(listed["targets"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise DamagedTargets(_damaged(path, "its list cannot be read")) from None
        if found != asdict(kind):
            raise DamagedTargets(_damaged(path, "it holds embeddings of another teacher, side or dtype"))
        if sorted(file.keys()) != sorted(targets):
            raise DamagedTargets(_damaged(path, "it does not hold the embeddings it lists"))
        for key in targets:
            _check_size(file, path, key, kind)
    return targets


def read_target(path: Path, key: str, sha256: str, kind: TargetKind) -> Tensor:
    """One embedding (C, g, g) of a shard on the CPU, in the dtype it is stored in.

    Raises :class:`DamagedTargets` when its bytes do not have this SHA-256, or whatever else is wrong with the file.
    """
    with _opened(path) as file:
        _check_size(file, path, key, kind)
        target = file.get_tensor(key).clone()  # the library's own lies in the file
    if _digest(target) != sha256:
        raise DamagedTargets(_damaged(path, f"the embedding {key[:12]} is not the one that was written"))
    return target


def check_shard(path: Path, kind: TargetKind) -> None:
    """Read all of a shard; :class:`DamagedTargets` when anything is wrong with it."""
    for key, sha256 in read_list(path, kind).items():
        read_target(path, key, sha256, kind)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with open_file(path) as file:  # checks sizes before the library parses, and has it check them against the file
            yield file
    except WeightsError as err:
        raise DamagedTargets(_damaged(path, str(err))) from None


def _check_size(file: Any, path: Path, key: str, kind: TargetKind) -> None:
    """Before anything is allocated for it."""
    if key not in file.keys():  # noqa: SIM118 - no mapping
        raise DamagedTargets(_damaged(path, f"the embedding {key[:12]} is not in it any more"))
    part = file.get_slice(key)
    shape = tuple(part.get_shape())
    if part.get_dtype() != STORED[kind.stored][0] or shape != kind.shape:
        raise DamagedTargets(_damaged(path, f"the embedding {key[:12]} is {part.get_dtype()} {shape}"))


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.view(torch.uint8).numpy().data).hexdigest()


def _damaged(path: Path, reason: str) -> str:
    return f"{path} is damaged ({reason}); build the targets once more with repair, which sets it aside"
