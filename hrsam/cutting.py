"""One picture, several objects, and the commands that change them; the same commands give the same masks.

A command is what a person does once: a click, a box, an undo, a new name.  Commands have one form in memory, in messages,
in journals and in click logs: the JSON of :meth:`Command.record`.
"""

from __future__ import annotations

import re
import unicodedata
from collections import OrderedDict
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator

from hrsam import native
from hrsam.clicks import Click, check_clicks
from hrsam.frame import Frame
from hrsam.mask import Mask
from hrsam.models.model import HRSAM
from hrsam.pyramid import Pyramid
from hrsam.session import Box, EncodedPicture, History, encode_picture

MAX_ROUNDS = 200
"""Clicks, boxes and masks an object may have; each keeps its logits, 256 KB at a side of 1024."""
MAX_OBJECTS = 1000
"""Objects a picture may have at a time."""
MAX_NAME = 100
"""Characters of an object's name."""
COLOURS = ("#1e90ff", "#ff7043", "#2eb872", "#c355e8", "#f2b705", "#00a8a8", "#ef476f", "#8a7bff")
"""Given to new objects in turn."""


class Command(BaseModel):
    """Base of all commands: frozen, exact types, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
    do: str

    def record(self) -> dict[str, Any]:
        """The command as plain JSON values, as :func:`parse_command` reads them."""
        return self.model_dump(exclude_none=True)


class OnObject(Command):
    """A command to an object that is there."""

    object: int = Field(ge=1)


class ClickAt(OnObject):
    """x, y in pixels of the picture."""

    do: Literal["click"] = "click"
    x: float
    y: float
    positive: bool = True


class DrawBox(OnObject):
    """Corners in pixels of the picture."""

    do: Literal["box"] = "box"
    x0: float
    y0: float
    x1: float
    y1: float


class RunLengths(BaseModel):
    """COCO's compressed run lengths."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    size: list[int] = Field(min_length=2, max_length=2)
    counts: str


class StartFrom(OnObject):
    """Go on from a mask of the picture's size."""

    do: Literal["given"] = "given"
    rle: RunLengths


class Refine(OnObject):
    """Follow the outline at native resolution."""

    do: Literal["refine"] = "refine"


class Undo(OnObject):
    do: Literal["undo"] = "undo"


class Redo(OnObject):
    do: Literal["redo"] = "redo"


class Clear(OnObject):
    do: Literal["clear"] = "clear"


class Remove(OnObject):
    do: Literal["remove"] = "remove"


class _Description(Command):
    name: str | None = Field(default=None, min_length=1, max_length=MAX_NAME)
    colour: str | None = None

    @field_validator("name")
    @classmethod
    def _printable(cls, name: str | None) -> str | None:
        if name is not None and (not name.strip() or any(unicodedata.category(c) in ("Cc", "Cs") for c in name)):
            raise ValueError("a name is one line of text and not blank")
        return name

    @field_validator("colour")
    @classmethod
    def _hexadecimal(cls, colour: str | None) -> str | None:
        if colour is not None and not re.fullmatch("#[0-9a-fA-F]{6}", colour):
            raise ValueError("a colour is #rrggbb, for instance #1e90ff")
        return colour


class Add(_Description):
    """A new object; without a name and a colour it gets the next ones."""

    do: Literal["add"] = "add"


class Describe(_Description, OnObject):
    """Give an object another name or colour, or both."""

    do: Literal["describe"] = "describe"

    @model_validator(mode="after")
    def _something(self) -> Describe:
        if self.name is None and self.colour is None:
            raise ValueError("give a name or a colour")
        return self


AnyCommand = ClickAt | DrawBox | StartFrom | Refine | Undo | Redo | Clear | Add | Describe | Remove
_parser = TypeAdapter(Annotated[AnyCommand, Field(discriminator="do")])
_KNOWN = [kind.model_fields["do"].default for kind in get_args(AnyCommand)]


