"""The click page in a real browser: what a person does with it, what it shows, and what it saves."""

import io
import json
import os
import re
import shutil
import signal
import struct
import time
import zlib
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hrsam.bench.page import BROWSERS, FLAGS, frames, pan, zoom
from hrsam.demo import messages, outline
from hrsam.mask import Mask
from tests.page import Demo, Tab, api, photograph, starter

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e '.[dev]'")
pytest.importorskip("fastapi", reason="needs the extra demo: pip install -e '.[demo]'")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium"),
    pytest.mark.usefixtures("one_thread"),  # as many as the server has
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures")
    sizes = {"ball.png": (240, 320), "middle.png": (600, 800), "other.png": (200, 150), "wide.png": (320, 4800)}
    for name, (height, width) in sizes.items():
        Image.fromarray(photograph(height, width)).save(path / name)
    large = Image.fromarray(photograph(300, 400)).resize((3000, 2000))
    large.save(path / "large.jpg", quality=90)
    return path


@pytest.fixture(scope="module")
def demo(folder, tmp_path_factory):
    server = Demo(folder, tmp_path_factory.mktemp("state"))
    server.launch()
    starter()  # meanwhile
    server.wait()
    yield server
    server.signal(signal.SIGKILL)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as engine:
        found = engine.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield found
        found.close()


@pytest.fixture
def tabs(browser, demo):
    """Opens tabs; at the end none may have complained, nor the browser about the page's policy."""
    opened = []

    def make(**how):
        opened.append(Tab(browser, demo, **how))
        return opened[-1]

    yield make
    complaints = [text for tab in opened for text in tab.complaints]
    for tab in opened:
        tab.context.close()
    assert complaints == []


def test_a_ball_is_cut_out_saved_and_is_what_the_library_cuts_out(tabs, folder):
    tab, session = tabs(), api(folder / "ball.png")
    tab.open("ball.png")
    tab.click(160, 110)
    tab.settle(revision=1)
    session.click(160, 110)
    tab.click(20, 30, button="right")
    tab.settle(revision=2)
    session.click(20, 30, positive=False)
    tab.click(300, 200, shift=True)
    tab.settle(revision=3)
    assert tab.figures()[1] == "1 on, 2 beside"
    tab.page.locator("#undo").click()
    tab.settle(revision=4)
    assert tab.figures()[1] == "1 on, 1 beside"
    assert np.array_equal(tab.saved_mask() > 127, session.mask)

    tab.page.locator("[data-tool=box]").click()
    tab.drag((80, 40), (240, 200))
    tab.settle(revision=5)
    session.box(80, 40, 240, 200)
    tab.press("Control+z")
    tab.settle(revision=6)
    tab.press("Control+Shift+z")
    tab.settle(revision=7)
    tab.page.mouse.move(*tab.at(200, 150))
    for _ in range(8):
        tab.page.mouse.wheel(0, -120)
    tab.settle()
    assert float(tab.data()["scale"]) > 6
    tab.click(203, 151)
    tab.settle(revision=8)
    session.click(203, 151)

    tab.press("0")
    tab.assert_cut_out(session.mask, [(160, 110), (20, 30), (203, 151)])
    saved = tab.saved_mask()
    assert set(np.unique(saved)) == {0, 255}
    assert (saved > 127).tobytes() == session.mask.tobytes()
    assert 10000 < session.mask.sum() < 25000  # the ball has 16,300
    assert list(tab.commands()) == [
        {"do": "click", "object": 1, "x": 160.0, "y": 110.0, "positive": True},
        {"do": "click", "object": 1, "x": 20.0, "y": 30.0, "positive": False},
        {"do": "click", "object": 1, "x": 300.0, "y": 200.0, "positive": False},
        {"do": "undo", "object": 1},
        {"do": "box", "object": 1, "x0": 80.0, "y0": 40.0, "x1": 240.0, "y1": 200.0},
        {"do": "undo", "object": 1},
        {"do": "redo", "object": 1},
        {"do": "click", "object": 1, "x": 203.0, "y": 151.0, "positive": True},
    ]
    cutout = np.array(Image.open(io.BytesIO(tab.saved("#save-cutout"))))
    assert (cutout[..., 3] > 0).sum() == session.mask.sum()
    times = tab.page.locator("#times").inner_text()
    assert all(name in times for name in ("encode", "decode", "transfer", "on screen"))
    assert re.search(r"Estimated IoU\n0\.\d{3}", tab.page.locator("#figures").inner_text())


