"""Which pictures a page may see, how they are opened, and uploads."""

import io
import os
import time
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from hrsam import rle
from hrsam.bench.hostile_files import bomb, png
from hrsam.demo import decoder, gallery
from hrsam.demo.gallery import Gallery, plain_name, read_plain, sweep_old
from hrsam.demo.limits import LIMITS
from tests.builders import photo

SECRET = b"s" * 32


@pytest.fixture(scope="module", autouse=True)
def decoders():
    decoder.start()


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "pictures"
    made.mkdir()
    for name in ("b10.png", "b9.png", "a.PNG"):
        (made / name).write_bytes(png(photo(20, 30)))
    return made


@pytest.fixture
def open_gallery(tmp_path):
    (tmp_path / "state").mkdir()

    def make(*sources, **limits):
        return Gallery(sources, tmp_path / "state", SECRET, replace(LIMITS, **limits))

    return make


def names(found, owner="o"):
    return [entry.name for entry in found.entries(owner)]


def test_a_folder_in_the_order_of_a_person(folder, open_gallery):
    assert names(open_gallery(folder)) == ["a.PNG", "b9.png", "b10.png"]


def test_what_is_no_plain_picture_is_not_listed(folder, open_gallery, tmp_path):
    (tmp_path / "outside.png").write_bytes(png(photo(5, 5)))
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    (folder / "inner.png").symlink_to(folder / "a.PNG")
    os.mkfifo(folder / "pipe.png")
    (folder / "folder.png").mkdir()
    (folder / ".hidden.png").write_bytes(b"x")
    (folder / "notes.txt").write_bytes(b"x")
    assert names(open_gallery(folder)) == ["a.PNG", "b9.png", "b10.png"]
    assert names(open_gallery(folder, pictures=2)) == ["a.PNG", "b9.png"]


def test_ids_say_nothing_and_stay(folder, open_gallery, tmp_path):
    first = {entry.name: entry.id for entry in open_gallery(folder).entries("o")}
    assert {entry.name: entry.id for entry in open_gallery(folder).entries("p")} == first
    other = Gallery([folder], tmp_path / "state", b"t" * 32)
    assert not {entry.id for entry in other.entries("o")} & set(first.values())
    assert all(len(id) == 16 for id in first.values())
    (folder / "a.PNG").write_bytes(png(photo(21, 30)))
    changed = {entry.name: entry.id for entry in open_gallery(folder).entries("o")}
    assert changed["a.PNG"] != first["a.PNG"]
    assert changed["b9.png"] == first["b9.png"]


def test_named_files_alone_are_seen(folder, open_gallery, tmp_path):
    link = tmp_path / "to.png"
    link.symlink_to(folder / "b9.png")  # a person who names a link means what it points to
    found = open_gallery(folder / "a.PNG", link, folder / "a.PNG")
    assert names(found) == ["a.PNG", "b9.png"]
    assert found.open(found.entries("o")[1]).width == 30


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (["none"], "there is no .*none"),
        (["pictures", "pictures/a.PNG"], "got the folder"),
        (["pipe"], "device or a pipe"),
    ],
)
def test_other_sources_are_refused(folder, open_gallery, tmp_path, sources, message):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=message):
        open_gallery(*(tmp_path / source for source in sources))


def test_a_picture_is_decoded_once_and_let_go_beyond_the_limit(folder, open_gallery, monkeypatch):
    calls = []
    right = gallery.open_pyramid
    monkeypatch.setattr(gallery, "open_pyramid", lambda *a, **k: calls.append(1) or right(*a, **k))
    found = open_gallery(folder, open_pictures_bytes=2 * 4 * 20 * 30)
    one, two, three = found.entries("o")
    first = found.open(one)
    assert found.open(one) is first
    found.open(two)
    found.open(one)
    found.open(three)  # now two was not used for longest
    assert len(calls) == 3
    assert found.open(one) is first
    found.open(two)
    assert len(calls) == 4
    found.drop()
    assert found.open(one) is not first


def test_a_file_that_became_a_link_is_not_opened(folder, open_gallery, tmp_path):
    (tmp_path / "outside.png").write_bytes(png(photo(5, 5)))
    found = open_gallery(folder)
    entry = found.entries("o")[0]
    (folder / "a.PNG").unlink()
    (folder / "a.PNG").symlink_to(tmp_path / "outside.png")
    with pytest.raises(ValueError, match="is a link") as caught:
        found.open(entry)
    assert str(tmp_path) not in str(caught.value)


