"""``hrsam bench page``: the click page in a headless browser, from its address to the mask on the screen."""

from __future__ import annotations

import io
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from PIL import Image

from hrsam import weights
from hrsam.bench import models
from hrsam.bench.demo import MODELS, SIDE, picture
from hrsam.bench.gate import BenchError
from hrsam.bench.record import Record
from hrsam.bench.timing import summary
from hrsam.demo.engine import apart
from hrsam.models.model import HRSAM

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
WINDOW = {"width": 1280, "height": 720}
OPENED, CLICKED = "from the address to a picture that can be moved", "from a click to its mask on the screen"
ENCODED = "from the address to a picture that is encoded"
MOVES = ("zooming in", "moving", "zooming out")
CLICKS = 5  # on an object, before it is cleared


def bench_page(
    *,
    device: torch.device,
    sides: Sequence[int] = (),
    presets: Sequence[str] = (),
    quick: bool = False,
    seconds: float = 15.0,
) -> dict[str, Any]:
    """Opening, clicking, zooming and moving, as a person sees it, on pictures of ``sides`` pixels at a model side of 1024.

    ``presets`` as in :func:`hrsam.bench.demo.bench_demo`; masks without an object have no time.  ``answers``: bytes of the
    answers to clicks, with their masks.  Raises ``ValueError`` when the extra ``demo``, Playwright or a browser is missing,
    and ``BenchError`` when the page complains or saves another mask than the library makes.
    """
    path = browser_path()
    record = Record("page", device, quick=quick, seconds=seconds)
    answers, frames = {}, {}
    for preset in presets or MODELS:
        model = apart(partial(_model, preset, device, quick))
        for side in sides or ((512,) if quick else (SIDE,)):
            what = f"{preset} {side}"
            answers[what], frames[what] = _measured(record, model, preset, side, path)
    return record.done(answers=answers, frames_per_second=frames)


def _model(preset: str, device: torch.device, quick: bool) -> HRSAM:
    return weights.load(preset, device) if "." in preset else models.random_model(preset, device, quick)


def browser_path() -> str:
    """Where the browser is; ``ValueError``, one sentence, when something that this needs is missing."""
    if any(find_spec(name) is None for name in ("fastapi", "uvicorn", "websockets")):
        raise ValueError("the benchmark page needs the click page; run: pip install 'hrsam[demo]'")
    if find_spec("playwright") is None:
        raise ValueError("the benchmark page needs Playwright; run: pip install playwright")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        raise ValueError(
            "the benchmark page needs a browser, and chromium was not found; run: apt-get install chromium"
        )
    return found


@contextmanager
def browsing(path: str) -> Iterator[Any]:
    """A fresh headless browser, Playwright's."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=path, headless=True, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


def settle(page: Any, **wanted: Any) -> None:
    """Wait until every command is answered and everything is drawn; ``wanted``: more of what the page says of itself."""
    state = {"ready": "true", "waiting": "0", "drawn": "true", **{name: str(value) for name, value in wanted.items()}}
    page.wait_for_selector("#stage" + "".join(f'[data-{name}="{value}"]' for name, value in state.items()))


def said(page: Any) -> dict[str, str]:
    """What the page says of itself."""
    return page.evaluate("() => ({...document.getElementById('stage').dataset})")


def place(page: Any, x: float, y: float) -> tuple[float, float]:
    """Where the middle of a pixel of the picture is in the window."""
    data, stage = said(page), page.locator("#stage").bounding_box()
    scale = float(data["scale"])
    return stage["x"] + (x + 0.5) * scale + float(data["x"]), stage["y"] + (y + 0.5) * scale + float(data["y"])


def zoom(page: Any, x: float, y: float, by: float) -> None:
    """Turn the wheel over a pixel of the picture; ``by`` < 0 zooms in."""
    page.mouse.move(*place(page, x, y))
    for _ in range(10):
        page.mouse.wheel(0, by)
        time.sleep(0.03)


def pan(page: Any) -> None:
    """Drag the picture a little."""
    page.mouse.move(700, 400)
    page.mouse.down()
    for step in range(12):
        page.mouse.move(700 - 12 * step, 400 - 6 * step)
        time.sleep(0.02)
    page.mouse.up()


def frames(page: Any, act: Callable[[], None]) -> list[float]:
    """Milliseconds from one frame to the next while ``act`` is done."""
    page.evaluate(
        """() => {
            const seen = (window.frames_seen = []);
            const see = (time) => window.frames_seen === seen && seen.push(time) && requestAnimationFrame(see);
            requestAnimationFrame(see);
        }"""
    )
    act()
    seen = page.evaluate("() => { const all = window.frames_seen; window.frames_seen = null; return all; }")
    return np.diff(seen).tolist()


def _measured(
    record: Record, model: HRSAM, preset: str, side: int, path: str
) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes of the answers to clicks, and frames a second; the times go into ``record``."""
    from hrsam.bench.page_client import serving
    from hrsam.demo.site import Site

    width, opens = (256, 2) if record.quick else (1024, 5)
    opened: list[float] = []
    encoded: list[float] = []
    with tempfile.TemporaryDirectory() as temporary:
        photo = Path(temporary) / "picture.jpg"
        Image.fromarray(picture(side)).save(photo, quality=90)
        for number in range(opens):  # everything but the model is new each time
            site = Site(model, preset, [photo], Path(temporary) / f"state{number}", side=width)
            with serving(site) as url, browsing(path) as browser:
                page = browser.new_context(viewport=WINDOW).new_page()
                complaints, sizes = _listened(page)
                page.goto(url)
                page.wait_for_selector('#stage[data-drawn="true"]')
                opened.append(page.evaluate("() => performance.now()"))
                settle(page)
                encoded.append(page.evaluate("() => performance.now()"))
                if number < opens - 1:
                    continue
                clicked = _clicked(page, side, record.seconds)
                moved = _moved(page, side)
                _check(record, f"{preset} {side}", page, url, model, photo)
                if complaints:
                    raise BenchError(f"{preset} {side}: the page complains: {complaints[0]}; no speed is shown for it")
    if len(clicked) < 2:
        raise BenchError(f"{preset} {side}: the masks hold no object; name trained weights with --preset")
    times = {
        OPENED: opened,
        ENCODED: encoded,
        CLICKED: clicked,
        **{f"a frame while {name}": gaps for name, gaps in moved.items()},
    }
    record.add({"preset": preset, "picture": side}, {name: summary(values) for name, values in times.items()})
    speeds = {name: round(1000 / statistics.fmean(gaps), 1) for name, gaps in moved.items()}
    return {"median": statistics.median(sizes), "largest": max(sizes)}, speeds