def test_a_mask_that_is_sent_thinned_out_is_exact_when_seen_closely(tabs, folder):
    tab, session = tabs(), api(folder / "wide.png")
    tab.open("wide.png")
    tab.press("p")  # no panel
    tab.click(2400, 160)
    tab.settle(revision=1)
    session.click(2400, 160)
    tab.assert_cut_out(session.mask, [(2400, 160)])


def test_a_mask_of_noise_is_sent_coarser_and_is_exact_when_seen_closely(tabs, tmp_path):
    tab, sizes = tabs(), []
    hear = lambda message: isinstance(message, bytes) and sizes.append(len(message))  # noqa: E731
    tab.page.on("websocket", lambda socket: socket.on("framereceived", hear))
    tab.open("middle.png")
    noise = np.random.default_rng(0).random((600, 800)) < 0.5
    Image.fromarray(noise).save(tmp_path / "noise.png")
    tab.page.set_input_files("#mask-file", tmp_path / "noise.png")
    tab.settle(revision=1)
    tab.assert_cut_out(noise, [(0, 0)])
    assert np.array_equal(tab.saved_mask() > 127, noise)
    assert max(sizes) <= 50_000 < len(outline.encode(outline.runs_of(Mask.of(noise), (0, 0, 800, 600))))


def test_clicks_show_before_they_are_answered_and_an_undo_takes_back_the_last(tabs, demo):
    tab = tabs()
    tab.open("ball.png")
    tab.press("1")
    tab.settle()
    demo.signal(signal.SIGSTOP)
    try:
        tab.click(160, 110)
        tab.click(150, 120)
        tab.click(100, 90)
        tab.page.wait_for_selector('#stage[data-waiting="3"][data-drawn="true"]')
        assert tab.figures()[1] == "3 on, 0 beside"
        assert tab.covered(0, 320, 240)[110, 160]
        tab.press("Control+z")
        assert tab.figures()[1] == "2 on, 0 beside"
    finally:
        demo.signal(signal.SIGCONT)
    tab.settle()
    assert tab.figures()[1] == "2 on, 0 beside"
    assert [command["x"] for command in tab.commands() if command["do"] == "click"][:2] == [160.0, 150.0]
    assert tab.page.locator(".toast").count() == 1  # of the saved log; nothing was refused


def test_objects_have_names_and_colours_and_text_stays_text(tabs, folder):
    tab = tabs()
    tab.open("ball.png")
    tab.click(160, 110)
    tab.settle(revision=1)
    tab.page.locator("#new").click()
    tab.settle(revision=2)
    name = tab.page.locator("#objects li.active input[type=text]")
    name.fill("<img src=x onerror=alert(1)>")
    name.press("Enter")
    tab.settle(revision=3)
    tab.click(30, 30)
    tab.settle(revision=4)
    colour = tab.page.locator("#objects li.active input[type=color]")
    colour.fill("#ff00aa")
    tab.settle(revision=5)
    assert tab.page.locator("#objects li").count() == 2
    assert name.input_value() == "<img src=x onerror=alert(1)>"
    assert tab.page.locator("#objects img").count() == 0
    coco = json.loads(tab.saved("#save-coco"))
    assert len(coco["annotations"]) == 2
    assert "<img src=x onerror=alert(1)>" in json.dumps(coco)
    first, second = api(folder / "ball.png"), api(folder / "ball.png")
    first.click(160, 110)
    second.click(30, 30)
    assert np.array_equal(tab.saved_mask() > 127, second.mask)
    tab.press("q")
    assert np.array_equal(tab.saved_mask() > 127, first.mask)
    tab.press("w")
    tab.page.locator("#objects li.active button[aria-label^=Remove]").click()
    tab.settle(revision=6)
    assert tab.page.locator("#objects li").count() == 1


