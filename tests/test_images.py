"""Pictures of every kind in, golden pixels out; whatever is broken leaves as one sentence."""

import io
import os
import struct
import warnings
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from hrsam import images
from hrsam.images import PictureError, read_image, read_labels, read_mask, write_png

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)
GREY16 = RNG.integers(0, 65536, (6, 9)).astype(np.uint16)


def encoded(array_or_image, kind="PNG", **options) -> bytes:
    file = io.BytesIO()
    image = array_or_image if isinstance(array_or_image, Image.Image) else Image.fromarray(array_or_image)
    image.save(file, kind, **options)
    return file.getvalue()


def png(width, height, depth=8, colour=2, rows=b"", extra=b"") -> bytes:
    """A PNG by hand: the header may say what no writer would; ``extra`` stands before the pixels."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    extra = chunk(extra[:4], extra[4:]) if extra else b""
    return b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def png_rows(values) -> bytes:
    return b"".join(b"\0" + row.tobytes() for row in values)


def grey(values) -> np.ndarray:
    return np.repeat(np.asarray(values, np.uint8)[..., None], 3, axis=2)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "WEBP"])
def test_eight_bit_colour_is_exact_from_every_kind_of_source(tmp_path, kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    path = tmp_path / "picture.jpg"  # the name lies, the content counts
    path.write_bytes(encoded(RGB, kind, **options))
    with path.open("rb") as file:
        for source in (path, str(path), path.read_bytes(), file):
            picture = read_image(source)
            np.testing.assert_array_equal(picture.pixels, RGB)
            assert picture.notes == ()
            assert picture.pixels.flags.writeable


def test_jpeg_colour():
    flat = np.full((16, 16, 3), (200, 40, 90), np.uint8)
    assert np.abs(read_image(encoded(flat, "JPEG", quality=95)).pixels.astype(int) - flat).max() <= 3


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize(
    ("shape", "long_side", "scale"),
    [((300, 401), 200, 2), ((403, 302), 200, 2), ((300, 401), 201, 1), ((643, 803), 100, 8), ((645, 797), 100, 4),
     ((7, 900), 100, 4), ((2, 900), 500, 1)],
)  # fmt: skip
def test_large_jpegs_come_smaller_and_in_place(shape, long_side, scale, orientation):
    """As what averaging makes of the whole picture, to the edges; ``size`` stays the file's."""
    height, width = shape
    y, x = np.mgrid[:height, :width] / max(shape)
    waves = [127 + 100 * np.sin(8 * x + 5 * y), 127 + 100 * np.cos(6 * y), 255 * x / x.max()]
    pixels = np.stack(waves, 2).astype(np.uint8)
    exif = Image.Exif()
    exif[274] = orientation
    data = encoded(np.rot90(pixels, {1: 0, 3: 2, 6: 1}[orientation]), "JPEG", quality=95, subsampling=0, exif=exif)
    picture = read_image(data, long_side=long_side)
    assert picture.size == shape
    assert ("1/" in str(picture.notes)) == (scale > 1)
    assert all(abs(got - full / scale) <= 0.5 for got, full in zip(picture.pixels.shape, shape))
    assert max(picture.pixels.shape) >= min(long_side, max(shape))
    want = cv2.resize(pixels, picture.pixels.shape[1::-1], interpolation=cv2.INTER_AREA)
    off = np.abs(picture.pixels.astype(int) - want)
    assert off.mean() < 2
    assert off.max() <= 10  # half a pixel beside its place, at the far edge
    assert np.array_equal(read_image(data).pixels.shape, (*shape, 3))
    with pytest.raises(PictureError, match="cannot be read"):
        read_image(data[: len(data) // 2], long_side=long_side)


def test_other_kinds_come_whole():
    large = RNG.integers(0, 256, (40, 50, 3), dtype=np.uint8)
    for kind in ("PNG", "BMP", "TIFF"):
        picture = read_image(encoded(large, kind), long_side=10)
        np.testing.assert_array_equal(picture.pixels, large)
        assert (picture.size, picture.notes) == ((40, 50), ())


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1)])
def test_thin_pictures(shape):
    pixels = RNG.integers(0, 256, (*shape, 3), dtype=np.uint8)
    np.testing.assert_array_equal(read_image(encoded(pixels)).pixels, pixels)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(kind, orientation):
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16] = (255, 0, 0)  # top left
    upright[:8, 16:] = (0, 255, 0)  # top right
    upright[8:, :16] = (0, 0, 255)  # bottom left
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),  # to be turned clockwise by whoever shows it
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    picture = read_image(encoded(np.ascontiguousarray(stored), kind, exif=exif, **options))
    assert picture.pixels.shape == upright.shape
    assert picture.size == upright.shape[:2]
    assert np.abs(picture.pixels.astype(int) - upright).max() <= 4
    assert picture.notes == ((f"EXIF orientation {orientation} applied",) if orientation > 1 else ())


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_uses_the_full_range(kind):
    picture = read_image(encoded(GREY16, kind))
    np.testing.assert_array_equal(picture.pixels, grey(np.rint(GREY16 / 257)))
    assert picture.notes == (f"16-bit grey scaled by 255/65535, brightest value {GREY16.max()}",)


