"""One tab's work on one picture: commands in, objects out, nothing lost.

A desk is awake when its :class:`Cutting` is in memory, and sleeps in its journal.  Whatever is asked of a sleeping desk wakes
it by replaying the journal; so a restart after a kill, a long pause, and memory that ran out are one and the same.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hrsam.clicklog import MAX_COMMANDS, fingerprint
from hrsam.cutting import Change, Cutting, Thing, parse_command
from hrsam.demo.embeddings import Embeddings, size_of
from hrsam.demo.engine import Engine, Refusal, Work
from hrsam.demo.gallery import Gallery, size
from hrsam.demo.journal import Journal, JournalError, read_journal
from hrsam.demo.limits import LIMITS, Limits
from hrsam.models.model import HRSAM
from hrsam.native import MOST_REGIONS, finish
from hrsam.pyramid import Pyramid

ROUNDS = ("click", "box", "given", "refine")  # commands that an undo takes back
ENDS = ("clear", "remove")  # after which rounds that wait have no purpose
_ID = re.compile(r"[A-Za-z0-9_-]{22}")


@dataclass(frozen=True)
class View:
    """A desk as it is at one moment; immutable, for any thread.  ``versions``: revision at which each object last changed."""

    picture: str
    revision: int
    objects: dict[int, Thing]
    versions: dict[int, int]
    cutting: Cutting
    pyramid: Pyramid


@dataclass(frozen=True)
class Done:
    """A command that was accepted: the view after it, the object it was about, and the seconds it took."""

    view: View
    object: int
    removed: bool = False
    unchanged: bool = False
    encode: float = 0.0
    decode: float = 0.0


class Desk:
    """Made by :class:`Desks`.  Methods whose names begin with ``do_`` run in the engine's thread."""

    def __init__(self, desks: Desks, id: str, owner: str, picture: str):
        self.id, self.owner, self.picture = id, owner, picture
        self.view: View | None = None  # None: it sleeps
        self.used = time.monotonic()
        self.sockets: set[Any] = set()  # connections that show it
        self.turn = asyncio.Lock()  # answers are made in the order of what they answer
        self._desks = desks
        self._journal: Journal | None = None

    def submit(self, value: Any, tell: Callable[[tuple[int, int]], None] | None = None) -> Work:
        """Put a command into the engine's queue; its future gives :class:`Done`.  Raises :class:`Refusal`.

        An undo takes back the newest round that waits or a refine that is not done, and only when there is none one that was
        played.  A new round takes back a refine of its object that is not done.  ``tell``: hears, in the engine's thread, how
        many regions a refine has looked at, and of how many.
        """
        try:
            command = parse_command(value)
        except ValueError as error:
            raise Refusal("refused", str(error)) from None
        self.used = time.monotonic()
        about: Any = getattr(command, "object", None)
        engine = self._desks.engine
        if command.do == "undo" and engine.drop(self.id, about, newest=True):
            work = Work(lambda: self.do_show(about), about=about)
        else:
            work = Work(lambda: finish(self.do_apply(command)), about=about, round=command.do in ROUNDS)
        if command.do == "refine":
            work.run, work.long, work.tell = lambda: self.do_apply(command, engine.settle), True, tell
        if command.do in ROUNDS:
            engine.drop_long(self.id, about)
        if command.do in ENDS:
            engine.drop(self.id, about, newest=False)
        engine.submit(self.id, work)
        return work

    def wake(self) -> Work:
        """Have it in memory: the future gives a :class:`View`."""
        work = Work(self.do_wake, ahead=True)
        self._desks.engine.submit(self.id, work)
        return work

    def encode(self) -> Work:
        """Have its picture encoded: the future gives the seconds that took."""
        work = Work(self.do_encode, ahead=True)
        self._desks.engine.submit(self.id, work)
        return work

    @property
    def encoded(self) -> bool:
        """Whether its picture's embedding is at hand; False when it sleeps and nobody knows."""
        view = self.view
        return view is not None and self._desks.key(view.pyramid) in self._desks.embeddings

    def do_wake(self) -> View:
        self.used = time.monotonic()
        if self.view is None:
            try:
                self.view = self._replayed()
            except BaseException:
                self.do_sleep()
                raise
            self._desks.do_make_room(self)
        return self.view

    def do_sleep(self) -> None:
        """Leave memory; the journal stays."""
        self.view = None
        self._desks.do_take_back(self)
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    def do_encode(self) -> float:
        view = self.do_wake()
        return self._desks.do_lend(self, view.cutting)

    def do_show(self, object: int) -> Done:
        """What became of ``object`` when a round on it was taken back before it was done."""
        view = self.do_wake()
        _there(view, object)
        return Done(view, object, unchanged=True)

    def do_apply(
        self, command: Any, settle: Callable[[], bool] = lambda: True
    ) -> Generator[tuple[int, int], None, Done]:
        """Do what ``command`` says, a refine in pieces.

        ``settle``: is asked before anything changes, and when it says no nothing does.
        """
        encode = decode = 0.0
        prepared: Change | None = None
        while prepared is None:  # anew when it was put to sleep between two pieces
            view = self.do_wake()
            if command.do != "add":
                _there(view, command.object)
            if view.revision >= MAX_COMMANDS:
                raise Refusal("refused", f"{MAX_COMMANDS} commands are enough for one picture; save it and begin anew")
            pieces = view.cutting.prepare(command)
            while self.view is view and prepared is None:
                if command.do in ROUNDS and command.do != "given":
                    encode += self._desks.do_lend(self, view.cutting)
                began = time.perf_counter()
                try:
                    told = next(pieces)
                except StopIteration as end:
                    prepared = end.value
                except ValueError as error:
                    raise Refusal("refused", str(error)) from None
                decode += time.perf_counter() - began
                if prepared is None:
                    yield told
                    self.used = time.monotonic()
        if not settle():
            raise Refusal("superseded", "it was taken back before it was done")
        assert self._journal is not None
        changed = view.cutting.accept(prepared)
        try:
            self._journal.append(command.record(), self._desks.limits.journal_bytes)
        except BaseException as error:
            self.do_sleep()  # what is not saved has not happened: waking gives the state before
            if isinstance(error, JournalError):
                raise Refusal("refused", str(error)) from None
            raise
        self.view = view = self._seen(view.cutting, view.pyramid, {**view.versions, changed: view.cutting.revision})
        removed = changed not in view.objects
        return Done(view, changed, removed=removed, encode=encode, decode=decode if command.do in ROUNDS else 0.0)

    def _replayed(self) -> View:
        desks = self._desks
        try:
            self._journal, records = Journal.open(desks.path(self.id))
        except FileNotFoundError:
            raise Refusal("gone", "this piece of work is gone; open the picture anew") from None
        except JournalError as error:
            raise Refusal("gone", str(error)) from None
        header = self._journal.header
        pyramid = desks.open(self)
        if pyramid.sha256 != header["sha256"]:
            raise Refusal("gone", "the picture has changed since; open it anew")
        if header["weights"] != desks.weights or header["side"] != desks.side:
            raise Refusal(
                "gone",
                f"this was begun with the model {header['model']} at side {header['side']}; open the picture anew",
            )
        cutting = Cutting(desks.model, pyramid, desks.side)
        versions = {1: 0}
        try:
            for record in records:
                command = parse_command(record)
                if command.do in ROUNDS and command.do != "given":
                    desks.do_lend(self, cutting)
                changed = cutting.apply(command)
                versions[changed] = cutting.revision
        except ValueError:
            raise Refusal("gone", "this piece of work is of another version; open the picture anew") from None
        return self._seen(cutting, pyramid, versions)

    def _seen(self, cutting: Cutting, pyramid: Pyramid, versions: dict[int, int]) -> View:
        objects = dict(cutting.objects)
        kept = {id: versions[id] for id in objects}
        return View(self.picture, cutting.revision, objects, kept, cutting, pyramid)