@pytest.mark.slow
def test_the_work_on_a_picture_is_there_again_after_another_picture_and_after_a_reload(tabs):
    tab = tabs()
    tab.open("ball.png")
    tab.click(160, 110)
    tab.settle(revision=1)
    mask = tab.saved_mask()
    tab.press("PageDown")
    tab.page.wait_for_function("() => document.title.startsWith('large')")
    tab.settle(revision=0)
    tab.press("PageUp")
    tab.page.wait_for_function("() => document.title.startsWith('ball')")
    tab.settle(revision=1)
    tab.page.reload()
    tab.settle(revision=1)
    assert np.array_equal(tab.saved_mask(), mask)
    tab.page.evaluate("() => Object.keys(sessionStorage).map((key) => sessionStorage.setItem(key, 'A'.repeat(22)))")
    tab.page.reload()  # and the page begins anew where the server does not know the work
    tab.page.locator(".toast", has_text="starting anew").wait_for()
    tab.settle(revision=0)
    tab.click(160, 110)
    tab.settle(revision=1)


@pytest.mark.slow
def test_two_tabs_do_not_see_each_other(tabs):
    one, two = tabs(), tabs()
    one.open("ball.png")
    two.open("ball.png")
    one.click(160, 110)
    one.settle(revision=1)
    assert two.revision() == 0
    assert one.data()["desk"] != two.data()["desk"]


def test_pictures_and_masks_come_from_files(tabs, folder, tmp_path):
    tab = tabs()
    pixels = photograph(90, 120, seed=4)
    Image.fromarray(pixels).save(tmp_path / "mine.png")
    (tmp_path / "not.png").write_bytes(b"<svg onload=alert(1)>")
    tab.page.set_input_files("#files", [tmp_path / "not.png", tmp_path / "mine.png"])
    tab.page.wait_for_function("() => document.title.startsWith('mine.png')")
    tab.settle()
    assert tab.page.locator(".toast").inner_text().startswith("not.png: ")
    given = np.zeros((90, 120), dtype=np.uint8)
    given[20:70, 30:80] = 255
    Image.fromarray(given).save(tmp_path / "mask.png")
    tab.page.set_input_files("#mask-file", tmp_path / "mask.png")
    tab.settle(revision=1)
    assert np.array_equal(tab.saved_mask(), given)
    tab.click(60, 45)
    tab.settle(revision=2)
    session = api(tmp_path / "mine.png")
    session.refine(given > 0)
    session.click(60, 45)
    assert np.array_equal(tab.saved_mask() > 127, session.mask)
    Image.fromarray(given[:40]).save(tmp_path / "short.png")
    tab.page.set_input_files("#mask-file", tmp_path / "short.png")
    tab.page.locator(".toast", has_text="short.png: ").wait_for()
    assert tab.revision() == 2
    tab.complaints = [text for text in tab.complaints if "415" not in text and "400" not in text]  # told by the browser


@pytest.mark.slow
def test_a_dropped_picture_opens(tabs):
    tab = tabs()
    tab.page.evaluate(
        """async () => {
            const canvas = new OffscreenCanvas(64, 48);
            canvas.getContext("2d").fillRect(0, 0, 30, 30);
            const data = new DataTransfer();
            data.items.add(new File([await canvas.convertToBlob()], "dropped.png", {type: "image/png"}));
            for (const type of ["dragenter", "dragover", "drop"])
                document.body.dispatchEvent(new DragEvent(type, {dataTransfer: data, bubbles: true, cancelable: true}));
        }"""
    )
    tab.page.wait_for_function("() => document.title.startsWith('dropped.png')")
    tab.settle()
    assert tab.page.locator("#drop").is_hidden()