def test_dark_sixteen_bit_is_not_stretched_but_said():
    picture = read_image(encoded(np.full((3, 3), 4095, np.uint16)))
    assert (picture.pixels == 16).all()
    assert "brightest value 4095" in picture.notes[0]


def test_sixteen_bit_tiff_with_white_as_zero_is_inverted():
    data = encoded(GREY16, "TIFF", tiffinfo={262: 0})
    np.testing.assert_array_equal(read_image(data).pixels, grey(np.rint((65535 - GREY16.astype(float)) / 257)))


@pytest.mark.parametrize("extension", [".png", ".tiff"])
def test_sixteen_bit_colour_keeps_the_high_byte(extension):
    bgr = RNG.integers(0, 65536, (5, 7, 3)).astype(np.uint16)
    picture = read_image(cv2.imencode(extension, bgr)[1].tobytes())
    np.testing.assert_array_equal(picture.pixels, bgr[..., ::-1] >> 8)
    assert picture.notes == ("16-bit colour cut to its high bytes",)


def test_integers_and_floats_are_stretched():
    values = np.array([[-100, 20], [50, 100]])
    expected = grey([[0, 153], [191, 255]])  # 191.25
    for dtype in (np.int32, np.float32):
        picture = read_image(encoded(values.astype(dtype), "TIFF"))
        np.testing.assert_array_equal(picture.pixels, expected)
        assert picture.notes == ("values from -100 to 100 stretched to 0…255",)
    unit = read_image(encoded(np.array([[0.0, 0.25, 0.5]], np.float32), "TIFF"))
    np.testing.assert_array_equal(unit.pixels, grey([[0, 64, 128]]))
    assert (read_image(encoded(np.full((2, 2), 7.0, np.float32), "TIFF")).pixels == 0).all()


def test_unsigned_32_bit_does_not_wrap():
    image = Image.fromarray(np.array([[0, -1]], np.int32))  # -1 has the bits of the largest unsigned number
    data = bytearray(encoded(image, "TIFF"))
    entry = data.index(struct.pack("<HHI", 339, 3, 1))  # sample format: 2 signed, 1 unsigned
    data[entry + 8] = 1
    np.testing.assert_array_equal(read_image(bytes(data)).pixels, grey([[0, 255]]))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_floats_that_are_no_numbers_are_refused(bad):
    data = encoded(np.array([[0.0, bad]], np.float32), "TIFF")
    for read in (read_image, read_mask):
        with pytest.raises(PictureError, match="NaN or infinite"):
            read(data)


def test_alpha_is_composited_on_white():
    rgba = np.dstack([RGB, RNG.integers(0, 256, RGB.shape[:2], dtype=np.uint8)])
    alpha = rgba[..., 3:] / 255
    picture = read_image(encoded(rgba))
    assert np.abs(picture.pixels - (RGB * alpha + 255 * (1 - alpha))).max() <= 1
    assert picture.notes == ("alpha composited on white",)
    rgba[..., 3] = 255
    opaque = read_image(encoded(rgba))
    np.testing.assert_array_equal(opaque.pixels, RGB)
    assert opaque.notes == ()


def test_every_way_to_be_transparent_turns_white():
    black = np.zeros((2, 2), np.uint8)
    half = black.copy()
    half[0] = 90
    palette = Image.fromarray(half).convert("P")
    sixteen = np.array([[0, 5000]], ">u2")
    cases = {
        "grey with alpha": (encoded(Image.merge("LA", [Image.fromarray(half), Image.fromarray(black)])), 255),
        "transparent palette entry": (
            encoded(palette, transparency=int(np.asarray(palette)[1, 0])),
            [[90, 90], [255] * 2],
        ),
        "grey key": (encoded(half, transparency=0), [[90, 90], [255, 255]]),
        "one-bit key": (encoded(Image.fromarray(half > 0), transparency=0), 255),
        "two-bit key": (png(4, 1, 2, 0, b"\0\x1b", b"tRNS\0\1"), [[0, 255, 170, 255]]),
        "sixteen-bit key": (png(2, 1, 16, 0, png_rows(sixteen), b"tRNS\0\0"), [[255, 19]]),
    }
    for name, (data, expected) in cases.items():
        picture = read_image(data)
        np.testing.assert_array_equal(picture.pixels[..., 0], np.broadcast_to(expected, picture.pixels.shape[:2]), name)
        assert "alpha composited on white" in picture.notes, name