def parse_command(value: Any) -> Command:
    """A command from plain JSON values; ``ValueError`` in one sentence for anything else."""
    if isinstance(value, Command):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(f'a command is an object such as {{"do": "undo", "object": 1}}; got {type(value).__name__}')
    if value.get("do") not in _KNOWN:
        raise ValueError(f"there is no command {value.get('do')!r:.40}; known are {', '.join(_KNOWN)}")
    try:
        return _parser.validate_python(dict(value))
    except ValidationError as err:
        problem = err.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in problem["loc"][1:])
        what = problem["msg"].removeprefix("Value error, ")
        raise ValueError(f"the command {value['do']!r} is not understood: {f'{where}: ' * bool(where)}{what}") from None


@dataclass(frozen=True, eq=False)
class Thing:
    """An object of the picture; immutable, a command puts another in its place.

    ``id`` counts from 1 and is never used again; ``colour`` #rrggbb.
    """

    id: int
    name: str
    colour: str
    frame: Frame
    history: History = field(default_factory=History)

    @property
    def rounds(self) -> int:
        """How many rounds led to the mask."""
        return len(self.history.rounds)

    @property
    def can_undo(self) -> bool:
        return bool(self.history.rounds)

    @property
    def can_redo(self) -> bool:
        return bool(self.history.undone)

    @property
    def clicks(self) -> tuple[Click, ...]:
        return self.history.last.clicks if self.history.last else ()

    @property
    def box(self) -> Box | None:
        return self.history.last.box if self.history.last else None

    @property
    def iou(self) -> float:
        """The model's own estimate, 0–1; NaN before the first round and for a given mask."""
        return self.history.last.prediction.iou if self.history.last else float("nan")

    @property
    def seconds(self) -> float:
        """What the last round's decode took."""
        return self.history.last.prediction.seconds if self.history.last else 0.0

    @cached_property
    def mask(self) -> Mask:
        if self.history.last is None:
            return Mask.empty(self.frame.height, self.frame.width)
        return self.history.last.runs


@dataclass(frozen=True, eq=False)
class Change:
    """What a command does: the ``object`` it changes, and all objects ``before`` and ``after``."""

    command: Command
    object: int
    after: dict[int, Thing]
    before: dict[int, Thing]