def test_everything_is_done_with_keys(tabs, folder):
    tab, session = tabs(), api(folder / "ball.png")
    tab.open("ball.png")
    tab.page.locator("#stage").focus()
    tab.press("ArrowLeft")  # the panel covers a part, so the cross is not on the picture's middle
    tab.settle()
    stage, data = tab.page.locator("#stage").bounding_box(), tab.data()
    x = int((stage["width"] / 2 - float(data["x"])) / float(data["scale"]))
    y = int((stage["height"] / 2 - float(data["y"])) / float(data["scale"]))
    tab.press("Enter")
    tab.settle(revision=1)
    session.click(x, y)
    assert np.array_equal(tab.saved_mask() > 127, session.mask)
    tab.page.locator("#stage").focus()
    tab.press("Shift+Enter")
    tab.settle(revision=2)
    assert tab.figures()[1] == "1 on, 1 beside"
    tab.press("z")
    tab.settle(revision=3)
    tab.press("c")
    tab.settle(revision=4)
    assert tab.figures() == [""]
    scale = float(tab.data()["scale"])
    tab.press("+")
    tab.settle()
    assert float(tab.data()["scale"]) == pytest.approx(1.5 * scale)
    tab.press("0")
    tab.settle()
    tab.press("?")
    assert tab.page.locator("dialog").is_visible()
    tab.press("Escape")
    tab.press("t")
    assert tab.page.evaluate("() => document.documentElement.dataset.theme") == "dark"
    tab.press("]")
    assert tab.page.locator("#opacity-value").inner_text() == "55%"
    tab.press(".")
    assert "brightness(1.2)" in tab.page.locator("#under").get_attribute("style")


def test_a_phone_taps_pinches_and_presses_long(tabs):
    tab = tabs(viewport={"width": 390, "height": 800}, has_touch=True, is_mobile=True, device_scale_factor=2)
    tab.open("ball.png")
    tab.page.touchscreen.tap(*tab.at(160, 110))
    tab.settle(revision=1)
    touch = tab.context.new_cdp_session(tab.page)

    def send(kind, *points):
        points = [{"x": x, "y": y, "id": i} for i, (x, y) in enumerate(points)]
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    x, y = tab.at(100, 30)
    send("touchStart", (x, y))
    time.sleep(0.6)
    send("touchEnd")
    tab.settle(revision=2)
    tab.page.locator("#fold").tap()
    assert tab.commands()[1] == {"do": "click", "object": 1, "x": 100.0, "y": 30.0, "positive": False}
    tab.page.locator("#fold").tap()
    tab.settle()
    scale, middle = float(tab.data()["scale"]), tab.at(160, 120)
    send("touchStart", (middle[0] - 40, middle[1]), (middle[0] + 40, middle[1]))
    for wide in (50, 65, 80):
        send("touchMove", (middle[0] - wide, middle[1]), (middle[0] + wide, middle[1]))
    send("touchEnd")
    tab.settle()
    assert float(tab.data()["scale"]) == pytest.approx(2 * scale, rel=0.01)
    assert tab.at(160, 120) == pytest.approx(middle, abs=1.5)
    assert tab.revision() == 2  # a pinch is no click
    bar = tab.page.evaluate("() => document.documentElement.scrollWidth")
    assert bar <= 390


def test_zoom_and_pan_are_smooth(tabs):
    tab = tabs(reduced_motion="no-preference")
    tab.open("large.jpg")
    tab.click(1500, 1000)
    tab.settle(revision=1)

    def speed(act):
        return 1000 / np.mean(frames(tab.page, act))

    into, out = (partial(zoom, tab.page, 1500, 1000, by) for by in (-120, 120))
    for act in (into, partial(pan, tab.page), out):
        assert speed(act) >= 30 or speed(act) >= 30  # once more where others use the processor
    tab.settle()


def test_the_server_hears_once_that_the_picture_is_on_the_screen(tabs):
    tab, sent = tabs(), []
    tab.page.on("websocket", lambda socket: socket.on("framesent", lambda text: sent.append(text)))
    tab.open("other.png")
    tab.click(70, 100)
    tab.settle(revision=1)
    assert [text == messages.SHOWN for text in sent] == [True, False]


