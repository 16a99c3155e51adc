"""What a run is: its settings, when it is the same as another, how it is asked to stop, and how it fails."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from typing import Any, ClassVar

from pydantic import Field, PositiveInt

from hrsam.optim import Recipe

DISK, NOT_FINITE, WORKER = 3, 4, 5  # exit codes of the command; 1 and 2 are Python's and ours for a wrong input


class RunSettings(Recipe):
    """What any run has.

    ``preset``, and ``start``: a tag or weight file of the same architecture to begin from, instead of random weights.
    ``drop_path``: stochastic depth, the chance that a picture skips the encoder's last block; less before it, linearly.
    ``out``: folder of the run.  ``accumulate``: parts of a step on each device, one after the other, each a phase's ``batch``;
    the step's loss is the mean over all of them.  ``recompute``: blocks of the encoder are computed again in the backward
    pass ("gradient checkpointing"), which takes less memory and about a third more time.
    ``budget``: seconds the run may take in all, preparation and earlier pieces included.  The phases' steps are then shares of
    that time: with 3000 and 1000 steps the second phase begins after three quarters of it, however many steps were made.
    ``workers``: processes that load pictures from files, 0 for none; ``prefetch``: steps they are ahead; ``patience``: seconds
    after which a silent one stands still.  ``log_every``, ``save_every``: steps; ``keep``: checkpoints.

    A run may go on with other values of what is in ``FREE``, since they do not change its result (``budget``: its length).
    """

    FREE: ClassVar[frozenset[str]] = frozenset(
        (
            "out",
            "budget",
            "accumulate",
            "recompute",
            "workers",
            "prefetch",
            "patience",
            "log_every",
            "save_every",
            "keep",
        )
    )

    preset: str
    start: str | None = None
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    out: str
    budget: float | None = None
    seed: int = Field(default=0, ge=0)
    accumulate: int = Field(default=1, ge=1)
    recompute: bool = False
    workers: int = Field(default=2, ge=0)
    prefetch: PositiveInt = 2
    patience: float = Field(default=25.0, gt=0)
    log_every: int = Field(default=20, ge=1)
    save_every: int = Field(default=500, ge=1)
    keep: int = Field(default=3, ge=1)


def difference(then: RunSettings, now: RunSettings, marks: dict[str, tuple[Any, Any]]) -> str | None:
    """The first thing in which two runs differ and that moves the weights, as ``name=value, not value``; None for one run.

    ``marks``: what is not in the settings, a pair of values each.
    """
    old, new = (dict(_flat(each.model_dump(mode="json", exclude=set(each.FREE)))) for each in (then, now))
    pairs = {name: (old.get(name), new.get(name)) for name in sorted(old.keys() | new.keys())} | marks
    return next((f"{name}={a}, not {b}" for name, (a, b) in pairs.items() if a != b), None)


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """``{"phases": [{"lr": 1}]}`` -> ``("phases.0.lr", 1)``, as overrides are written."""
    if isinstance(value, dict):
        pairs = [(str(key), inner) for key, inner in value.items()]
    elif isinstance(value, list):
        pairs = [(str(index), inner) for index, inner in enumerate(value)]
    else:
        yield name, value
        return
    for key, inner in pairs:
        yield from _flat(inner, f"{name}.{key}".lstrip("."))


class RunFailed(Exception):
    """A run that cannot go on; its last checkpoint is whole.  ``exit_code``: of the command."""

    def __init__(self, exit_code: int, message: str):
        super().__init__(message)
        self.exit_code = exit_code


class Signals:
    """While entered, SIGTERM and SIGINT only leave their name in ``got``; a second one does what it did before."""

    def __enter__(self) -> Signals:
        self.got: str | None = None
        self.before: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self.before[number] = signal.signal(number, self._note) or signal.SIG_DFL
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        self.got = signal.Signals(number).name
        self.__exit__()
