"""The page of a training: what it says, with evaluations and without, and that nothing in it runs."""

import json
import re

import pytest
import torch

from hrsam import train as training
from hrsam.checkpoint import load_state
from hrsam.cli import main
from hrsam.data.bank import PhotoBank
from hrsam.data.stream import Source
from hrsam.models.presets import PRESETS
from hrsam.optim import Phase
from hrsam.runreport import curve, has_arrived, page, write_run_report
from tests.builders import small_config
from tests.tiny_training import settings, write_photos


@pytest.fixture(scope="module", autouse=True)
def _small_preset():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "test", small_config)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos") / "part1")


@pytest.fixture
def run(tmp_path, folder):
    run = settings(tmp_path / "a <run>", steps=3, batch=1, data=(str(folder),))
    training.train(run, bank=PhotoBank.load([folder], long_side=64))
    return tmp_path / "a <run>"


@pytest.mark.usefixtures("quick_processes")
def test_the_page_says_what_the_log_and_the_evaluation_say(run, folder, tmp_path):
    assert write_run_report(run) == run / "report.html"
    text = (run / "report.html").read_text("utf-8")
    assert "NoC@90" not in text
    assert "a &lt;run&gt;" in text
    assert "<run>" not in text
    assert "<script" not in text
    assert "from random weights, trained with simulated clicks, average weights of step 3 (3 at 64 px)" in text
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert f"loss {log[0]['loss']:.4g} to {log[-1]['loss']:.4g}" in text
    assert f"first {log[0]['iou_first']:.4g} to {log[-1]['iou_first']:.4g}" in text
    assert text.count("<svg") == 5
    assert 'src="data:image/png;base64,' in text  # what the last step looked like
    assert "save_every: 1" in text

    write_run_report(run, [Source(name="pairs", root=str(folder))], side=64, limit=2)
    (found,) = run.glob("noc/*/*/report.json")
    part = json.loads(found.read_text())["summary"]["all"]
    row = [
        "2",
        *(f"{part['iou'][k]:.3f}" for k in (0, 4, 19)),
        *(f"{part['noc'][q]:.2f}" for q in ("80", "85", "90", "95")),
    ]
    cells = "".join(f"<td>{cell}</td>" for cell in row)
    assert cells in (run / "report.html").read_text("utf-8")
    write_run_report(run)  # once more: what was measured stays on the page
    assert cells in (run / "report.html").read_text("utf-8")


def test_clicks_are_measured_when_a_run_has_arrived(run, folder):
    same = settings(run, steps=3, data=(str(folder),))
    assert has_arrived(same)
    assert not has_arrived(same.model_copy(update={"phases": (Phase(side=64, batch=1, steps=4, lr=1e-3),)}))
    assert has_arrived(same.model_copy(update={"budget": 0.01}))
    assert not has_arrived(same.model_copy(update={"budget": 1e6}))
    assert not has_arrived(same.model_copy(update={"out": str(run / "checkpoints")}))


def test_a_run_that_was_stopped_early_has_a_page(run):
    (path,) = sorted(run.glob("checkpoints/*"))[-1:]
    text = page(load_state(path), [], [], None)
    assert "The run is too short for curves." in text
    assert "<img" not in text


def test_curves_break_where_the_log_is_silent():
    lines = [{"step": s, "loss": v} for s, v in ((1, 4.0), (2, float("nan")), (3, 1.0), (4, 2.0))]
    text = curve("Loss", {"loss": "loss"}, lines)
    assert text.count("polyline") == 1
    assert text.count("circle") == 1
    assert "nan" not in re.sub(r"<figcaption>.*?</figcaption>", "", text)
    flat = curve("Loss", {"loss": "loss"}, [{"step": s, "loss": 0.0} for s in (1, 2)])
    assert "polyline" in flat


def test_the_command(run, capsys, monkeypatch):
    def command(*arguments):
        monkeypatch.setattr("sys.argv", ["hrsam", "report", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capsys.readouterr()
        return caught.value.code or 0, out.strip(), err.strip()

    assert command(run) == (0, str(run / "report.html"), "")
    code, _, err = command(run, "--dataset", "pairs")
    assert (code, err) == (2, "hrsam: got 1 --dataset and 0 --root; give one of each for every data set")
    code, _, err = command(run.parent)
    assert code == 2
    assert "holds no checkpoint; give the folder that was a training's out" in err