def test_a_refine_tells_how_far_it_is_and_can_be_stopped(tabs):
    tab, other = tabs(), tabs()
    tab.open("middle.png")
    tab.click(400, 300)
    tab.settle(revision=1)
    mask, status = tab.saved_mask(), tab.page.locator("#status")
    for stop in (lambda: tab.press("Escape"), lambda: tab.page.locator("#stop").click(), lambda: tab.click(380, 310)):
        tab.page.locator("#stage").focus()
        tab.press("r")
        status.get_by_text(re.compile(r"Refining, \d+ of \d+")).wait_for()
        assert tab.page.locator("#refine").is_disabled()
        revision = tab.revision()
        stop()
        tab.settle()
        assert status.is_hidden()
        if tab.revision() == revision:
            assert np.array_equal(tab.saved_mask(), mask)
    assert tab.revision() == 2
    assert [command["do"] for command in tab.commands()] == ["click", "click"]  # of refines nothing is left
    other.open("ball.png")
    tab.press("r")
    status.get_by_text(re.compile(r"Refining, \d+ of \d+")).wait_for()
    other.click(160, 110)
    other.settle(revision=1)  # before all regions are done
    assert status.is_visible()
    tab.settle(revision=3)
    assert not np.array_equal(tab.saved_mask(), mask)


def test_it_goes_on_after_the_server_was_killed(tabs, demo, folder):
    tab, session = tabs(), api(folder / "ball.png")
    tab.open("ball.png")
    tab.click(160, 110)
    tab.settle(revision=1)
    demo.signal(signal.SIGSTOP)
    tab.click(150, 120)  # is sent, and nobody reads it
    demo.signal(signal.SIGKILL)
    tab.page.locator("#status", has_text="Not connected").wait_for()
    tab.click(20, 30, button="right")
    assert tab.figures()[1] == "2 on, 1 beside"
    demo.start()
    tab.settle(revision=3)
    session.click(160, 110)
    session.click(150, 120)
    session.click(20, 30, positive=False)
    assert tab.figures()[1] == "2 on, 1 beside"
    assert np.array_equal(tab.saved_mask() > 127, session.mask)
    tab.complaints = [
        text for text in tab.complaints if "ERR_CONNECTION_REFUSED" not in text and "WebSocket" not in text
    ]


def paeth(left, up, corner):
    return min((left, up, corner), key=lambda value: abs(left + up - corner - value))


def test_masks_are_read_whatever_filters_their_png_has(tabs):
    width, height, noise = 37, 25, np.random.default_rng(5)
    rows = np.packbits(noise.random((height, width)) < 0.5, axis=1).astype(int)
    lines = bytearray()
    for y, row in enumerate(rows):
        above = rows[y - 1] if y else 0 * row
        left, corner = np.r_[0, row[:-1]], np.r_[0, above[:-1]]
        guess = (0, left, above, (left + above) // 2, [paeth(*three) for three in zip(left, above, corner)])[y % 5]
        lines += bytes([y % 5, *((row - guess) % 256)])
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(lines)),
        (b"IEND", b""),
    )
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    read = tabs().page.evaluate(
        """async (bytes) => {
            const {readMask} = await import("/static/png.js");
            const {width, height, stride, bits} = await readMask(new Uint8Array(bytes).buffer);
            return [width, height, stride, ...bits];
        }""",
        list(png),
    )
    assert read == [width, height, 5, *rows.ravel().tolist()]


def test_the_page_reads_the_outline_that_the_server_writes(tabs):
    noise, page = np.random.default_rng(6), tabs().page
    read = """async ([bytes, width, height]) => {
        const {readOutline} = await import("/static/outline.js");
        const read = await readOutline(new Uint8Array(bytes).buffer, {width, height});
        return [read.width, read.height, read.stride, ...read.bits];
    }"""
    for height, width, share in ((25, 37, 0.5), (300, 9, 0.02), (70, 64, 0.97), (1, 1, 1)):
        mask = Mask.of(noise.random((height, width)) < share)
        x0, y0, x1, y1 = mask.bbox
        code = outline.encode(outline.runs_of(mask, mask.bbox))
        bits = np.packbits(mask.window(*mask.bbox), axis=1)
        found = page.evaluate(read, [list(code), x1 - x0, y1 - y0])
        assert found == [x1 - x0, y1 - y0, bits.shape[1], *bits.ravel().tolist()]
    with pytest.raises(playwright.Error, match="the mask that came is cut off"):
        page.evaluate(read, [list(zlib.compress(b"\x00")), 1, 1])