def test_sixteen_bit_colour_key_is_ignored_aloud():
    picture = read_image(png(1, 1, 16, 2, png_rows(np.array([[1, 2, 3]], ">u2")), b"tRNS\0\1\0\2\0\3"))
    assert (picture.pixels == 0).all()
    assert "transparent 16-bit key colour ignored" in picture.notes


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])  # Pillow writes, and Adobe means, inverted values in JPEG
def test_cmyk(kind):
    flat = Image.new("RGB", (16, 16), (200, 40, 90)).convert("CMYK")
    picture = read_image(encoded(flat, kind))
    assert np.abs(picture.pixels.astype(int) - (200, 40, 90)).max() <= 4
    assert picture.notes == ("CMYK converted without a colour profile",)


@pytest.mark.parametrize("kind", ["TIFF", "PNG", "WEBP"])
def test_first_of_several_frames(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    other = Image.fromarray(255 - RGB)
    picture = read_image(encoded(RGB, kind, save_all=True, append_images=[other, other], **options))
    np.testing.assert_array_equal(picture.pixels, RGB)
    assert picture.notes == ("first of several frames",)


def test_bands_meet(monkeypatch):
    monkeypatch.setattr(images, "_BAND", 20)  # two rows at a time
    np.testing.assert_array_equal(read_image(encoded(RGB)).pixels, RGB)
    np.testing.assert_array_equal(read_image(encoded(GREY16)).pixels, grey(np.rint(GREY16 / 257)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP"])
def test_probe_reads_the_header_alone(tmp_path, kind):
    data = encoded(RGB, kind)
    (tmp_path / "picture").write_bytes(data)
    for source in (data, tmp_path / "picture", str(tmp_path / "picture")):
        assert images.probe(source) == (kind, 9, 6)
    for source, message in ((b"", "empty"), (b"<svg/>", "not a JPEG"), (tmp_path / "missing", "no such file")):
        with pytest.raises(PictureError, match=message):
            images.probe(source)
    assert images.probe(png(30_000, 30_000)) == ("PNG", 30_000, 30_000)


def test_budget_is_checked_before_decoding():
    bomb = png(30_000, 30_000)  # 900 megapixels in 70 bytes, without a single row: decoding would say "truncated"
    with pytest.raises(PictureError, match=r"30000x30000 is 900 megapixels, the limit is 400; shrink .* max_pixels"):
        read_image(bomb)
    data = encoded(RGB)
    assert read_image(data, max_pixels=54).pixels.shape == RGB.shape
    for read in (read_image, read_labels, read_mask):
        with pytest.raises(PictureError, match="9x6"):
            read(data, max_pixels=53)


def test_pillows_global_limit_is_lifted_for_large_tiffs_and_put_back(monkeypatch):
    monkeypatch.setattr(images, "_PILLOW_LIMIT", 10)
    monkeypatch.setattr(images, "_BAND", 9)  # bands stay below the limit, as they do with the true numbers
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    np.testing.assert_array_equal(read_image(encoded(RGB, "TIFF")).pixels, RGB)
    with pytest.raises(PictureError):
        read_image(encoded(RGB, "TIFF")[:-20])
    assert Image.MAX_IMAGE_PIXELS == 10


def test_refusals_are_one_sentence(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("not a picture at all")
    (tmp_path / "drawing.png").write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    (tmp_path / "animation.png").write_bytes(encoded(RGB, "GIF"))
    (tmp_path / "zero.png").write_bytes(png(0, 5))
    os.mkfifo(tmp_path / "pipe.png")
    cases = {
        "empty.png": "the file is empty",
        "text.jpg": r"not a JPEG, PNG, WebP, TIFF or BMP picture \(begins with b'not a pi'\)",
        "drawing.png": "not a JPEG",
        "animation.png": "not a JPEG",
        "zero.png": "cannot be read",
        "pipe.png": "not a file",
        "": "not a file",
        "nowhere.png": "no such file",
    }
    for name, words in cases.items():
        with pytest.raises(PictureError, match=words) as caught:
            read_image(tmp_path / name)
        assert str(caught.value).startswith(str(tmp_path / name))
        assert "\n" not in str(caught.value)
    with pytest.raises(PictureError, match="got ndarray; give a path"):
        read_image(RGB)
    with pytest.raises(PictureError, match="got StringIO; give a path, bytes or a file opened in binary"):
        read_image(io.StringIO("text"))


def test_locked_file(tmp_path, monkeypatch):
    path = tmp_path / "locked.png"
    path.write_bytes(encoded(RGB))

    def refuse(*_, **__):  # the tests may run as root, whom no mode stops
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(PictureError, match=r"cannot be opened \(Permission denied\)"):
        read_image(path)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP"])
def test_damaged_files_raise_nothing_else(kind):
    """Cut in half: refused.  Bytes changed at random: refused or read, never another exception."""
    noise = RNG.integers(0, 256, (40, 50, 3), dtype=np.uint8)
    data = encoded(noise, kind)
    with pytest.raises(PictureError):
        read_image(data[: len(data) // 2])
    refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in range(60):
            rng = np.random.default_rng(seed)
            broken = np.frombuffer(data, np.uint8).copy()
            spots = rng.integers(0, len(data) if seed % 2 else 200, 6)
            broken[spots] = rng.integers(0, 256, 6)
            try:
                assert read_image(broken.tobytes(), max_pixels=100_000).pixels.dtype == np.uint8
            except PictureError:
                refused += 1
    assert refused  # the changes do reach the decoder


def test_labels_keep_their_values():
    ids = np.array([[0, 1], [2, 3]], np.uint8)
    indexed = Image.fromarray(ids).convert("P")
    indexed.putpalette([255, 255, 255, 0, 0, 0, 9, 9, 9, 0, 0, 7])
    np.testing.assert_array_equal(read_labels(encoded(indexed)), np.asarray(indexed))
    np.testing.assert_array_equal(read_labels(encoded(ids)), ids)
    np.testing.assert_array_equal(read_labels(encoded(ids == 2)), ids == 2)
    np.testing.assert_array_equal(read_labels(encoded(GREY16)), GREY16)
    np.testing.assert_array_equal(read_labels(encoded(ids.astype(np.int32) - 2, "TIFF")), ids.astype(int) - 2)
    np.testing.assert_array_equal(read_labels(encoded(RGB)), RGB.max(axis=2))
    rgba = np.dstack([RGB, (RGB[..., 0] > 100).astype(np.uint8)])
    np.testing.assert_array_equal(read_labels(encoded(rgba)), RGB.max(axis=2) * rgba[..., 3])


def test_mask_rules():
    values = np.array([[0, 1], [127, 128]], np.uint8)
    np.testing.assert_array_equal(read_mask(encoded(values)), values > 0)
    np.testing.assert_array_equal(read_mask(encoded(values), threshold=127), values > 127)
    np.testing.assert_array_equal(read_mask(encoded(values.astype(np.uint16) * 256), threshold=256), values > 1)
    assert read_mask(encoded(values)).dtype == bool


def test_masks_that_would_be_read_wrongly_are_refused():
    with pytest.raises(PictureError, match="16-bit colour"):
        read_mask(cv2.imencode(".png", np.ones((2, 2, 3), np.uint16))[1].tobytes())
    with pytest.raises(PictureError, match="CMYK"):
        read_mask(encoded(Image.new("CMYK", (8, 8)), "JPEG"))


def test_written_masks_and_pictures_come_back(tmp_path):
    mask = RNG.random((30, 40)) < 0.5
    write_png(tmp_path / "mask.png", mask)
    with Image.open(tmp_path / "mask.png") as image:
        assert image.mode == "L"
        assert set(np.unique(np.asarray(image))) == {0, 255}
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png"), mask)
    write_png(tmp_path / "picture.PNG", RGB[:, ::-1])
    np.testing.assert_array_equal(read_image(tmp_path / "picture.PNG").pixels, RGB[:, ::-1])
    write_png(tmp_path / "cut.png", np.dstack([RGB, RGB[..., :1]]))
    with Image.open(tmp_path / "cut.png") as image:
        assert image.mode == "RGBA"
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("step", ["os.fsync", "os.replace", "PIL.Image.Image.save"])
def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch, step):
    write_png(tmp_path / "mask.png", np.ones((4, 4), bool))

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(step, full)
        with pytest.raises(OSError, match="No space"):
            write_png(tmp_path / "mask.png", np.zeros((4, 4), bool))
    assert [p.name for p in tmp_path.iterdir()] == ["mask.png"]
    assert read_mask(tmp_path / "mask.png").all()


def test_write_refuses_what_png_cannot_hold(tmp_path):
    with pytest.raises(ValueError, match=r"end it in \.png"):
        write_png(tmp_path / "mask.jpg", np.ones((2, 2), bool))
    for array in (np.ones((2, 2)), np.ones((2, 2, 2), np.uint8), np.ones(4, bool), np.ones((0, 2), bool)):
        with pytest.raises(ValueError, match="got"):
            write_png(tmp_path / "mask.png", array)
    assert not list(tmp_path.iterdir())
