"""A whole evaluation: files, processes, going on after a stop, bad data, replay, comparison."""

import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save_file

from hrsam import evaluate as run
from hrsam.cli import main
from hrsam.data.datasets import open_dataset
from hrsam.evaluate import Evaluation, choices, choose_protocol, compare_files, evaluate
from hrsam.evaluation import Protocol
from hrsam.playing import play_all
from hrsam.report import read_report
from hrsam.segmenters import ModelSegmenter
from hrsam.traces import read_traces, traces_hash
from hrsam.weightfile import WeightsError, save
from tests.builders import photo, small_model
from tests.processes import assert_gone, begun, exit_code

CLICKS = 3


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save(small_model(), path, metadata={"licence": "none", "source": "test"})
    return path


def make_pairs(root, count):
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for i in range(count):
        height, width = 40 + 3 * i % 20, 60 + 7 * i % 30
        mask = np.zeros((height, width), np.uint8)
        mask[5 + i % 7 : 30, 10 + 2 * i % 15 : 45] = 255
        Image.fromarray(photo(height, width, seed=i)).save(root / "images" / f"{i:02}.png")
        Image.fromarray(mask).save(root / "masks" / f"{i:02}.png")
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_pairs(tmp_path_factory.mktemp("data") / "set", 5)


@pytest.fixture
def what(weights, root, tmp_path):
    return Evaluation(
        "pairs", str(root), str(tmp_path / "out"), model=str(weights), side=64, protocol=Protocol(clicks=CLICKS),
        processes=1, command="hrsam evaluate",
    )  # fmt: skip


def test_files_and_numbers(what, tmp_path):
    report = evaluate(what)
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {"parts", "report.html", "report.json", "report.md", "traces.jsonl"}
    assert read_report(out / "report.json")["summary"]["all"]["noc"] == report["summary"]["all"]["noc"]
    head, traces = read_traces(out / "traces.jsonl")
    assert head["method"]["weights_sha256"] == report["method"]["weights_sha256"]
    assert traces_hash(traces) == report["trace_sha256"]
    assert [trace.name for trace in traces] == [item.name for item in open_dataset("pairs", what.root).items]
    assert report["summary"]["all"]["iou"][0] == pytest.approx(np.mean([trace.ious[0] for trace in traces]))
    assert "00" in (out / "report.html").read_text()
    assert report["seconds"]["click"] > 0


def test_many_processes_and_any_order_give_the_same_traces(what, tmp_path):
    """F15 in small; the slow test below is the large one."""
    one = evaluate(what)["trace_sha256"]
    two = evaluate(replace(what, out=str(tmp_path / "two"), processes=2))["trace_sha256"]
    assert one == two
    dataset = open_dataset(what.dataset, what.root)
    backwards = replace(dataset, items=dataset.items[::-1])
    traces = play_all(backwards, what.segmenter, what.protocol, {}, tmp_path / "backwards")
    assert traces_hash(traces) == one


@pytest.mark.slow
def test_sixty_pictures_one_hash(weights, tmp_path):
    root = make_pairs(tmp_path / "set", 60)
    what = Evaluation("pairs", str(root), "", model=str(weights), side=64, protocol=choose_protocol("hrsam", clicks=5))
    hashes = {
        evaluate(replace(what, out=str(tmp_path / f"{processes}-{repeat}"), processes=processes))["trace_sha256"]
        for processes, repeat in [(1, 0), (2, 0), (4, 0), (1, 1), (2, 1), (4, 1), (2, 2)]
    }
    dataset = open_dataset("pairs", root)
    shuffled = replace(dataset, items=tuple(np.random.default_rng(0).permutation(np.array(dataset.items, object))))
    traces = play_all(shuffled, what.segmenter, what.protocol, {}, tmp_path / "shuffled", processes=2)
    assert {*hashes, traces_hash(traces)} == {traces_hash(traces)}


def test_a_stopped_run_goes_on_without_playing_again(what, tmp_path, monkeypatch):
    whole = evaluate(what)
    part = tmp_path / "out" / "parts" / "0.jsonl"
    lines = part.read_bytes().splitlines(keepends=True)
    part.write_bytes(b"".join(lines[:3]) + lines[3][:50])  # killed while writing the third sample
    played = []
    real = run.play_all

    def counted(dataset, make, *args, **kwargs):
        segmenter = make()
        start = segmenter.start
        segmenter.start = lambda pixels: (played.append(1), start(pixels))
        return real(dataset, lambda: segmenter, *args, **kwargs)

    monkeypatch.setattr(run, "play_all", counted)
    again = evaluate(what)
    assert len(played) == 3
    assert again["trace_sha256"] == whole["trace_sha256"]
    with pytest.raises(ValueError, match="is of another evaluation"):
        evaluate(replace(what, protocol=Protocol(clicks=CLICKS + 1)))


