"""``hrsam bench page``: the page's figures, with a real browser."""

import shutil

import pytest

from hrsam import clicklog
from hrsam.bench import command
from hrsam.bench import page as bench_page
from hrsam.bench.gate import BenchError
from hrsam.cutting import Cutting

pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e '.[dev]'")
pytest.importorskip("fastapi", reason="needs the extra demo: pip install -e '.[demo]'")
CHROMIUM = next(filter(None, map(shutil.which, bench_page.BROWSERS)), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium")
pytestmark = pytest.mark.usefixtures("one_thread")


@needs_browser
def test_the_pages_figures():
    report = command.run("page", device="cpu", quick=True)
    names = {row["name"] for row in report["rows"]}
    assert {bench_page.OPENED, bench_page.ENCODED, bench_page.CLICKED} < names
    assert len(names) == 6
    for row in report["rows"]:
        low, high = row["quantiles_20_80"]
        assert 0 < low <= row["median_ms"] <= high
    ((answer,), (speeds,)) = (list(report[name].values()) for name in ("answers", "frames_per_second"))
    assert 0 < answer["median"] <= answer["largest"] <= 50_000
    assert all(1 < speed < 200 for speed in speeds.values())
    assert len(report["errors"]) == 1


@needs_browser
def test_a_mask_that_is_another_has_no_speed(monkeypatch):
    monkeypatch.setattr(clicklog, "replay", lambda log, model, pyramid: Cutting(model, pyramid, log.side))
    with pytest.raises(BenchError, match="the page saves another mask"):
        command.run("page", device="cpu", quick=True)


@pytest.mark.parametrize(
    ("missing", "sentence"), [("playwright", "needs Playwright; run: pip install"), ("chromium", "needs a browser")]
)
def test_what_the_figures_need_is_told(monkeypatch, missing, sentence):
    if missing == "playwright":
        monkeypatch.setattr(bench_page, "find_spec", lambda name: None if name == "playwright" else name)
    else:
        monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=sentence):
        command.run("page", device="cpu", quick=True)
