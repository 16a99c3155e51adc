"""Click logs: written, read back, played again to the same bytes; anything else is one sentence."""

import hashlib
import io
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hrsam import clicklog, rle
from hrsam.clicklog import fingerprint, make_log, read_log, replay, write_log
from hrsam.cutting import Cutting
from hrsam.pyramid import open_pyramid
from tests.builders import photo, small_model

SIDE = 64


def encoded(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


PICTURE = encoded(photo(90, 120))


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def played(model):
    """Two objects, and a third that is gone."""
    cutting = Cutting(model, open_pyramid(PICTURE), SIDE)
    mask = np.zeros((90, 120), bool)
    mask[30:70, 40:80] = True
    for command in (
        {"do": "box", "object": 1, "x0": 10, "y0": 5, "x1": 100, "y1": 70},
        {"do": "click", "object": 1, "x": 30.25, "y": 40},
        {"do": "add", "name": "Tässchen", "colour": "#00ff00"},
        {"do": "given", "object": 2, "rle": rle.encode(mask)},
        {"do": "click", "object": 2, "x": 90, "y": 80, "positive": False},
        {"do": "click", "object": 1, "x": 100, "y": 80, "positive": False},
        {"do": "undo", "object": 1},
        {"do": "redo", "object": 1},
        {"do": "add"},
        {"do": "describe", "object": 1, "name": "cup"},
        {"do": "remove", "object": 3},
    ):
        cutting.apply(command)
    return cutting


@pytest.fixture(scope="module")
def log(played):
    return make_log(played, "cup.png", "hrsam_pp_t.starter")


@pytest.fixture(scope="module")
def text(log):
    return log.text()


def test_the_format(log, model):
    value = json.loads(log.text())
    assert list(value) == ["format", "picture", "model", "side", "commands"]
    assert value["format"] == 1
    assert value["picture"] == {
        "name": "cup.png", "sha256": hashlib.sha256(PICTURE).hexdigest(), "width": 120, "height": 90
    }  # fmt: skip
    assert value["model"] == {"name": "hrsam_pp_t.starter", "sha256": fingerprint(model)}
    assert value["side"] == SIDE
    assert value["commands"][1] == {"do": "click", "object": 1, "x": 30.25, "y": 40.0, "positive": True}
    assert len(value["commands"]) == 11


def test_a_log_played_again_gives_the_same_bytes(tmp_path, log, model, played):
    write_log(tmp_path / "log.json", log)
    for source in (tmp_path / "log.json", str(tmp_path / "log.json"), (tmp_path / "log.json").read_bytes()):
        again = replay(read_log(source), model, open_pyramid(PICTURE))
        assert again.log == played.log
        assert again.objects.keys() == played.objects.keys() == {1, 2}
        for id, thing in played.objects.items():
            assert again.objects[id].mask.array().tobytes() == thing.mask.array().tobytes()
            assert (again.objects[id].name, again.objects[id].colour) == (thing.name, thing.colour)
    assert make_log(again, "cup.png", "hrsam_pp_t.starter").text() == log.text()
    empty = make_log(Cutting(model, open_pyramid(PICTURE), SIDE), "cup.png", "a")
    assert replay(read_log(empty.text()), model, open_pyramid(PICTURE)).revision == 0


def test_the_fingerprint_is_of_the_weights(model):
    assert fingerprint(model) == fingerprint(small_model())
    assert fingerprint(model) != fingerprint(small_model(seed=1))
    changed = small_model()
    next(changed.parameters()).data.view(-1)[-1] += 1
    assert fingerprint(model) != fingerprint(changed)


def test_another_picture_or_model_is_refused(log, model):
    with pytest.raises(ValueError, match=r"the log is of cup.png, 120x90 .*; this picture has 120x90 and"):
        replay(log, model, open_pyramid(encoded(photo(90, 120, seed=1))))
    with pytest.raises(ValueError, match=r"made with hrsam_pp_t.starter, weights .* give that one by --model"):
        replay(log, small_model(seed=1), open_pyramid(PICTURE))
    with pytest.raises(ValueError, match=r"command 2 of the log is refused: click 0 at .* is outside"):
        replay(
            log.model_copy(update={"commands": [log.commands[0], {**log.commands[1], "x": 500.0}]}),
            model,
            open_pyramid(PICTURE),
        )


def changed(log, **changes):
    return json.dumps({**json.loads(log.text()), **changes}).encode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"{", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"9" * 10_000, "is not JSON|a JSON object"),
        (b"null", "a click log is a JSON object; got NoneType"),
        (b"[]", "a click log is a JSON object; got list"),
        (b"{}", "has format None, this version reads format 1"),
        (b'{"format": 2}', "has format 2, this version reads format 1; use a newer hrsam"),
        (b'{"format": 1}', "picture: Field required"),
        ({"extra": 1}, "extra: Extra inputs"),
        ({"side": 15}, "side: "),
        ({"side": "64"}, "side: "),
        ({"side": 1e9}, "side: "),
        ({"picture": {"name": "a", "sha256": "0", "width": 1, "height": 1}}, "picture.sha256"),
        ({"picture": {"name": "a", "sha256": "0" * 64, "width": 0, "height": 1}}, "picture.width"),
        ({"model": None}, "model: "),
        ({"commands": {}}, "commands: "),
        ({"commands": [1]}, "commands.0: "),
        ({"commands": [{"do": "undo", "object": 1}, {"do": "exec"}]}, "command 2: there is no command 'exec'"),
        ({"commands": [{"do": "click", "object": 1, "x": float("nan"), "y": 0}]}, "command 1: .*finite"),
    ],
)
def test_what_is_no_log_is_refused_in_one_sentence(log, tmp_path, data, message):
    data = data if isinstance(data, bytes) else changed(log, **data)
    (tmp_path / "log.json").write_bytes(data)
    for source, name in ((data, "click log"), (tmp_path / "log.json", "log.json")):
        with pytest.raises(ValueError, match=message) as caught:
            read_log(source)
        assert f"{name}: " in str(caught.value)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500


def test_missing_and_endless_files(tmp_path, log, monkeypatch):
    for path in (tmp_path / "log.json", tmp_path):
        with pytest.raises(ValueError, match="there is no such file"):
            read_log(path)
    monkeypatch.setattr(clicklog, "MAX_BYTES", 100)
    (tmp_path / "log.json").write_bytes(log.text())
    for source in (log.text(), tmp_path / "log.json"):
        with pytest.raises(ValueError, match="this file is larger"):
            read_log(source)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_damaged_log_is_a_log_or_one_sentence(text, data):
    text = bytearray(text)
    for _ in range(data.draw(st.integers(1, 3))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    refused = None
    try:
        read_log(bytes(text[: data.draw(st.integers(0, len(text)))]))
    except ValueError as err:
        refused = str(err)
    assert refused is None or "\n" not in refused


def test_a_failed_write_leaves_the_old_log(tmp_path, log):
    path = tmp_path / "log.json"
    write_log(path, log)
    with pytest.raises(OSError, match=r"missing"):
        write_log(tmp_path / "missing" / "log.json", log)
    assert read_log(path) == log
    assert list(tmp_path.iterdir()) == [path]
