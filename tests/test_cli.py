"""The command as a person uses it: files in, files out, and one sentence for whatever is wrong."""

import io
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from hrsam import rle
from hrsam.cli import main
from hrsam.clicklog import make_log
from hrsam.cutting import Cutting
from hrsam.export import write_mask
from hrsam.images import read_image, read_mask
from hrsam.models.presets import PRESETS
from hrsam.predict import cut_out
from hrsam.pyramid import open_pyramid
from hrsam.weights import load, save
from tests.builders import photo, small_model

PIXELS = photo(60, 80)


def png(array, **options):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG", **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return save(small_model(), folder / "small.safetensors", metadata={"licence": "Apache-2.0", "source": "a test"})


@pytest.fixture
def hrsam(tmp_path, monkeypatch, capsys):
    """``hrsam(*arguments)`` in an empty folder -> exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["hrsam", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capsys.readouterr()
        return caught.value.code or 0, out, err

    return run


@pytest.fixture
def predict(hrsam, model_file):
    """``predict(*arguments)``: ``hrsam predict`` with a small model; of an option given twice the second counts."""
    return lambda *arguments: hrsam("predict", "--model", model_file, "--device", "cpu", "--side", 64, *arguments)


def test_predict_writes_mask_overlay_and_report(tmp_path, predict, model_file):
    (tmp_path / "photo.png").write_bytes(png(PIXELS))
    code, out, err = predict(
        "photo.png", "--click", "30,20", "--click", "60.5,50,0", "--box", "5,5,70,50",
        "--overlay", "overlay.png", "--json", "report.json", "--out", "cut.png",
    )  # fmt: skip
    assert (code, err) == (0, "")
    mask = read_mask("cut.png")
    assert mask.shape == (60, 80)
    assert 0 < mask.mean() < 1
    assert set(np.unique(np.asarray(Image.open("cut.png")))) == {0, 255}
    assert f"cut.png: {mask.sum()} pixels" in out
    overlay = read_image("overlay.png").pixels
    assert overlay.shape == PIXELS.shape
    assert (overlay != PIXELS).any()

    report = json.loads(Path("report.json").read_text())
    assert (report["photo"], report["model"], report["device"]) == ("photo.png", "test", "cpu")
    assert (report["width"], report["height"], report["side"]) == (80, 60, 64)
    prompts = [{k: v for k, v in r.items() if k in ("box", "click", "positive")} for r in report["rounds"]]
    assert prompts == [
        {"box": [5, 5, 70, 50]},
        {"click": [30, 20], "positive": True},
        {"click": [60.5, 50], "positive": False},
    ]
    for played in report["rounds"]:
        assert rle.decode(played["mask"]).sum() == played["area"]
    np.testing.assert_array_equal(rle.decode(report["rounds"][-1]["mask"]), mask)
    assert sorted(os.listdir()) == ["cut.png", "overlay.png", "photo.png", "report.json"]

    rounds = report["rounds"]
    again = cut_out(load(model_file), PIXELS, [], (5, 5, 70, 50), side=64)
    np.testing.assert_array_equal(again.mask, rle.decode(rounds[0]["mask"]))
    with pytest.raises(ValueError, match="nothing to go by"):
        cut_out(load(model_file), PIXELS, [])


@pytest.fixture
def click_log(tmp_path, model_file):
    """``click_log(**changes)`` writes photo.png and log.json, two objects; returns what was played."""

    def write(**changes):
        (tmp_path / "photo.png").write_bytes(png(PIXELS))
        cutting = Cutting(load(model_file), open_pyramid(tmp_path / "photo.png"), 64)
        for command in (
            {"do": "click", "object": 1, "x": 30, "y": 20},
            {"do": "add", "colour": "#00ff00"},
            {"do": "click", "object": 2, "x": 70, "y": 50},
            {"do": "click", "object": 1, "x": 5, "y": 5, "positive": False},
        ):
            cutting.apply(command)
        log = json.loads(make_log(cutting, "photo.png", "small").text())
        (tmp_path / "log.json").write_text(json.dumps({**log, **changes}))
        return cutting

    return write


def test_replay_gives_the_bytes_of_every_mask(tmp_path, predict, click_log):
    played = click_log()
    arguments = (
        "photo.png",
        "--replay",
        "log.json",
        "--out",
        "mask.png",
        "--overlay",
        "seen.png",
        "--json",
        "cut.json",
    )
    code, out, err = predict(*arguments)
    assert (code, err) == (0, "")
    areas = {id: thing.mask.area for id, thing in played.objects.items()}
    assert out.splitlines() == [f"mask-{id}.png: {area} pixels" for id, area in areas.items()]
    for id, thing in played.objects.items():
        file = io.BytesIO()
        write_mask(file, thing.mask)
        assert (tmp_path / f"mask-{id}.png").read_bytes() == file.getvalue()
        np.testing.assert_array_equal(read_mask(tmp_path / f"mask-{id}.png"), thing.mask.array())
    assert not (tmp_path / "mask.png").exists()
    drawn = read_image(tmp_path / "seen.png").pixels
    for thing in played.objects.values():
        assert (drawn[thing.mask.array()] != PIXELS[thing.mask.array()]).mean() > 0.5
    report = json.loads((tmp_path / "cut.json").read_text())
    assert [(o["id"], o["area"], rle.decode(o["mask"]).sum()) for o in report["objects"]] == [
        (id, area, area) for id, area in areas.items()
    ]
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert predict(*arguments)[0] == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"format": 9}, (), "log.json: has format 9"),
        ({"commands": [{"do": "undo", "object": 1}]}, (), "command 1 of the log is refused: there is nothing to undo"),
        ({}, ("--click", "3,4"), "leave out --click and --box with --replay"),
        ({}, ("--box", "3,4,5,6"), "leave out --click and --box with --replay"),
        ({}, ("--replay", "missing.json"), "missing.json: there is no such file"),
        ({}, ("--out", "mask.jpg"), "end the name in .png"),
        ({}, ("--json", "log.json"), "it is the photo or another result"),
        (
            {},
            ("--out", "mask.png", "--overlay", "mask-2.png"),
            "cannot write mask-2.png: it is the photo or another result",
        ),
        ({"picture": {"name": "cup.png", "sha256": "0" * 64, "width": 80, "height": 60}}, (), "the log is of cup.png"),
        ({"model": {"name": "big", "sha256": "0" * 64}}, (), "made with big, weights"),
    ],
)
def test_replay_refuses_in_one_sentence(tmp_path, predict, click_log, changes, arguments, message):
    click_log(**changes)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    code, out, err = predict("photo.png", "--replay", "log.json", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def kinds():
    """{kind: (file, shape of the picture, note on stderr)}."""
    files = {name: io.BytesIO() for name in ("CMYK TIFF", "CMYK JPEG", "palette")}
    Image.fromarray(PIXELS).convert("CMYK").save(files["CMYK TIFF"], "TIFF")
    Image.fromarray(PIXELS).convert("CMYK").save(files["CMYK JPEG"], "JPEG")
    Image.fromarray(PIXELS).quantize(16).save(files["palette"], "PNG")
    return {
        "16-bit": (png(PIXELS[..., 0].astype(np.uint16) * 257), (60, 80), "16-bit grey"),
        "CMYK TIFF": (files["CMYK TIFF"].getvalue(), (60, 80), "CMYK converted"),
        "CMYK JPEG": (files["CMYK JPEG"].getvalue(), (60, 80), "CMYK converted"),
        "palette": (files["palette"].getvalue(), (60, 80), ""),
        "alpha": (png(np.dstack((PIXELS, np.full((60, 80), 128, np.uint8)))), (60, 80), "alpha composited on white"),
        "one pixel": (png(PIXELS[:1, :1]), (1, 1), ""),
        "one row": (png(PIXELS[:1]), (1, 80), ""),
    }


@pytest.mark.parametrize("kind", kinds())
def test_pictures_of_every_kind(tmp_path, predict, kind):
    data, shape, note = kinds()[kind]
    (tmp_path / "photo.jpg").write_bytes(data)
    code, _, err = predict("photo.jpg", "--click", "0,0", "--out", "mask.png")
    assert code == 0
    assert err.count("\n") == bool(note)
    assert err.startswith(f"note: {note}" if note else "")
    assert read_mask("mask.png").shape == shape


def test_a_rotated_photo_gives_the_mask_of_the_upright_one(tmp_path, predict):
    exif = Image.Exif()
    exif[274] = 6  # to be turned clockwise by 90 degrees
    (tmp_path / "upright.png").write_bytes(png(PIXELS))
    (tmp_path / "rotated.png").write_bytes(png(np.rot90(PIXELS).copy(), exif=exif))
    for name in ("upright", "rotated"):
        code, _, err = predict(f"{name}.png", "--click", "70,12", "--out", f"{name}_mask.png")
        assert code == 0
    assert err == "note: EXIF orientation 6 applied\n"
    mask = read_mask("upright_mask.png")
    assert 0 < mask.mean() < 1
    np.testing.assert_array_equal(read_mask("rotated_mask.png"), mask)


def bomb():
    data = bytearray(png(PIXELS))
    data[16:24] = struct.pack(">II", 30_000, 30_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (png(PIXELS)[:3000], "cannot be read"),
        (b"just some text", "not a JPEG, PNG, WebP, TIFF or BMP picture"),
        (b"", "the file is empty"),
        (bomb(), "30000x30000 is 900 megapixels"),
    ],
    ids=["truncated", "text", "empty", "bomb"],
)
def test_pictures_that_cannot_be_read(tmp_path, predict, content, message):
    (tmp_path / "photo.jpg").write_bytes(content)
    refused(predict("photo.jpg", "--click", "30,20", "--out", "mask.png", "--json", "a.json"), "photo.jpg", message)
    assert os.listdir() == ["photo.jpg"]


def refused(result, *parts):
    """Exit code 2, nothing on stdout, one sentence on stderr that holds ``parts``."""
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("hrsam: ")
    assert err.count("\n") == 1
    for part in parts:
        assert part in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is nothing to go by; give at least one --click"),
        (["--click", "80,20"], "click 0 at (80, 20) is outside the picture of 80 x 60"),
        (["--click", "30,20", "--click", "-3,20"], "click 1 at (-3, 20) is outside"),
        (["--click", "nan,20"], "a click is X,Y"),
        (["--click", "30,inf"], "a click is X,Y"),
        (["--click", "30"], "a click is X,Y"),
        (["--click", "30,20,7"], "a click is X,Y or X,Y,1 (object) or X,Y,0 (background)"),
        (["--click", "30,20,yes"], "got '30,20,yes'"),
        (["--box", "1,2,3"], "a box is X0,Y0,X1,Y1"),
        (["--box", "1,2,3,nan"], "four finite numbers"),
        (["--box", "30,2,3,40"], "a box needs x0 < x1 and y0 < y1"),
        (["--box", "100,2,130,40"], "lies outside the picture of 80x60"),
        (["--click", "30,20", "--device", "banana"], "there is no device 'banana'; use cpu"),
        (["--click", "30,20", "--device", "meta"], "the device 'meta' is not supported"),
        (["--click", "30,20", "--device", "cuda:99"], "the device cuda:99 is not available here"),
        (["--click", "30,20", "--out", "nowhere/mask.png"], "there is no folder nowhere; make it first"),
        (["--click", "30,20", "--out", "photo.png/mask.png"], "there is no folder photo.png"),
        (["--click", "30,20", "--out", "/proc/mask.png"], "/proc"),
        (["--click", "30,20", "--json", "nowhere/a.json"], "there is no folder nowhere"),
        (["--click", "30,20", "--json", "."], "cannot write ."),
        (["--click", "30,20", "--overlay", "overlay.jpg"], "end the name in .png"),
        (["--click", "30,20", "--out", "mask.gif"], "end the name in .png"),
        (["--click", "30,20", "--out", "photo.png"], "it is the photo or another result"),
        (["--click", "30,20", "--out", "a.png", "--overlay", "./a.png"], "it is the photo or another result"),
        (["--click", "30,20", "--model", "missing.safetensors"], "there is no weight file missing.safetensors"),
        (["--click", "30,20", "--model", "./photo.png"], "not a safetensors file"),
        (["--click", "30,20", "--model", "hrsam_b"], "hrsam_b is an architecture"),
    ],
)
def test_what_is_wrong_is_one_sentence_and_nothing_is_written(tmp_path, predict, arguments, message):
    (tmp_path / "photo.png").write_bytes(png(PIXELS))
    refused(predict("photo.png", *arguments), message)
    assert os.listdir() == ["photo.png"]
    assert (tmp_path / "photo.png").read_bytes() == png(PIXELS)


@pytest.mark.parametrize("name", ["missing.jpg", "folder"])
def test_a_missing_photo(tmp_path, predict, name):
    (tmp_path / "folder").mkdir()
    refused(predict(name, "--click", "30,20"), f"there is no photo {name}")
    assert os.listdir() == ["folder"]


@pytest.fixture
def listed(tmp_path_factory, monkeypatch):
    """The only folder of weights lists hrsam_pp_t.starter, whose file is missing."""
    folder = tmp_path_factory.mktemp("weights")
    entry = {"name": "hrsam_pp_t.starter", "preset": "hrsam_pp_t", "file": "starter.safetensors", "sha256": "0" * 64}
    entry |= {"bytes": 20_000_000, "licence": "CC-BY-4.0", "data": "some photos", "protocol": "frozen"}
    (folder / "manifest.yaml").write_text(yaml.safe_dump({"models": [entry]}))
    monkeypatch.setenv("HRSAM_WEIGHTS", str(folder))
    return folder


def test_an_unknown_model_is_answered_with_a_suggestion(tmp_path, predict, listed):
    (tmp_path / "photo.png").write_bytes(png(PIXELS))
    refused(
        predict("photo.png", "--click", "30,20", "--model", "hrsam_pp_t.strater"),
        "there is no trained model 'hrsam_pp_t.strater'; did you mean 'hrsam_pp_t.starter'?",
    )
    refused(predict("photo.png", "--click", "30,20", "--model", "hrsam_pp_t.starter"), "starter.safetensors is missing")


def test_models(hrsam, listed):
    code, out, err = hrsam("models")
    assert (code, err) == (0, "")
    assert all(name in out for name in PRESETS)
    assert "hrsam_pp_t.starter  20.0 MB, CC-BY-4.0; trained on some photos; " in out


def test_doctor(hrsam):
    code, out, err = hrsam("doctor")
    assert (code, err) == (0, "")
    for part in ("torch", "device c", "cycle scan runs on: ", "hrsam_pp_b"):
        assert part in out


def test_demo_opens_the_page_on_what_is_named(tmp_path, hrsam, model_file, monkeypatch):
    seen = []
    monkeypatch.setattr("hrsam.demo.open_page", lambda *arguments, **options: seen.append((arguments, options)))
    (tmp_path / "photos").mkdir()
    code, out, _ = hrsam(
        "demo", "photos", "--model", model_file, "--device", "cpu", "--side", 64, "--port", 8400, "--no-browser"
    )
    assert (code, out) == (0, "")  # no tour when there are pictures
    (_, name, pictures), options = seen[0]
    assert (name, pictures) == (str(model_file), [Path("photos")])
    assert (options["port"], options["host"], options["side"], options["browser"]) == (8400, "127.0.0.1", 64, False)
    refused(hrsam("demo", "photos", "--no-serve", "--model", model_file), "got pictures and --no-serve")


def test_demo(tmp_path, hrsam, model_file):
    code, out, _ = hrsam(
        "demo",
        "--no-serve",
        "--model",
        model_file,
        "--device",
        "cpu",
        "--side",
        64,
        "--clicks",
        2,
        "--out",
        "new/folder",
    )
    assert code == 0
    assert out.count("click ") == 2
    assert "IoU 0." in out
    overlay = read_image(tmp_path / "new" / "folder" / "demo.png").pixels
    assert f"encoded {overlay.shape[1]}x{overlay.shape[0]} pixels at side 64" in out


@pytest.mark.parametrize("command", ["demo", "predict", "evaluate", "models", "doctor", "convert", "train"])
def test_every_command_explains_itself(hrsam, command):
    code, out, err = hrsam(command, "--help")
    assert (code, err) == (0, "")
    assert "Usage: hrsam " + command in out


def test_convert_and_train_refuse_in_one_sentence(tmp_path, hrsam):
    refused(hrsam("convert", "a.pth", "b.safetensors", "--from", "sam"), "there is no weight file a.pth")
    refused(hrsam("convert", "a.pth", "b.safetensors", "--from", "sma"), "did you mean 'sam'")
    refused(hrsam("train", "none.yaml"), "there is no settings file none.yaml")
    (tmp_path / "run.yaml").write_text("preset: hrsam_t\ndata: [a]\nout: out\nphases: []\n")
    refused(hrsam("train", "run.yaml", "sed=1"), "sed: no such setting; did you mean 'seed'")
    assert os.listdir() == ["run.yaml"]


def test_evaluate(tmp_path, hrsam, model_file):
    for folder, array in (
        ("images", PIXELS),
        ("masks", np.pad(np.full((20, 30), 255, np.uint8), ((10, 30), (20, 30)))),
    ):
        (tmp_path / "set" / folder).mkdir(parents=True)
        (tmp_path / "set" / folder / "a.png").write_bytes(png(array))
    play = (
        "evaluate",
        "--dataset",
        "pairs",
        "--root",
        "set",
        "--side",
        64,
        "--device",
        "cpu",
        "--processes",
        1,
        "--clicks",
        2,
    )
    code, out, err = hrsam(*play, "--model", model_file, "--out", "one")
    assert code == 0, err
    assert "NoC@90" in out
    assert "one/report.html" in out
    report = json.loads((tmp_path / "one" / "report.json").read_text())
    assert report["command"].startswith("hrsam evaluate --dataset pairs")
    assert report["protocol"]["name"] == "frozen clicks=2"
    assert hrsam(*play, "--method", "grabcut", "--out", "two")[0] == 0
    code, out, err = hrsam("evaluate", "--compare", "one/report.json", "two/report.json", "--out", "both")
    assert code == 0, err
    assert "grabcut" in out
    assert (tmp_path / "both" / "compare.html").is_file()
    code, out, _ = hrsam("evaluate", "--list")
    assert code == 0
    assert all(word in out for word in ("davis", "345 objects", "grabcut", "ritm"))


def test_evaluate_refuses_in_one_sentence(tmp_path, hrsam, model_file):
    refused(hrsam("evaluate"), "an evaluation needs --dataset, --root and --out")
    refused(hrsam("evaluate", "--compare", "a.json"), "a.json")
    refused(hrsam("evaluate", "a.json"), "without --compare")
    usual = ("--dataset", "pairs", "--root", "none", "--out", "out", "--device", "cpu")
    refused(hrsam("evaluate", *usual), "there is no folder none")
    refused(hrsam("evaluate", *usual, "--protocol", "best"), "choose one of frozen, hrsam, ritm")
    refused(hrsam("evaluate", *usual, "--method", "magic"), "unknown method 'magic'")
    refused(hrsam("evaluate", *usual, "--ties", "last"), "ties are 'first' or 'seeded'")
    refused(hrsam("evaluate", "--dataset", "davids", "--root", ".", "--out", "out"), "davids")
    assert os.listdir() == []


def test_verbose_shows_the_traceback(hrsam, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["hrsam", "-v", "predict", "missing.jpg", "--click", "1,1"])
    with pytest.raises(ValueError, match=r"there is no photo missing\.jpg"):
        main()


def test_as_a_program(tmp_path, model_file):
    (tmp_path / "photo.png").write_bytes(png(PIXELS))
    command = [sys.executable, "-m", "hrsam", "predict", "photo.png", "--model", model_file, "--side", "64"]
    run = subprocess.run([*command, "--click", "30,20"], cwd=tmp_path, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith("mask.png: ")
    assert read_mask(tmp_path / "mask.png").shape == (60, 80)
