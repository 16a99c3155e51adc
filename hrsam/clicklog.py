"""Click logs: what was done to a picture, in a file from which it can be done again, to the same bytes.

``{"format": 1, "picture": {"name", "sha256", "width", "height"}, "model": {"name", "sha256"}, "side": 1024,
"commands": […]}``; the commands are those of :mod:`hrsam.cutting`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hrsam.checkpoint import write_atomically
from hrsam.cutting import Cutting, parse_command
from hrsam.models.model import HRSAM
from hrsam.pyramid import Pyramid

MAX_BYTES = 256 << 20
"""Largest log that is read; a given mask of a large picture may take some megabytes."""
MAX_COMMANDS = 100_000
"""Most commands of a log that is read."""

_STRICT = ConfigDict(extra="forbid", frozen=True, strict=True)
_SHA256 = Field(pattern="^[0-9a-f]{64}$")


class PictureId(BaseModel):
    """``name`` of the file, without a folder; ``sha256`` of its bytes; size in pixels, upright."""

    model_config = _STRICT
    name: str = Field(max_length=1000)
    sha256: str = _SHA256
    width: int = Field(ge=1)
    height: int = Field(ge=1)


class ModelId(BaseModel):
    """``name`` as a person would load it; ``sha256`` of its weights, see :func:`fingerprint`."""

    model_config = _STRICT
    name: str = Field(max_length=1000)
    sha256: str = _SHA256


class ClickLog(BaseModel):
    """Which picture, which model at which side, and what was done; ``commands`` are plain JSON values."""

    model_config = _STRICT
    format: Literal[1] = 1
    picture: PictureId
    model: ModelId
    side: int = Field(ge=16, le=16384)
    commands: list[dict[str, Any]] = Field(max_length=MAX_COMMANDS)

    def text(self) -> bytes:
        """The log as JSON, a command a line."""
        head = json.dumps(self.model_dump(exclude={"commands"}), indent=1)
        lines = ",\n  ".join(json.dumps(command) for command in self.commands)
        return (head.removesuffix("\n}") + ',\n "commands": [\n  ' + lines + "\n ]\n}\n").encode()


def make_log(cutting: Cutting, picture: str, model: str) -> ClickLog:
    """The log of all that was done so far; ``picture``: name of its file, ``model``: the name it was loaded by."""
    pyramid = cutting.pyramid
    return ClickLog(
        picture=PictureId(name=picture, sha256=pyramid.sha256, width=pyramid.width, height=pyramid.height),
        model=ModelId(name=model, sha256=fingerprint(cutting.model)),
        side=cutting.side,
        commands=[command.record() for command in cutting.log],
    )


def fingerprint(model: HRSAM) -> str:
    """SHA-256 of a model's weights as they are in memory, with their names: the same for every file that holds them."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        digest.update(values.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_log(path: str | Path, log: ClickLog) -> None:
    """Write ``log``, whole or not at all."""
    write_atomically(path, lambda file: file.write(log.text()))


def read_log(source: str | Path | bytes) -> ClickLog:
    """A log from a file or its bytes, its commands checked; ``ValueError`` in one sentence for anything that is no log."""
    name = "click log" if isinstance(source, bytes) else str(source)
    try:
        return _parse(source if isinstance(source, bytes) else _read(Path(source)))
    except ValueError as err:
        raise ValueError(f"{name}: {err}") from None


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise ValueError("there is no such file; give the path of a click log")
    with path.open("rb") as file:
        return file.read(MAX_BYTES + 1)


def _parse(data: bytes) -> ClickLog:
    if len(data) > MAX_BYTES:
        raise ValueError(f"a click log may have {MAX_BYTES >> 20} MB; this file is larger")
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as err:
        raise ValueError(f"is not JSON ({err}); give a file that `log.json` of the click page or hrsam wrote") from None
    if not isinstance(value, dict):
        raise ValueError(f"a click log is a JSON object; got {type(value).__name__}")
    if value.get("format") != 1:
        raise ValueError(f"has format {value.get('format')!r:.40}, this version reads format 1; use a newer hrsam")
    try:
        log = ClickLog.model_validate(value)
    except ValidationError as err:
        problem = err.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise ValueError(f"{where:.80}: {problem['msg']}; it is damaged or no click log") from None
    for number, command in enumerate(log.commands, 1):
        try:
            parse_command(command)
        except ValueError as err:
            raise ValueError(f"command {number}: {err}") from None
    return log


def replay(log: ClickLog, model: HRSAM, pyramid: Pyramid) -> Cutting:
    """Do again what ``log`` says.  On the same kind of machine with as many threads every mask is the same to the byte.

    Raises ``ValueError`` when the picture or the model is another one, or a command is refused.
    """
    if (pyramid.sha256, pyramid.width, pyramid.height) != (log.picture.sha256, log.picture.width, log.picture.height):
        raise ValueError(
            f"the log is of {log.picture.name}, {log.picture.width}x{log.picture.height} pixels with the SHA-256 "
            f"{log.picture.sha256[:16]}…; this picture has {pyramid.width}x{pyramid.height} and {pyramid.sha256[:16]}…"
        )
    if (found := fingerprint(model)) != log.model.sha256:
        raise ValueError(
            f"the log was made with {log.model.name}, weights {log.model.sha256[:16]}…; this model's are {found[:16]}…: "
            "give that one by --model"
        )
    cutting = Cutting(model, pyramid, log.side)
    for number, command in enumerate(log.commands, 1):
        try:
            cutting.apply(command)
        except ValueError as err:
            raise ValueError(f"command {number} of the log is refused: {err}") from None
    return cutting