def test_plain_files_only(folder, tmp_path):
    assert read_plain(folder, "a.PNG", 1 << 20) == (folder / "a.PNG").read_bytes()
    os.mkfifo(folder / "pipe")
    (folder / "inside").mkdir()
    started = time.monotonic()
    for name in ("pipe", "inside", ".hidden", "../x", "none", "inside/..", "/etc/passwd"):
        with pytest.raises(ValueError, match="not") as caught:
            read_plain(folder, name, 1 << 20)
        assert str(tmp_path) not in str(caught.value)
    assert time.monotonic() - started < 1  # the pipe did not keep us
    with pytest.raises(ValueError, match="the limit is 0 MiB"):
        read_plain(folder, "a.PNG", 10)


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("a.png", "a.png"),
        ("../../a.png", "a.png"),
        ("C:\\x\\a.png", "a.png"),
        ("a\x00\nb.png", "ab.png"),
        ("\u202eevil.png", "evil.png"),
        ("\ud800", "picture"),
        ("", "picture"),
        ("/", "picture"),
        ("x" * 300 + ".png", "x" * 96 + ".png"),
        ("<b>.png", "<b>.png"),
    ],
)
def test_names_for_people(name, plain):
    assert plain_name(name) == plain


def upload(found, data, name="mine.png", owner="o"):
    file = found.scratch / "x.body"
    file.write_bytes(data)
    return found.upload(file, name, owner)


def test_an_upload_is_its_owners_and_stays(folder, open_gallery):
    found = open_gallery(folder)
    pixels = photo(40, 50)
    entry = upload(found, png(pixels), "../mine.png")
    assert names(found, "o")[-1] == "mine.png"
    assert "mine.png" not in names(found, "p")
    assert found.find(entry.id, "p") is None
    assert found.find(entry.id, "o") == entry
    later = open_gallery(folder)
    assert later.find(entry.id, "p") is None
    again = later.find(entry.id, "o")
    assert again is not None
    np.testing.assert_array_equal(later.open(again).pixels, pixels)
    assert sorted(path.suffix for path in (folder.parent / "state" / "uploads").iterdir()) == [".json", ".upload"]
    assert list(found.scratch.iterdir()) == []


def test_the_oldest_uploads_go_first(folder, open_gallery):
    found = open_gallery(folder, uploads=2)
    entries = []
    for seed in range(3):
        entries.append(upload(found, png(photo(10, 10, seed)), f"{seed}.png"))
        os.utime(folder.parent / "state" / "uploads" / f"{entries[-1].id}.upload", (seed, seed))
    assert names(found)[-2:] == ["1.png", "2.png"]
    found = open_gallery(folder, uploads_bytes=1)
    upload(found, png(photo(10, 10, 9)), "9.png")
    assert names(found)[3:] == ["9.png"]


def test_an_upload_is_what_read_image_says(folder, open_gallery):
    file = io.BytesIO()
    turned = Image.fromarray(photo(20, 30))
    exif = turned.getexif()
    exif[274] = 6
    turned.save(file, "PNG", exif=exif)
    found = open_gallery(folder)
    pyramid = found.open(upload(found, file.getvalue()))
    assert (pyramid.width, pyramid.height) == (20, 30)
    assert pyramid.notes == ("EXIF orientation 6 applied",)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"<svg/>", "^not a JPEG, PNG"),
        (b"", "^the file is empty"),
        (png(photo(20, 30))[:200], "^cannot be read"),
        (bomb(6_000), "within the memory and time"),
    ],
)
def test_what_is_no_picture_is_refused_by_the_other_process(folder, open_gallery, data, message):
    found = open_gallery(folder, decode_bytes=40 << 20)
    with pytest.raises(ValueError, match=message) as caught:
        upload(found, data)
    assert str(found.scratch) not in str(caught.value)
    assert [path.name for path in found.scratch.iterdir()] == ["x.body"]


def test_a_decoder_that_takes_too_long_is_killed(tmp_path):
    (tmp_path / "large.png").write_bytes(bomb(9_000))
    started = time.monotonic()
    with pytest.raises(ValueError, match="within the memory and time"):
        decoder.decode_picture(tmp_path / "large.png", tmp_path, replace(LIMITS, decode_seconds=0.05))
    assert time.monotonic() - started < 2
    assert [path.name for path in tmp_path.iterdir()] == ["large.png"]


def test_a_mask_is_decoded_apart_too(tmp_path):
    mask = np.zeros((20, 30), np.uint8)
    mask[3:9, 4:] = 255
    (tmp_path / "mask.png").write_bytes(png(mask))
    assert decoder.decode_mask(tmp_path / "mask.png", tmp_path) == rle.encode(mask > 0)
    (tmp_path / "mask.png").write_bytes(b"GIF89a")
    with pytest.raises(ValueError, match=r"^not a JPEG"):
        decoder.decode_mask(tmp_path / "mask.png", tmp_path)


def test_old_files_are_swept(tmp_path):
    for name, age in (("old", 100), ("new", 0)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age, time.time() - age))
    (tmp_path / "folder").mkdir()
    sweep_old(tmp_path, 50)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "new"]
