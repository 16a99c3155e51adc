"""The click page as a test sees it: ``hrsam demo`` in a process, a browser's tab, pictures to cut, the library beside it."""

import functools
import io
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

import hrsam
from hrsam.bench.page import WINDOW, place, said, settle
from hrsam.clicklog import read_log

SIDE = 256
DESKTOP = {"viewport": WINDOW, "reduced_motion": "reduce"}


class Demo:
    """``hrsam demo`` on a folder, in a process of its own that can be killed and started again."""

    def __init__(self, folder, state, side=SIDE):
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port = found.getsockname()[1]
        self.command = [sys.executable, "-m", "hrsam", "demo", str(folder), "--state", str(state), "--side", str(side),
                        "--port", str(self.port), "--device", "cpu", "--no-browser"]  # fmt: skip
        self.process = None

    def launch(self):
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(self.command, env=env, stdout=subprocess.PIPE, text=True)

    def wait(self):
        for line in self.process.stdout:
            if match := re.search(r"http://\S+token=\S+", line):
                self.url = match[0]
                return
        raise AssertionError("the server did not start")

    def start(self):
        self.launch()
        self.wait()

    def signal(self, number):
        self.process.send_signal(number)
        if number == signal.SIGKILL:
            self.process.wait()
            self.process.stdout.close()


class Tab:
    """One browser of its own on the page."""

    def __init__(self, browser, demo, drawn_only=False, **how):
        self.context = browser.new_context(**{**DESKTOP, **how})
        self.page = self.context.new_page()
        self.complaints = []
        self.page.on("console", lambda message: message.type in ("error", "warning") and self.complain(message.text))
        self.page.on("pageerror", lambda error: self.complain(str(error)))
        self.page.goto(demo.url)
        if drawn_only:
            self.page.wait_for_selector('#stage[data-drawn="true"]')
        else:
            self.settle()

    def complain(self, text):
        self.complaints.append(text)

    def settle(self, **wanted):
        settle(self.page, **wanted)

    def open(self, name):
        option = self.page.locator("#pictures option", has_text=name).get_attribute("value")
        self.page.select_option("#pictures", option)
        self.page.wait_for_function("(name) => document.title.startsWith(name)", arg=name)
        self.settle()

    def data(self):
        return said(self.page)

    def at(self, x, y):
        return place(self.page, x, y)

    def click(self, x, y, **how):
        shift = how.pop("shift", False)
        if shift:
            self.page.keyboard.down("Shift")
        self.page.mouse.click(*self.at(x, y), **how)
        if shift:
            self.page.keyboard.up("Shift")

    def drag(self, start, end):
        self.page.mouse.move(*self.at(*start))
        self.page.mouse.down()
        self.page.mouse.move(*self.at(*end), steps=4)
        self.page.mouse.up()

    def press(self, keys):
        self.page.keyboard.press(keys)

    def revision(self):
        return int(self.data()["revision"])

    def figures(self):
        return self.page.locator("#figures").inner_text().split("\n")

    def saved(self, button):
        with self.page.expect_download() as download:
            self.page.locator(button).click()
        return Path(download.value.path()).read_bytes()

    def saved_mask(self):
        image = Image.open(io.BytesIO(self.saved("#save-mask")))
        return np.array(image.convert("L"))

    def commands(self):
        return read_log(self.saved("#save-log")).commands

    def covered(self, left, right, height):
        """(height, right − left) bool: where something lies above the picture's pixels, shown pixel for pixel."""
        digits = self.page.evaluate(
            """([left, width, height]) => {
                const {x, y} = document.getElementById("stage").dataset;
                const context = document.getElementById("over").getContext("2d");
                const {data} = context.getImageData(Math.round(x) + left, Math.round(y), width, height);
                let digits = "";
                for (let i = 3; i < data.length; i += 4) digits += data[i] > 127 ? "1" : "0";
                return digits;
            }""",
            [left, right - left, height],
        )
        return np.frombuffer(digits.encode(), np.uint8).reshape(height, right - left) == ord("1")

    def assert_cut_out(self, mask, clicks):
        """The cut-out on the screen is ``mask``; around ``clicks`` are marks."""
        self.page.locator("[data-mode=cutout]").click()
        self.press("1")
        self.settle()
        assert float(self.data()["scale"]) == 1
        height, width = mask.shape
        left, right = max(0, width // 2 - 400), min(width, width // 2 + 400)
        y, x = np.mgrid[:height, left:right]
        free = np.all([np.hypot(x - u, y - v) > 10 for u, v in clicks], axis=0)
        assert (self.covered(left, right, height) == ~mask[:, left:right])[free].all()
        assert 0 < mask[:, left:right].mean() < 1


def photograph(height, width, seed=0):
    """(height, width, 3) uint8: a bright, lit ball on a dark, uneven ground, with the grain of a camera."""
    noise = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    radius = 0.3 * min(height, width)
    far = np.hypot(x - 0.5 * width, y - 0.5 * height) / radius
    light = np.clip(1.2 - 0.5 * np.hypot(x - 0.42 * width, y - 0.4 * height) / radius, 0.3, 1.2)
    ground = 60 + 25 * np.sin(x / 37) * np.cos(y / 23)
    ball = light[..., None] * np.array([225, 120, 40])
    pixels = np.where((far < 1)[..., None], ball, ground[..., None] * np.array([0.8, 1.0, 0.9]))
    return np.clip(pixels + noise.normal(0, 5, pixels.shape), 0, 255).astype(np.uint8)


@functools.cache
def starter():
    return hrsam.load("hrsam_pp_t.starter")


def api(path, side=SIDE):
    session = hrsam.Session(starter(), side)
    session.set_image(hrsam.read_image(path).pixels)
    return session
