"""The click page's files: nothing from elsewhere, nothing inline, text that can be read."""

import re
from pathlib import Path

import pytest

import hrsam

STATIC = Path(hrsam.__file__).parent / "demo" / "static"


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize(
    ("text", "ground"),
    [("ink", "card"), ("ink", "sunk"), ("soft", "card"), ("soft", "sunk"), ("accent", "card"), ("accent", "tinted"),
     ("on-accent", "accent"), ("warn-ink", "warn")],
)  # fmt: skip
def test_text_stands_out_from_its_ground(theme, text, ground):
    style = (STATIC / "page.css").read_text("utf-8")
    found = {name: pair for name, *pair in re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", style)}
    bright, dim = sorted((luminance(found[name][theme]) for name in (text, ground)), reverse=True)
    assert (bright + 0.05) / (dim + 0.05) >= 4.5


def test_the_page_asks_nothing_of_other_machines_and_has_no_inline_script_or_style():
    for path in STATIC.iterdir():
        text = path.read_text("utf-8")
        assert re.findall(r"https?://(?!www\.w3\.org/2000/svg)[^\s'\"]*", text) == [], path.name
        assert len(text.splitlines()) <= 400, path.name
    page = (STATIC / "page.html").read_text("utf-8")
    assert re.findall(r"<script(?![^>]*\ssrc=)|<style|\sstyle=|\son\w+=", page) == []