def test_old_news_changes_nothing_and_what_may_be_lost_is_told(tabs):
    found = tabs().page.evaluate(
        """async () => {
            const {Desk} = await import("/static/desk.js");
            const thing = (name) => ({id: 1, name, bbox: null, version: 0});
            const desk = new Desk({id: "none"});
            const lost = [];
            desk.addEventListener("lost", ({detail}) => lost.push(detail.count));
            desk.begin({revision: 0, objects: [thing("first")]});
            desk.learn({revision: 5, object: thing("new")});
            desk.learn({revision: 4, object: thing("old")});
            const name = desk.objects.get(1).name;
            const command = {do: "undo", object: 1};
            const left = [];
            for (const revision of [5, 6, 7]) { // of two commands on their way none, one, both were done
                desk.revision = 5;
                desk.live = {send: () => false};
                desk.waiting = [1, 1, 0].map((sent, seq) => ({seq, sent, command}));
                desk.begin({revision, objects: [thing("new")]});
                left.push(desk.waiting.length);
            }
            return {name, left, lost};
        }"""
    )
    assert found == {"name": "new", "left": [3, 1, 1], "lost": [1]}


def test_lines_are_the_pieces_joined(tabs):
    """Every unit of a piece is in one line, once; with room to spare no corner is further off, and little is left."""
    rng = np.random.default_rng(0)
    noise = rng.random((18, 25)) < 0.5
    y, x = np.mgrid[:18, :25]
    round_one = (y - 9) ** 2 + (x - 12) ** 2 < 60
    for mask, most in ((noise, 1.0), (round_one, 0.75), (np.zeros((18, 25), bool), 1.0)):
        rim = np.pad(mask, 1)
        across = [(x, y, x + 1, y) for y in range(19) for x in range(25) if rim[y, x + 1] != rim[y + 1, x + 1]]
        down = [(x, y, x, y + 1) for x in range(26) for y in range(18) if rim[y + 1, x] != rim[y + 1, x + 1]]
        pieces = np.array(across + down, float).reshape(-1, 4)
        exact, loose = tabs().page.evaluate(
            """async (pieces) => {
                const { joined } = await import("/static/lines.js");
                return [0, 0.8].map((loose) => {
                    const { points, ends } = joined(Float32Array.from(pieces), 25, 18, loose);
                    return { points: Array.from(points), ends: Array.from(ends) };
                });
            }""",
            pieces.ravel().tolist(),
        )
        units = []
        for line in lines_of(exact):
            for (x0, y0), (x1, y1) in pairwise(line):
                assert x0 == x1 or y0 == y1
                low, count = (min(x0, x1), min(y0, y1)), int(abs(x1 - x0) + abs(y1 - y0))
                units += [(low[0] + (x0 != x1) * i, low[1] + (y0 != y1) * i, x0 != x1) for i in range(count)]
        assert sorted(units) == sorted((x0, y0, x0 != x1) for x0, y0, x1, _ in pieces)
        assert all(line[0] == line[-1] for line in lines_of(exact))  # an outline has no ends
        assert len(loose["points"]) <= most * len(exact["points"])
        segments = [(np.array(a), np.array(b)) for line in lines_of(loose) for a, b in pairwise(line)]
        for corner in np.unique(pieces.reshape(-1, 2), axis=0):
            assert min(distance(corner, *segment) for segment in segments) <= 0.8 + 1e-6


def lines_of(found):
    points, starts = np.reshape(found["points"], (-1, 2)), [0, *found["ends"]]
    return [[tuple(p) for p in points[a:b].tolist()] for a, b in pairwise(starts)]


def distance(point, a, b):
    along = np.clip((point - a) @ (b - a) / max((b - a) @ (b - a), 1e-9), 0, 1)
    return np.linalg.norm(point - a - along * (b - a))


