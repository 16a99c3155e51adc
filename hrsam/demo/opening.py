"""``hrsam demo``: from a model and some pictures to a page in a browser."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hrsam.demo.tour import PHOTO
from hrsam.models.model import HRSAM

NEEDS = ("fastapi", "uvicorn", "websockets")


def open_page(
    model: HRSAM,
    name: str,
    pictures: Sequence[Path] = (),
    *,
    state: Path | None = None,
    side: int = 1024,
    host: str = "127.0.0.1",
    port: int | None = None,
    browser: bool = True,
    say: Callable[[str], Any] = print,
) -> None:
    """Serve the click page until Ctrl-C.

    ``name``: what ``model`` was loaded by.  ``pictures``: files or one folder, the bundled photograph when there are none.
    ``state``: folder for journals, uploads and the key of cookies, :func:`default_state` unless given.
    Raises ``ValueError`` for pictures, a port or a folder that cannot be used, and when the extra ``demo`` is missing.
    """
    if missing := [needed for needed in NEEDS if find_spec(needed) is None]:
        raise ValueError(f"the click page needs {', '.join(missing)}; run: pip install 'hrsam[demo]'")
    from hrsam.demo.server import listen, serve
    from hrsam.demo.site import Site

    listening = listen(host, port)
    try:
        site = Site(
            model, Path(name).name, pictures or [PHOTO], default_state() if state is None else state, side=side,
            notes=notes(model, name),
        )  # fmt: skip
        serve(site, host, listening, browser=browser, say=say)
    finally:
        listening.close()


def notes(model: HRSAM, name: str) -> list[str]:
    """What a person should know before judging masks."""
    found = []
    if model.device.type == "cpu":
        found.append(
            "The model runs on the CPU: a picture is encoded in a second or more, clicks are quick after that."
        )
    if name.endswith(".starter"):
        found.append("These weights are small and for trying out; use converted weights for real work.")
    return found


def default_state() -> Path:
    """Where programs of this system keep what should outlive them."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    else:
        base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "hrsam"