def _listened(page: Any) -> tuple[list[str], list[int]]:
    """What the page complains of, and the bytes of answers with a mask; both grow."""
    from hrsam.demo.messages import unpack

    complaints: list[str] = []
    sizes: list[int] = []

    def hear(message: Any) -> None:
        if isinstance(message, bytes) and "mask" in unpack(message)[0]:
            sizes.append(len(message))

    page.on("websocket", lambda socket: socket.on("framereceived", hear))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda line: line.type in ("error", "warning") and complaints.append(line.text))
    return complaints, sizes


def _clicked(page: Any, side: int, seconds: float) -> list[float]:
    """Click on the picture's middle parts; milliseconds of each click that showed a mask."""
    rng, times, revision = np.random.default_rng(models.SEED), [], 0
    end = time.perf_counter() + seconds
    while len(times) < 2 or time.perf_counter() < end:
        for _ in range(CLICKS):
            x, y = (int(v) for v in rng.uniform(0.25 * side, 0.75 * side, 2))
            page.mouse.click(*place(page, x, y))
            settle(page, revision=(revision := revision + 1))
            page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
            if total := page.locator("#times").get_attribute("data-total"):
                times.append(float(total))
        if revision > 20 and not times:
            break
        page.keyboard.press("c")
        settle(page, revision=(revision := revision + 1))
    page.mouse.click(*place(page, side // 2, side // 2))
    settle(page, revision=revision + 1)
    return times


def _moved(page: Any, side: int) -> dict[str, list[float]]:
    """Milliseconds between frames of each of ``MOVES``."""
    acts = (
        lambda: zoom(page, side / 2, side / 2, -120),
        lambda: pan(page),
        lambda: zoom(page, side / 2, side / 2, 120),
    )
    return {name: frames(page, act) for name, act in zip(MOVES, acts)}


def _check(record: Record, name: str, page: Any, url: str, model: HRSAM, photo: Path) -> None:
    """Whether the mask that is saved is that of the saved clicks, played by the library."""
    from hrsam.clicklog import read_log, replay
    from hrsam.pyramid import open_pyramid

    base = f"http://{urlsplit(url).netloc}/api/desks/{said(page)['desk']}/export"
    log = read_log(page.request.get(f"{base}/log.json").body())
    saved = np.asarray(Image.open(io.BytesIO(page.request.get(f"{base}/mask.png?object=1").body()))) > 0
    if not np.array_equal(saved, replay(log, model, open_pyramid(photo)).objects[1].mask.array()):
        raise BenchError(f"{name}: the page saves another mask than the library makes; no speed is shown for it")
    same = torch.ones(1)
    record.gate.check(f"{name}: the mask after {len(log.commands)} commands, to the pixel", same, same.double(), same)