def _there(view: View, object: int) -> None:
    if object not in view.objects:
        raise Refusal("gone", f"object {object} is gone; it was removed or never there")


class Desks:
    """All desks of a server.  ``folder``: their journals.  ``model_name``: for people; saved work names the weights too."""

    def __init__(
        self,
        model: HRSAM,
        model_name: str,
        gallery: Gallery,
        engine: Engine,
        embeddings: Embeddings,
        folder: Path,
        side: int,
        limits: Limits = LIMITS,
    ):
        self.model, self.model_name, self.gallery, self.engine = model, model_name, gallery, engine
        self.embeddings, self.side, self.limits = embeddings, side, limits
        self.weights = fingerprint(model)
        self._folder = folder
        folder.mkdir(mode=0o700, exist_ok=True)
        self._desks: dict[str, Desk] = {}
        self._lent: OrderedDict[Desk, Cutting] = OrderedDict()  # who has an embedding, the last one used at the end
        self._made: list[float] = []
        self._lock = threading.Lock()
        self._tidy()

    def create(self, owner: str, picture: str, pyramid: Pyramid) -> Desk:
        """A new desk for a picture that is open; raises :class:`Refusal`."""
        now = time.monotonic()
        with self._lock:
            self._made = [then for then in self._made if now - then < 60]
            if len(self._made) >= self.limits.new_desks_a_minute:
                raise Refusal("busy", "too many pictures were opened within a minute; wait a little")
            self._made.append(now)
        id = secrets.token_urlsafe(16)
        header = {
            "owner": owner,
            "picture": picture,
            "sha256": pyramid.sha256,
            "side": self.side,
            "model": self.model_name,
            "weights": self.weights,
        }
        try:
            Journal.create(self.path(id), header).close()
        except JournalError as error:
            raise Refusal("refused", str(error)) from None
        return self._remember(Desk(self, id, owner, picture))

    def find(self, id: str, owner: str) -> Desk | None:
        """The desk of that id if it is ``owner``'s."""
        with self._lock:
            desk = self._desks.get(id)
        if desk is None and _ID.fullmatch(id):
            try:
                header, _, _ = read_journal(self.path(id))
                desk = self._remember(Desk(self, id, header["owner"], header["picture"]))
            except (OSError, JournalError, KeyError):
                return None
        if desk is None or not secrets.compare_digest(desk.owner, owner):
            return None
        desk.used = time.monotonic()
        return desk

    def path(self, id: str) -> Path:
        assert _ID.fullmatch(id)
        return self._folder / f"{id}.journal"

    def open(self, desk: Desk) -> Pyramid:
        """The desk's picture; raises :class:`Refusal`."""
        entry = self.gallery.find(desk.picture, desk.owner)
        if entry is None:
            raise Refusal("gone", "the picture is gone or has changed; open it anew")
        try:
            return self.gallery.open(entry)
        except ValueError as error:
            raise Refusal("gone", str(error)) from None

    def key(self, pyramid: Pyramid) -> tuple[str, int]:
        return pyramid.sha256, self.side

    def do_lend(self, desk: Desk, cutting: Cutting) -> float:
        """Give a desk's ``cutting`` its picture's embedding; returns the seconds that encoding took, 0 when it was at hand.

        The desks last used keep theirs, with the regions that were looked at closely; the others give them back.
        """
        key = self.key(cutting.pyramid)
        if cutting.picture is None:
            cutting.picture = self.embeddings.get(key)
        seconds = cutting.encode()
        assert cutting.picture is not None
        self.embeddings.put(key, cutting.picture)
        self._lent[desk] = cutting
        self._lent.move_to_end(desk)
        while len(self._lent) > max(1, self.limits.regions_bytes // (MOST_REGIONS * size_of(cutting.picture))):
            _, other = self._lent.popitem(last=False)
            other.picture = None
        return seconds

    def do_take_back(self, desk: Desk) -> None:
        """The desk gives its embeddings back."""
        self._lent.pop(desk, None)

    def do_make_room(self, kept: Desk) -> None:
        """Put those to sleep that were not used for longest, until all fit their limits."""
        awake = sorted((desk for desk in self._list() if desk.view is not None), key=lambda desk: desk.used)
        for desk in awake:
            open_pictures = {id(d.view.pyramid): size(d.view.pyramid) for d in awake if d.view is not None}
            count = sum(d.view is not None for d in awake)
            if count <= self.limits.desks_awake and sum(open_pictures.values()) <= self.limits.open_pictures_bytes:
                return
            if desk is not kept:
                desk.do_sleep()

    def do_rest(self) -> None:
        """Put those to sleep that nothing was asked of for long, and forget them."""
        for desk in self._list():
            if time.monotonic() - desk.used > self.limits.desk_idle_seconds:
                desk.do_sleep()
                if not desk.sockets:
                    with self._lock:
                        self._desks.pop(desk.id, None)

    def rest(self) -> None:
        """Have :meth:`do_rest` done."""
        self.engine.submit(self, Work(self.do_rest))

    def do_relieve(self) -> None:
        """Let go of everything that can be made again, when memory has run out."""
        self.embeddings.drop()
        self.gallery.drop()
        self.close()

    def close(self) -> None:
        """Put all to sleep; in the engine's thread or when that has stopped."""
        for desk in self._list():
            desk.do_sleep()

    def _list(self) -> list[Desk]:
        with self._lock:
            return list(self._desks.values())

    def _remember(self, desk: Desk) -> Desk:
        with self._lock:
            return self._desks.setdefault(desk.id, desk)

    def _tidy(self) -> None:
        for path in self._folder.glob("*.journal"):
            try:
                if time.time() - path.stat().st_mtime > 86400 * self.limits.journal_days:
                    path.unlink()
            except OSError:  # another server was faster
                continue