class Cutting:
    """The objects of one picture.  A new one has object 1, named "object 1".

    ``side``: longest side of the model's input in pixels.  ``picture``: the encoded picture, None until it is needed; it may
    be shared with others.
    """

    def __init__(self, model: HRSAM, pyramid: Pyramid, side: int = 1024, picture: EncodedPicture | None = None):
        self.model, self.pyramid, self.side = model, pyramid, side
        self.frame = Frame(pyramid.height, pyramid.width, side)
        self._picture = picture
        self._regions: OrderedDict[native.Region, EncodedPicture] = OrderedDict()
        self._objects: dict[int, Thing] = {1: self._new(1, Add())}
        self._next = 2
        self._log: tuple[Command, ...] = ()

    @property
    def revision(self) -> int:
        """Number of commands accepted so far."""
        return len(self._log)

    @property
    def log(self) -> tuple[Command, ...]:
        """The commands accepted so far."""
        return self._log

    @property
    def objects(self) -> Mapping[int, Thing]:
        """The objects by id, as they are now; later commands do not change what was returned."""
        return MappingProxyType(self._objects)

    @property
    def picture(self) -> EncodedPicture | None:
        return self._picture

    @picture.setter
    def picture(self, picture: EncodedPicture | None) -> None:
        """None frees the memory of all that is encoded; it is made again when needed, and the same."""
        self._picture = picture
        if picture is None:
            self._regions.clear()

    def encode(self) -> float:
        """Encode the picture if it is not yet; returns the seconds that took, 0 when there was nothing to do."""
        if self._picture is not None:
            return 0.0
        size = self.pyramid.height, self.pyramid.width
        seen = self.pyramid.overview(self.side)
        if seen is None:
            assert self.pyramid.pixels is not None
            self._picture = encode_picture(self.model, self.pyramid.pixels, self.side)
        else:
            self._picture = encode_picture(self.model, seen, self.side, size)
        return self._picture.seconds

    def apply(self, command: Command | Mapping[str, Any]) -> int:
        """Do what ``command`` says, which may take an encode first; returns the id of the object it changed.

        Raises ``ValueError`` for a command that is refused.  Whatever is raised, nothing has changed.
        """
        return self.accept(native.finish(self.prepare(command)))

    def prepare(self, command: Command | Mapping[str, Any]) -> Generator[tuple[int, int], None, Change]:
        """Work out what ``command`` does, to be accepted later; errors as in :meth:`apply`.

        A refine pauses after each region of the picture and tells how many it has looked at, and of how many.
        """
        command = parse_command(command)
        objects, changed = yield from self._after(command)
        return Change(command, changed, objects, self._objects)

    def accept(self, change: Change) -> int:
        """Have what was prepared done; the id of the object it changes.  ``RuntimeError`` when something else came between."""
        if change.before is not self._objects:
            raise RuntimeError("the objects have changed since this was prepared")
        self._objects, self._log = change.after, (*self._log, change.command)
        self._next = max(self._next, change.object + 1)
        return change.object

    def _after(self, command: Command) -> Generator[tuple[int, int], None, tuple[dict[int, Thing], int]]:
        """The objects after ``command``, and the id of the one it changes."""
        if isinstance(command, Add):
            if len(self._objects) >= MAX_OBJECTS:
                raise ValueError(f"a picture may have {MAX_OBJECTS} objects at a time; remove one first")
            return {**self._objects, self._next: self._new(self._next, command)}, self._next
        assert isinstance(command, OnObject)
        thing = self._objects.get(command.object)
        if thing is None:
            raise ValueError(f"there is no object {command.object}; it was removed or never added")
        if isinstance(command, Remove):
            return {id: other for id, other in self._objects.items() if id != thing.id}, thing.id
        if isinstance(command, Describe):
            changed = replace(thing, name=command.name or thing.name, colour=command.colour or thing.colour)
        else:
            changed = replace(thing, history=(yield from self._played(thing.history, command)))
            changed.mask  # noqa: B018 - made here, so that a lack of memory refuses the command
        return {**self._objects, thing.id: changed}, thing.id

    def _played(self, history: History, command: Command) -> Generator[tuple[int, int], None, History]:
        if isinstance(command, Undo):
            return history.undo()
        if isinstance(command, Redo):
            return history.redo()
        if isinstance(command, Clear):
            return History()
        if len(history.rounds) >= MAX_ROUNDS:
            raise ValueError(f"an object may have {MAX_ROUNDS} rounds; undo some or clear it")
        if isinstance(command, StartFrom):
            height, width = command.rle.size
            if (height, width) != (self.frame.height, self.frame.width):
                raise ValueError(
                    f"the mask must be {self.frame.height}x{self.frame.width} as the picture; got {height}x{width}"
                )
            return history.start_from(self.frame, Mask.from_rle(command.rle.model_dump()))
        if isinstance(command, Refine):
            return (yield from native.refining(self.model, self.frame, history, self.side, self._region))
        click = None
        if isinstance(command, ClickAt):
            click = Click(command.x, command.y, command.positive)
            check_clicks([click], self.frame.height, self.frame.width)
            if (refined := native.click(self.model, self.frame, history, click, self._region)) is not None:
                return refined
        self.encode()
        assert self._picture is not None
        if click is not None:
            return history.click(self.model, self._picture, click)
        assert isinstance(command, DrawBox)
        return history.box(self.model, self._picture, (command.x0, command.y0, command.x1, command.y1))

    def _region(self, region: native.Region) -> EncodedPicture:
        """A region of the picture, encoded; the last ones are kept."""
        known = self._regions.pop(region, None)
        if known is None:
            pixels = self.pyramid.region(region.x0, region.y0, region.x1, region.y1)
            known = encode_picture(self.model, pixels, self.side)
        self._regions[region] = known
        while len(self._regions) > native.MOST_REGIONS:
            self._regions.popitem(last=False)
        return known

    def _new(self, id: int, command: Add) -> Thing:
        colour = command.colour or COLOURS[(id - 1) % len(COLOURS)]
        return Thing(id, command.name or f"object {id}", colour, self.frame)
