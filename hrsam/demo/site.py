"""What stands behind one address: model, pictures, desks, and who draws masks."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hrsam.demo.desk import Desks
from hrsam.demo.embeddings import Embeddings
from hrsam.demo.engine import Engine
from hrsam.demo.gallery import Gallery
from hrsam.demo.guard import read_secret
from hrsam.demo.limits import LIMITS, Limits
from hrsam.demo.live import Painter
from hrsam.models.model import HRSAM


class Site:
    """Everything behind one address.

    ``model_name``: tag or file name and hash, kept with saved work.  ``state``: folder for journals, uploads and the secret.
    ``notes``: sentences that the page shows.  Raises ``ValueError`` for sources that are not there.
    """

    def __init__(
        self,
        model: HRSAM,
        model_name: str,
        sources: Sequence[Path],
        state: Path,
        *,
        side: int = 1024,
        notes: Sequence[str] = (),
        limits: Limits = LIMITS,
    ):
        state.mkdir(parents=True, mode=0o700, exist_ok=True)
        self.secret = read_secret(state / "secret")
        self.model, self.model_name, self.side, self.limits = model, model_name, side, limits
        self.notes = tuple(notes)
        self.gallery = Gallery(sources, state, self.secret, limits)
        self.engine = Engine(limits.waiting_a_desk, limits.waiting, [lambda: self.desks.do_relieve()], self._advice)
        embeddings = Embeddings(limits.embeddings_bytes)
        self.desks = Desks(model, model_name, self.gallery, self.engine, embeddings, state / "desks", side, limits)
        self.painters = ThreadPoolExecutor(2, "hrsam-painter")
        self.decoders = ThreadPoolExecutor(2, "hrsam-decoder")  # each waits for a process that may take much memory
        self.paint = Painter(self.painters, limits)

    def about(self) -> dict[str, Any]:
        limits = self.limits
        return {
            "version": _version(),
            "model": self.model_name.split(" ")[0],
            "preset": self.model.config.preset,
            "device": str(self.model.device),
            "side": self.side,
            "notes": self.notes,
            "limits": {
                "upload_bytes": limits.upload_bytes,
                "given_bytes": limits.given_bytes,
                "message_bytes": limits.message_bytes,
                "waiting": limits.waiting_a_desk,
                "mask_side": limits.mask_side,
            },
        }

    def close(self) -> None:
        self.engine.stop()
        self.desks.close()
        self.painters.shutdown()
        self.decoders.shutdown()

    def _advice(self) -> str:
        half = max(256, self.side // 2 // 16 * 16)
        return f"start the server with --side {half}, which takes a quarter, or close other programs"


def _version() -> str:
    try:
        return version("hrsam")
    except PackageNotFoundError:  # run from its folder, without being installed
        return "not installed"
