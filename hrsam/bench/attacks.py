"""A drill of the click page's server: all attacks of :mod:`hrsam.bench.attack_plan`, then an honest click.

An attack is held when the server refuses it and its answer names nothing of the machine.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from PIL import Image

from hrsam.bench.attack_plan import Ground, plan
from hrsam.bench.drills import NAME, SIDE, SPEED, make_pictures, small_model
from hrsam.bench.page_client import Client, serving
from hrsam.demo import decoder
from hrsam.demo.site import Site

SECRET = b"top secret bytes of another folder"
TIGHT = replace(
    SPEED, upload_bytes=1 << 20, given_bytes=1 << 16, message_bytes=1 << 16, chunk_seconds=0.3, upload_seconds=2.0,
    decode_bytes=512 << 20, decode_seconds=20.0,
)  # fmt: skip


@dataclass
class Attacks:
    """Of :func:`attacks`.  ``broken``: names of those that were not refused, or whose answer said too much."""

    tried: int
    broken: list[str]
    alive: bool


def attacks(every: int = 1, kind: str = "") -> Attacks:
    """Make those whose names begin with ``kind``, all or each ``every``-th, against a server of their own."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "pictures"
        make_pictures(folder, 3)
        _traps(folder)
        decoder.start()
        site = Site(small_model(), NAME, [folder], folder.parent / "state", side=SIDE, limits=TIGHT)
        with serving(site) as url:
            us, them = Client(url), Client(url)
            picture = us.json("GET", "/api/pictures")[0]["id"]
            ground = Ground(us, them, picture, us.desk(picture), folder, url.rsplit("=", 1)[1], TIGHT)
            honest = us.open(ground.desk)
            broken, tried = [], 0
            chosen = ((name, attack) for name, attack in plan(ground) if name.startswith(kind))
            for name, attack in islice(chosen, 0, None, every):
                tried += 1
                status, answer = attack()
                if not (status == 0 or status >= 400) or _tells(answer, folder):
                    broken.append(f"{name}: {status}")
            header, png = honest.click(20, 20)
            alive = "error" not in header and bool(png) and us.ask("GET", "/api/pictures")[0] == 200
            honest.close()
    return Attacks(tried, broken, alive)


def _tells(answer: bytes, folder: Path) -> bool:
    """Whether an answer has what nobody should see: a secret, a path of this machine, a place in the code."""
    return any(bad in answer for bad in (SECRET, str(folder.parent).encode(), b"Traceback", b".py", b"root:x:"))


def _traps(folder: Path) -> None:
    """What lies beside and among the pictures and must never be opened."""
    (folder.parent / "secret.txt").write_bytes(SECRET)
    outside = folder.parent / "outside.png"
    Image.new("RGB", (9, 9)).save(outside)
    Image.new("RGB", (9, 9)).save(folder / ".hidden.png")
    (folder / "folder.png").mkdir()
    (folder / "page.html").write_bytes(SECRET)
    if hasattr(os, "mkfifo"):
        (folder / "link.png").symlink_to(outside)
        os.mkfifo(folder / "pipe.png")
