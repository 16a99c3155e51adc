"""A picture at every scale, in memory or on the disk: the same levels, tiles and regions."""

import hashlib
import io
import os
import threading
import time

import numpy as np
import pytest
from PIL import Image

from hrsam import pyramid as pyramid_module
from hrsam.frame import Frame
from hrsam.images import PictureError, read_image
from hrsam.pyramid import TILE, InMemory, OnDisk, open_pyramid
from tests.builders import photo

HEIGHT, WIDTH = 700, 1337
PIXELS = photo(HEIGHT, WIDTH)


def encoded(array, kind="PNG", **options):
    file = io.BytesIO()
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def small_memory(monkeypatch):
    """Pictures of more than half a megapixel are huge."""
    pytest.importorskip("pyvips")
    monkeypatch.setattr(pyramid_module, "MAX_PIXELS", 500_000)


@pytest.fixture(params=["memory", "disk"])
def pyramid(request, tmp_path):
    if request.param == "disk":
        request.getfixturevalue("small_memory")
    opened = open_pyramid(encoded(PIXELS), scratch=tmp_path)
    assert isinstance(opened, OnDisk if request.param == "disk" else InMemory)
    yield opened
    opened.close()


def whole_level(pyramid, level):
    width, height = pyramid.level_size(level)
    rows = [
        np.concatenate([pyramid.tile(level, col, row) for col in range(-(-width // TILE))], axis=1)
        for row in range(-(-height // TILE))
    ]
    return np.concatenate(rows)


def test_tiles_make_up_the_picture(pyramid):
    assert (pyramid.width, pyramid.height, pyramid.levels) == (WIDTH, HEIGHT, 3)
    assert pyramid.sha256 == hashlib.sha256(encoded(PIXELS)).hexdigest()
    np.testing.assert_array_equal(whole_level(pyramid, 0), PIXELS)
    assert pyramid.tile(0, 2, 1).shape == (HEIGHT - TILE, WIDTH - 2 * TILE, 3)
    assert pyramid.tile(2, 0, 0).shape == (175, 335, 3)


def test_a_level_is_the_area_mean_of_the_one_before(pyramid):
    for level in (1, 2):
        finer = whole_level(pyramid, level - 1).astype(float)
        finer = np.pad(finer, ((0, finer.shape[0] % 2), (0, finer.shape[1] % 2), (0, 0)), mode="edge")
        mean = (finer[::2, ::2] + finer[1::2, ::2] + finer[::2, 1::2] + finer[1::2, 1::2]) / 4
        got = whole_level(pyramid, level)
        assert got.shape == mean.shape
        assert np.abs(got - mean).max() <= (0.5 if pyramid.pixels is not None else 1)


def test_regions_are_native_pixels(pyramid):
    np.testing.assert_array_equal(pyramid.region(500, 300, 777, 689), PIXELS[300:689, 500:777])
    np.testing.assert_array_equal(pyramid.region(WIDTH - 1, HEIGHT - 1, WIDTH, HEIGHT), PIXELS[-1:, -1:])
    for window in ((0, 0, 0, 1), (-1, 0, 5, 5), (0, 0, WIDTH + 1, 5), (0, 5, 5, 5), (0, 0, 5, HEIGHT + 1)):
        with pytest.raises(ValueError, match="must lie in the picture of 1337x700"):
            pyramid.region(*window)


@pytest.mark.parametrize("tile", [(0, 3, 0), (0, 0, 2), (0, -1, 0), (2, 0, 1), (3, 0, 0), (-1, 0, 0), (10**9, 0, 0)])
def test_tiles_outside_are_refused(pyramid, tile):
    with pytest.raises(ValueError, match="there is no"):
        pyramid.tile(*tile)


def test_a_picture_in_memory_has_its_pixels_and_no_overview():
    pyramid = open_pyramid(encoded(PIXELS))
    assert pyramid.overview(256) is None
    np.testing.assert_array_equal(pyramid.pixels, PIXELS)
    assert not pyramid.pixels.flags.writeable


@pytest.mark.parametrize("side", [100, 256, 700, 1000, 1337])
def test_the_overview_is_what_a_model_would_see(small_memory, tmp_path, side):
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    pixels = np.stack([x % 256, y % 256, (x + y) // 8 % 256], axis=2).astype(np.uint8)
    pyramid = open_pyramid(encoded(pixels), scratch=tmp_path)
    assert pyramid.pixels is None
    frame = Frame(HEIGHT, WIDTH, side)
    seen = pyramid.overview(side)
    assert seen.shape == (*frame.resized, 3)
    want, got = (frame.prepare(p, (0, 0, 0), (1, 1, 1)) for p in (pixels, seen))
    assert (got - want).abs().mean() < 1
    assert side < WIDTH or np.array_equal(seen, pixels)


def test_many_threads_read_at_once(pyramid):
    jobs = [(level, 0, 0) for level in range(3)] * 4
    got = [None] * len(jobs)
    threads = [
        threading.Thread(target=lambda i=i, job=job: got.__setitem__(i, pyramid.tile(*job)))
        for i, job in enumerate(jobs)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(tile, pyramid.tile(*job)) for tile, job in zip(got, jobs))


@pytest.mark.parametrize(("side", "levels"), [(1, 1), (512, 1), (513, 2), (1024, 2), (1025, 3), (30_000, 7)])
def test_the_last_level_fits_one_tile(side, levels):
    pyramid = InMemory(np.zeros((1, side, 3), np.uint8))
    assert pyramid.levels == levels
    assert max(pyramid.level_size(levels - 1)) <= TILE
    assert levels == 1 or max(pyramid.level_size(levels - 2)) > TILE


KINDS = {
    "grey": (photo(600, 900)[..., 0], "PNG", {}),
    "16-bit grey": (photo(600, 900)[..., 0].astype(np.uint16) * 200, "PNG", {}),
    "alpha": (np.dstack([photo(600, 900), photo(600, 900, 1)[..., :1]]), "PNG", {}),
    "palette": (Image.fromarray(photo(600, 900)).quantize(16), "PNG", {}),
    "tiff": (photo(600, 900), "TIFF", {"compression": "tiff_lzw"}),
    "jpeg": (np.full((600, 900, 3), (200, 40, 90), np.uint8), "JPEG", {"quality": 95}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_huge_pictures_are_read_as_all_others(small_memory, tmp_path, kind):
    array, name, options = KINDS[kind]
    data = encoded(array, name, **options)
    path = tmp_path / "picture"
    path.write_bytes(data)
    want = read_image(data)
    for source in (data, path):
        pyramid = open_pyramid(source)
        assert np.abs(whole_level(pyramid, 0).astype(int) - want.pixels).max() <= (
            1 if kind in ("alpha", "jpeg") else 0
        )
        assert [note.split(",")[0] for note in pyramid.notes] == [note.split(",")[0] for note in want.notes]
        pyramid.close()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_huge_pictures_are_turned_upright(small_memory, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    data = encoded(photo(600, 900), "TIFF", exif=exif)
    want = read_image(data)
    pyramid = open_pyramid(data)
    np.testing.assert_array_equal(whole_level(pyramid, 0), want.pixels)
    assert pyramid.notes == want.notes
    pyramid.close()


def test_tiles_are_kept_and_found_again(small_memory, tmp_path):
    first = open_pyramid(encoded(PIXELS), scratch=tmp_path)
    first.close()
    (kept,) = tmp_path.iterdir()
    assert kept.name == f"{first.sha256}.tiles.tif"
    stamp = kept.stat().st_mtime_ns
    again = open_pyramid(encoded(PIXELS), scratch=tmp_path)
    assert kept.stat().st_mtime_ns == stamp
    np.testing.assert_array_equal(whole_level(again, 0), PIXELS)


def test_what_killed_writers_left_is_removed(small_memory, tmp_path):
    old, new = tmp_path / ".a.tiles.tif.1.part.tif", tmp_path / ".a.tiles.tif.2.part.tif"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    open_pyramid(encoded(PIXELS), scratch=tmp_path).close()
    assert not old.exists()
    assert new.exists()  # somebody may be writing it
    assert len(list(tmp_path.iterdir())) == 2


def test_without_a_folder_nothing_is_left(small_memory, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    pyramid = open_pyramid(encoded(PIXELS))
    assert len(list(tmp_path.iterdir())) == 1
    pyramid.close()
    assert list(tmp_path.iterdir()) == []
    data = encoded(PIXELS)
    with pytest.raises(PictureError, match="picture: cannot be read"):
        open_pyramid(data[: len(data) // 2])
    assert list(tmp_path.iterdir()) == []


def test_huge_pictures_that_cannot_be_opened(small_memory, tmp_path, monkeypatch):
    def refused(data, match):
        with pytest.raises(PictureError, match=match) as caught:
            open_pyramid(data, scratch=tmp_path)
        assert "\n" not in str(caught.value)
        assert list(tmp_path.iterdir()) == []

    refused(encoded(PIXELS, "BMP"), "a BMP picture of 1337x700 pixels cannot be opened; save it as TIFF or PNG")
    refused(encoded(Image.fromarray(PIXELS).convert("CMYK"), "TIFF"), "8- or 16-bit grey or RGB, got cmyk")
    refused(encoded(PIXELS[..., 0].astype(np.float32), "TIFF"), "8- or 16-bit grey or RGB, got .* float")
    data = encoded(PIXELS, "JPEG")
    refused(data[: len(data) // 2], "cannot be read")
    refused(encoded(np.zeros((17, 30_001, 3), np.uint8)), "the longest side may have 30000")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    refused(encoded(PIXELS), "may need 0.0 GB in .*, which has 0.0 GB left; make room there")


def test_without_pyvips_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(pyramid_module, "MAX_PIXELS", 500_000)
    monkeypatch.setitem(__import__("sys").modules, "pyvips", None)
    with pytest.raises(PictureError, match=r"needs pyvips; run: pip install 'hrsam\[huge\]'"):
        open_pyramid(encoded(PIXELS))


@pytest.mark.parametrize("data", [b"", b"<svg></svg>", b"%PDF-1.4", b"\xff\xd8\xff broken"])
def test_only_pictures_are_opened(data):
    with pytest.raises(PictureError):
        open_pyramid(data)


@pytest.mark.slow
def test_thirty_thousand_pixels_a_side(tmp_path):
    """A JPEG of 900 megapixels; what opening takes is said by ``-s``."""
    vips = pytest.importorskip("pyvips")
    path = tmp_path / "huge.jpg"
    noise = vips.Image.gaussnoise(3000, 3000, sigma=30, mean=128).cast("uchar").replicate(10, 10)
    noise.bandjoin([noise, noise]).copy(interpretation="srgb").jpegsave(str(path), Q=80)
    started = time.perf_counter()
    pyramid = open_pyramid(path, scratch=tmp_path)
    opened = time.perf_counter()
    tiles = [pyramid.tile(0, 7 * i % 58, 11 * i % 58) for i in range(50)]
    read = time.perf_counter()
    seen = pyramid.overview(1024)
    print(
        f"open {opened - started:.1f} s, tile {20 * (read - opened):.2f} ms, "
        f"overview {1000 * (time.perf_counter() - read):.0f} ms"
    )
    assert (pyramid.width, pyramid.height, pyramid.levels) == (30_000, 30_000, 7)
    assert all(tile.shape == (TILE, TILE, 3) for tile in tiles)
    corner = vips.Image.jpegload(str(path)).crop(29_300, 29_300, 700, 700).numpy()
    np.testing.assert_array_equal(pyramid.region(29_300, 29_300, 30_000, 30_000), corner)
    assert seen.shape == (1024, 1024, 3)
    assert abs(float(seen.mean()) - 128) < 2