def alike(report, other):
    for sample, expected in zip(report["samples"], other["samples"], strict=True):
        assert sample["name"] == expected["name"]
        assert sample["clicks"] == expected["clicks"]
        assert sample["ious"] == pytest.approx(expected["ious"], abs=1e-4)


@pytest.mark.usefixtures("quick_processes")
def test_batches_give_the_same_numbers_and_are_said_in_the_report(what, tmp_path):
    one = evaluate(replace(what, tie_seeds=1))
    assert one["machine"]["batch"] == 1
    assert not any("in step" in line for line in one["protocol"]["text"])
    four = evaluate(replace(what, out=str(tmp_path / "four"), batch=4, tie_seeds=1))
    alike(four, one)
    assert four["tie_spread"]["iou@5"] == one["tie_spread"]["iou@5"]
    assert read_report(tmp_path / "four" / "report.json")["machine"]["batch"] == 4
    for name in ("report.md", "report.html"):
        assert "Up to 4 samples were played in step" in (tmp_path / "four" / name).read_text()
    traces = str(tmp_path / "four" / "traces.jsonl")
    alike(evaluate(replace(what, out=str(tmp_path / "replay"), batch=2, replay=traces)), one)
    alike(evaluate(replace(what, out=str(tmp_path / "both"), batch=2, processes=2)), one)


def test_a_run_stopped_in_the_middle_of_a_batch_goes_on(what, tmp_path, monkeypatch):
    whole = evaluate(replace(what, out=str(tmp_path / "whole"), batch=2))
    started = []
    real = ModelSegmenter.start_all
    decode = ModelSegmenter.click_all

    def start_all(self, pixels):
        started.append(len(pixels))
        real(self, pixels)

    def click_all(self, clicks):
        if len(started) == 2 and len(clicks[0]) == 2:
            raise KeyboardInterrupt
        return decode(self, clicks)

    monkeypatch.setattr(ModelSegmenter, "start_all", start_all)
    monkeypatch.setattr(ModelSegmenter, "click_all", click_all)
    with pytest.raises(KeyboardInterrupt):
        evaluate(replace(what, batch=2))
    part = tmp_path / "out" / "parts" / "0.jsonl"
    assert [trace.name for trace in read_traces(part)[1]] == [sample["name"] for sample in whole["samples"][:2]]
    assert not (tmp_path / "out" / "report.json").exists()
    with part.open("ab") as file:
        file.write(b'{"name": "set/02", "gro')  # killed while writing
    monkeypatch.setattr(ModelSegmenter, "click_all", decode)
    started.clear()
    alike(evaluate(replace(what, batch=2)), whole)
    assert started == [2, 1]
    started.clear()
    alike(evaluate(replace(what, batch=3)), whole)  # another batch is the same evaluation
    assert started == []


def test_the_usual_batch(what):
    assert (what.at_once, replace(what, device="cuda:1").at_once) == (1, 8)
    assert replace(what, device="cuda", batch=3).at_once == 3
    assert replace(what, device="cuda", method="grabcut").at_once == 1


def test_batches_that_make_no_sense_are_refused(what, monkeypatch, capsys):
    for batch in (0, -1, 5000):
        with pytest.raises(ValueError, match="a batch is 1 to 1024 samples"):
            replace(what, batch=batch)
    assert replace(what, batch=1, method="grabcut").at_once == 1
    command = "hrsam evaluate --dataset pairs --root r --out o --device cpu --method grabcut --batch 4"
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(SystemExit, match="2"):
        main()
    assert capsys.readouterr().err == (
        "hrsam: the method grabcut plays one sample at a time; leave out batch=4, or use processes\n"
    )


def test_bad_data_is_listed_at_once_then_stops_or_is_skipped(what, tmp_path):
    root = make_pairs(tmp_path / "bad", 4)
    Image.new("L", (9, 9), 255).save(root / "masks" / "01.png")
    Image.new("L", Image.open(root / "images" / "02.png").size).save(root / "masks" / "02.png")
    (root / "images" / "03.png").write_bytes(b"no picture")
    said = []
    with pytest.raises(ValueError, match="3 problems"):
        evaluate(replace(what, root=str(root)), say=said.append)
    assert len(said) == 3
    report = evaluate(replace(what, root=str(root), on_error="skip"))
    assert [sample["name"] for sample in report["samples"]] == ["bad/00"]
    assert len(report["data"]["problems"]) == 3


def test_replay_scores_another_model_on_the_same_clicks(what, tmp_path):
    first = evaluate(what)
    other = tmp_path / "other.safetensors"
    save(small_model(seed=1), other, metadata={"licence": "none", "source": "test"})
    traces = str(tmp_path / "out" / "traces.jsonl")
    replayed = evaluate(replace(what, out=str(tmp_path / "replay"), model=str(other), replay=traces))
    clicks = [[sample["clicks"] for sample in report["samples"]] for report in (first, replayed)]
    assert clicks[0] == clicks[1]
    assert replayed["trace_sha256"] != first["trace_sha256"]
    assert replayed["protocol"]["name"].startswith("replay ")
    shorter = make_pairs(tmp_path / "more", 6)
    with pytest.raises(ValueError, match="has no trace of"):
        evaluate(replace(what, root=str(shorter), out=str(tmp_path / "x"), replay=traces))


