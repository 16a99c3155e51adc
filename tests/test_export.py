"""Files that others read: every one is read back with somebody else's code and compared with the mask."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image
from pycocotools import mask as coco_mask

from hrsam import export
from hrsam.cutting import Cutting, Thing
from hrsam.data.annotations import read_instances
from hrsam.export import CleanUp, clean, coco_document, outlines, ring_area, write_cutout, write_mask
from hrsam.frame import Frame
from hrsam.mask import Mask
from hrsam.pyramid import InMemory
from hrsam.session import History
from tests.builders import photo, small_model

# pycocotools against a new NumPy
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
MASKS = arrays(bool, array_shapes(min_dims=2, max_dims=2, max_side=12))
DISC = np.hypot(*np.ogrid[-20:30, -30:40]) < 15
RING = DISC & ~(np.hypot(*np.ogrid[-20:30, -30:40]) < 6)


def thing(array, id=1, name="cup", colour="#112233"):
    frame = Frame(*array.shape, 64)
    return Thing(id, name, colour, frame, History().start_from(frame, Mask.of(array)))


def read_png(write, *arguments, **options):
    file = io.BytesIO()
    write(file, *arguments, **options)
    image = Image.open(io.BytesIO(file.getvalue()))
    return image.mode, np.array(image)


@settings(max_examples=60, deadline=None)
@given(MASKS, st.integers(1, 40), st.booleans())
def test_pngs_hold_the_mask_and_the_pixels(array, band, whole):
    pixels = photo(*array.shape)
    mask, pyramid = Mask.of(array), InMemory(pixels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "_BAND", band)
        mode, got = read_png(write_mask, mask)
        assert mode == "L"
        np.testing.assert_array_equal(got, array * np.uint8(255))
        if mask.bbox is None and not whole:
            with pytest.raises(ValueError, match="the mask is empty, there is nothing to cut out"):
                write_cutout(io.BytesIO(), mask, pyramid)
            return
        mode, got = read_png(write_cutout, mask, pyramid, whole=whole)
    x0, y0, x1, y1 = (0, 0, *array.shape[::-1]) if whole else mask.bbox
    want = np.dstack([pixels * array[..., None], array * np.uint8(255)])[y0:y1, x0:x1]
    assert mode == "RGBA"
    np.testing.assert_array_equal(got, want)


def rasterised(rings, height, width):
    parts = coco_mask.frPyObjects([ring.ravel().astype(float).tolist() for ring in rings], height, width)
    return coco_mask.decode(coco_mask.merge(parts)).astype(bool)


@settings(max_examples=300, deadline=None)
@given(MASKS)
def test_outlines_give_the_very_mask(array):
    import cv2

    rings = outlines(Mask.of(array))
    count, _ = cv2.connectedComponents(np.pad(~array, 1, constant_values=True).view(np.uint8), connectivity=8)
    has_hole = (
        count > 2
    )  # background that touches by corners only is one hole, as the object's pixels are not joined so
    assert (rings is None) == has_hole
    if rings:
        np.testing.assert_array_equal(rasterised(rings, *array.shape), array)
        assert sum(map(ring_area, rings)) == array.sum()
        assert min(map(ring_area, rings)) > 0
        for ring in rings:  # only corners
            assert (np.any(ring != np.roll(ring, 1, axis=0), axis=1)).all()
            along = np.roll(ring, -1, axis=0) - ring
            assert (along * np.roll(along, 1, axis=0) == 0).all()
    elif rings is not None:
        assert not array.any()


def test_pixels_that_touch_by_a_corner_have_outlines_of_their_own():
    rings = outlines(Mask.of(np.eye(2, dtype=bool)))
    assert sorted(ring.tolist() for ring in rings) == [
        [[0, 0], [1, 0], [1, 1], [0, 1]],
        [[1, 1], [2, 1], [2, 2], [1, 2]],
    ]


def test_a_tolerance_gives_fewer_corners_and_says_what_it_changed():
    exact, rough = outlines(Mask.of(DISC)), outlines(Mask.of(DISC), 1.0)
    assert len(rough[0]) < len(exact[0]) / 2
    near = rasterised(rough, *DISC.shape)
    assert (near & DISC).sum() / (near | DISC).sum() > 0.93
    line = np.zeros((9, 9), bool)
    line[4, 1:8] = True
    assert outlines(Mask.of(line), 3.0) == []
    entry = coco_document([thing(DISC)], "a.jpg", *DISC.shape, polygons=True, how=CleanUp(tolerance=1.0))[
        "annotations"
    ][0]
    assert entry["area"] == ring_area(rough[0])
    assert entry["attributes"]["area_change"] == entry["area"] - DISC.sum() != 0


def test_small_holes_are_filled_and_specks_dropped():
    array = np.zeros((20, 30), bool)
    array[2:12, 2:12] = True
    array[4:6, 4:6] = False  # a hole of 4
    array[8:10, 8:11] = False  # a hole of 6
    array[15, 20:23] = True  # a speck of 3
    array[16, 23] = True  # that touches it by a corner: 4 together
    array[0, 29] = True
    mask = Mask.of(array)

    def area(fill=0, drop=0):
        return clean(mask, CleanUp(fill=fill, drop=drop)).area - mask.area

    assert [area(fill=n) for n in (0, 1, 4, 5, 6, 7, 100)] == [0, 0, 0, 4, 4, 10, 10]
    assert [area(drop=n) for n in (0, 1, 2, 4, 5)] == [0, 0, -1, -1, -5]
    assert area(drop=10**6) == -mask.area
    both = clean(mask, CleanUp(fill=7, drop=5))
    want = np.zeros_like(array)
    want[2:12, 2:12] = True
    np.testing.assert_array_equal(both.array(), want)
    assert clean(Mask.empty(3, 3), CleanUp(9, 9)).area == 0


def test_a_bay_at_the_edge_is_no_hole():
    array = np.ones((6, 6), bool)
    array[0:2, 2:4] = False
    assert clean(Mask.of(array), CleanUp(fill=100)).area == array.sum()
    diagonal = np.ones((6, 6), bool)
    diagonal[0, 0] = diagonal[1, 1] = False  # joined by a corner only: the inner one is a hole of 1
    assert clean(Mask.of(diagonal), CleanUp(fill=2)).area == 35


@pytest.mark.parametrize("wrong", [{"fill": -1}, {"drop": -1}, {"tolerance": -0.5}, {"tolerance": float("nan")}])
def test_clean_up_refuses_negative_numbers(wrong):
    with pytest.raises(ValueError, match="at least 0"):
        CleanUp(**wrong)


@pytest.mark.parametrize("polygons", [False, True])
def test_coco_is_read_back_by_others(tmp_path, polygons):
    import json

    from pycocotools.coco import COCO

    things = [
        thing(DISC),
        thing(RING, 4, "ring", "#000000"),
        thing(np.zeros_like(DISC), 5),
        thing(~DISC & DISC[::-1], 7),
    ]
    path = tmp_path / "coco.json"
    path.write_text(json.dumps(coco_document(things, "a.jpg", *DISC.shape, polygons=polygons)))
    document = COCO(str(path))
    assert document.loadImgs([1])[0] == {"id": 1, "file_name": "a.jpg", "width": 70, "height": 50}
    assert [category["name"] for category in document.cats.values()] == ["cup", "ring"]
    annotations = document.loadAnns(document.getAnnIds())
    assert [(a["id"], a["category_id"], a["iscrowd"]) for a in annotations] == [(1, 1, 0), (4, 2, 0), (7, 1, 0)]
    for annotation, source in zip(annotations, (DISC, RING, ~DISC & DISC[::-1])):
        np.testing.assert_array_equal(document.annToMask(annotation).astype(bool), source)
        assert annotation["area"] == source.sum()
        rows, columns = np.nonzero(source)
        x, y, width, height = annotation["bbox"]
        assert (x, y, x + width, y + height) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert annotation["attributes"]["area_change"] == 0
    kinds = [isinstance(a["segmentation"], list) for a in annotations]
    assert kinds == ([True, False, True] if polygons else [False] * 3)  # a ring has a hole
    ours = read_instances(path)
    assert (len(ours.regions), ours.problems, ours.crowds) == (3, (), 0)


def test_the_objects_of_a_cutting():
    cutting = Cutting(small_model(), InMemory(photo(50, 70)), 64)
    cutting.apply({"do": "click", "object": 1, "x": 30, "y": 20})
    cutting.apply({"do": "add"})
    document = coco_document(cutting.objects.values(), "a.jpg", 50, 70, how=CleanUp(fill=30, drop=30))
    (annotation,) = document["annotations"]
    cleaned = clean(cutting.objects[1].mask, CleanUp(fill=30, drop=30))
    assert annotation["segmentation"] == cleaned.rle()
    assert annotation["attributes"]["area_change"] == cleaned.area - cutting.objects[1].mask.area