@pytest.mark.slow
def test_a_click_on_a_large_picture_is_on_the_screen_soon(browser, tmp_path):
    (tmp_path / "pictures").mkdir()
    large = Image.fromarray(photograph(512, 512)).resize((4096, 4096))
    large.save(tmp_path / "pictures" / "large.jpg", quality=90)
    opened, demos = [], [Demo(tmp_path / "pictures", tmp_path / f"state{i}", side=1024) for i in range(3)]
    try:
        for demo in demos:
            demo.start()
            tab = Tab(browser, demo, drawn_only=True)
            opened.append(
                tab.page.evaluate("() => performance.now()")
            )  # from the address to a picture that can be moved
            tab.settle()
        assert np.median(opened) < 1500
        took = []
        for revision in range(1, 12):
            tab.click(1700 + 60 * revision, 1800 + 40 * revision)
            tab.settle(revision=revision)
            tab.page.locator('#times [data-name="on screen"]').wait_for()
            took.append(float(tab.page.locator("#times").get_attribute("data-total")))
        assert np.median(took) <= 300
        assert tab.complaints == []
    finally:
        for demo in demos:
            if demo.process is not None:
                demo.signal(signal.SIGKILL)


@pytest.mark.slow
def test_a_real_photograph(browser, tmp_path):
    """``HRSAM_EVAL``: a folder of photographs; the first is opened at the model's full side.  ``HRSAM_SHOTS``: a folder for
    pictures of what was seen."""
    root = os.environ.get("HRSAM_EVAL")
    if not root:
        pytest.skip("set HRSAM_EVAL to a folder of photographs")
    demo = Demo(Path(root), tmp_path, side=1024)
    demo.start()
    try:
        tab = Tab(browser, demo)
        name = tab.page.evaluate("() => document.title").removesuffix(" – hrsam")
        session = api(Path(root) / name, side=1024)
        height, width = session.mask.shape
        revision = 0

        def done():
            nonlocal revision
            revision += 1
            tab.settle(revision=revision)
            return tab.commands()[-1]

        def click(u, v, positive=True):
            x, y = int(u * width), int(v * height)
            tab.click(x, y, button="left" if positive else "right")
            made = done()
            assert abs(made["x"] - x) <= 1 / float(tab.data()["scale"])
            assert made["positive"] == positive
            session.click(made["x"], made["y"], positive)

        click(0.5, 0.5)
        click(0.1, 0.1, positive=False)
        click(0.55, 0.4)
        shot(tab, "whole")
        tab.page.locator("#undo").click()
        assert done()["do"] == "undo"
        session.undo()
        tab.page.locator("#redo").click()
        assert done()["do"] == "redo"
        session.redo()
        tab.page.locator("[data-tool=box]").click()
        tab.drag((int(0.2 * width), int(0.1 * height)), (int(0.8 * width), int(0.95 * height)))
        box = done()
        assert box["do"] == "box"
        session.box(*(box[side] for side in ("x0", "y0", "x1", "y1")))
        tab.page.locator("[data-tool=add]").click()
        tab.page.mouse.move(*tab.at(0.5 * width, 0.45 * height))
        for _ in range(6):
            tab.page.mouse.wheel(0, -120)
        tab.settle()
        assert float(tab.data()["scale"]) > 1
        click(0.5, 0.46)
        shot(tab, "zoomed")
        assert np.array_equal(tab.saved_mask() > 127, session.mask)
        assert tab.complaints == []
        for kind, how in (("phone", {"viewport": {"width": 390, "height": 844}}), ("dark", {"color_scheme": "dark"})):
            shot(Tab(browser, demo, **how), kind)
    finally:
        demo.signal(signal.SIGKILL)


def shot(tab, name):
    if folder := os.environ.get("HRSAM_SHOTS"):
        tab.page.screenshot(path=Path(folder) / f"{name}.png")


def test_every_control_has_a_name_and_the_page_a_language(tabs):
    tab = tabs()
    nameless = tab.page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, [role=application]")]
            .filter((one) => one.checkVisibility())
            .filter((one) => !(one.ariaLabel || one.textContent.trim() || one.labels?.length))
            .map((one) => one.outerHTML)"""
    )
    assert nameless == []
    assert tab.page.evaluate("() => document.documentElement.lang") == "en"
    assert tab.page.locator("[aria-live=polite]").count() == 2