def make_slowly(told):
    (told / str(os.getpid())).touch()
    time.sleep(3600)


def killed(root, parts, told, seen):
    """Play with two processes, and be killed when they have begun, or are ``seen`` by their files in the folder ``told``."""

    def kill():
        while len(multiprocessing.active_children()) < 2 or (seen and len(list(told.iterdir())) < 2):
            time.sleep(0.01)
        for child in multiprocessing.active_children():
            (told / str(child.pid)).touch()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=kill).start()
    play_all(open_dataset("pairs", root), partial(make_slowly, told), Protocol(), {}, parts, processes=2)


@pytest.mark.parametrize("seen", [False, True])
def test_processes_end_with_the_one_that_is_killed(root, tmp_path, seen):
    told = tmp_path / "told"
    told.mkdir()
    assert exit_code(killed, root, tmp_path / "parts", told, seen, seconds=120) == -signal.SIGKILL
    workers = [path.name for path in told.iterdir()]
    assert len(workers) == 2
    assert_gone(map(int, workers))


@pytest.mark.usefixtures("quick_processes")
def test_a_process_that_dies_is_named(root, tmp_path):
    told = tmp_path / "told"
    told.mkdir()

    def kill():
        while not (found := list(told.iterdir())):
            time.sleep(0.01)
        os.kill(int(found[0].name), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    dataset = open_dataset("pairs", root)
    with pytest.raises(
        ValueError, match=r"process \d+ was killed by SIGKILL while it worked on set/\d+, perhaps for lack of memory"
    ):
        play_all(dataset, partial(make_slowly, told), Protocol(), {}, tmp_path / "parts", processes=2)
    killer.join()
    assert multiprocessing.active_children() == []


def test_a_bad_weight_file_is_refused_before_processes_start(what, weights, tmp_path):
    with safe_open(weights, "np") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in list(file.keys())[1:]}
    save_file(tensors, tmp_path / "lacking.safetensors", metadata)
    with pytest.raises(WeightsError, match=r"lacking\.safetensors"):
        evaluate(replace(what, model=str(tmp_path / "lacking.safetensors"), processes=2))
    assert not (tmp_path / "out").exists()


def test_tie_spread(what):
    report = evaluate(replace(what, tie_seeds=2, limit=2))
    assert report["tie_spread"]["seeds"] == [0, 1]
    assert all(len(values) == 2 for values in report["tie_spread"]["noc"].values())
    with pytest.raises(ValueError, match="a replay has no ties"):
        replace(what, tie_seeds=2, replay="t.jsonl")


def test_a_baseline_under_the_same_protocol(what, tmp_path):
    report = evaluate(replace(what, out=str(tmp_path / "b"), method="grabcut", side=None, limit=2))
    assert report["method"]["kind"] == "baseline"
    assert report["method"]["weights_sha256"] is None
    with pytest.raises(ValueError, match="unknown method"):
        replace(what, method="magic")


def test_comparison(what, tmp_path):
    evaluate(what)
    evaluate(replace(what, out=str(tmp_path / "b"), method="grabcut", side=None))
    text = compare_files([tmp_path / "out/report.json", tmp_path / "b/report.json"], tmp_path / "c")
    assert "grabcut" in text
    assert (tmp_path / "c" / "compare.html").exists()


def test_protocols_by_name():
    assert choose_protocol("ritm").threshold == 0.49
    assert choose_protocol("frozen", ties="seeded", seed=3).name == "frozen ties=seeded seed=3"
    with pytest.raises(ValueError, match="unknown protocol"):
        choose_protocol("best")
    assert any("hqseg44k" in line and "1537" in line for line in choices())


def launched(command, environment):
    os.environ.update(environment)
    sys.argv = command
    main()


def test_under_a_launcher_every_process_takes_its_share(what, tmp_path):
    """Two processes as ``torchrun`` starts them: RANK, WORLD_SIZE and an address."""
    expected = evaluate(what)["trace_sha256"]
    command = [
        "hrsam", "evaluate", "--dataset", "pairs", "--root", what.root, "--model", what.model,
        "--side", "64", "--clicks", str(CLICKS), "--device", "cpu", "--out", str(tmp_path / "two"),
    ]  # fmt: skip
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [begun(launched, command, {**shared, "RANK": str(rank)}) for rank in (0, 1)]
    for process in processes:
        process.join(120)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0, 0]
    report = json.loads((tmp_path / "two" / "report.json").read_text())
    assert report["trace_sha256"] == expected
    parts = {path.name: len(read_traces(path)[1]) for path in (tmp_path / "two" / "parts").iterdir()}
    assert parts == {"0.jsonl": 3, "1.jsonl": 2}
