"""Annotation files from strangers: every fault is named, nothing else than ValueError comes out, and the rest loads."""

import copy
import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hrsam import rle
from hrsam.data import annotations
from hrsam.data.datasets import check, open_dataset

WIDTH, HEIGHT = 16, 12
FORMATS = ("coco", "lvis", "coco_panoptic")
SQUARE = [2.0, 2.0, 9.0, 2.0, 9.0, 8.0, 2.0, 8.0]


def block(top, left, height=5, width=6):
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[top : top + height, left : left + width] = True
    return mask


def document(format_):
    """Three pictures with two objects each, as the JSON says it, and a crowd."""
    images = [{"id": 7 + i, "width": WIDTH, "height": HEIGHT} for i in range(3)]
    for image in images:
        name = f"{image['id']:06d}.png"
        image |= {"coco_url": f"http://example.org/val/{name}"} if format_ == "lvis" else {"file_name": name}
    categories = [{"id": 1, "name": "thing"}, {"id": 2, "name": "other"}]
    common = {"bbox": [2, 2, 7, 6], "area": 42.0}
    if format_ == "coco_panoptic":
        segments = [{"id": k, "category_id": 1 + k % 2, "iscrowd": k // 70000} | common for k in (300, 70001, 5)]
        marks = [
            {"image_id": image["id"], "file_name": image["file_name"], "segments_info": copy.deepcopy(segments)}
            for image in images
        ]
        return {"images": images, "categories": categories, "annotations": marks}
    compressed = rle.encode(block(3, 4))
    plain = {"size": [HEIGHT, WIDTH], "counts": [26, 5, 7, 5, WIDTH * HEIGHT - 43]}
    shapes = [[SQUARE], compressed, plain, [SQUARE, [10.5, 1, 14, 1, 12, 4.5]], [SQUARE], compressed]
    marks = [
        {"id": 100 + k, "image_id": 7 + k // 2, "category_id": 1 + k % 2, "segmentation": copy.deepcopy(shape)} | common
        for k, shape in enumerate(shapes)
    ]
    if format_ == "coco":
        marks = [mark | {"iscrowd": 0} for mark in marks]
        marks.append(marks[2] | {"id": 99, "iscrowd": 1})
    return {"images": images, "categories": categories, "annotations": marks}


def json_file(root, format_):
    return (
        root
        / {
            "coco": "annotations/instances_val.json",
            "lvis": "annotations/lvis_v1_val.json",
            "coco_panoptic": "annotations/panoptic_val.json",
        }[format_]
    )


def write(root, format_, content):
    """The set on disk; ``content`` is the document or the bytes of the JSON file."""
    for folder in ("val", "annotations/panoptic_val"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    labels = 300 * block(2, 2) + 70001 * block(8, 1, 3, 14) + 5 * block(0, 10, 6, 5)
    colours = np.stack([labels >> shift & 255 for shift in (0, 8, 16)], -1).astype(np.uint8)
    for i in (7, 8, 9):
        pixels = np.full((HEIGHT, WIDTH, 3), 20 * i, np.uint8)
        Image.fromarray(pixels).save(root / f"val/{i:06d}.png")
        if format_ == "coco_panoptic":
            Image.fromarray(colours).save(root / f"annotations/panoptic_val/{i:06d}.png")
    json_file(root, format_).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


def outcome(root, format_):
    """(names that load, everything that was complained about); asserts what must hold for any content."""
    try:
        dataset = open_dataset(format_, root)
    except ValueError as error:
        return [], sentence(error)
    problems = check(dataset, threads=1)
    listed = {problem.where for problem in problems}
    loaded, failed = [], []
    for item in dataset.items:
        try:
            sample = dataset.load(item)
        except ValueError as error:
            failed.append((item.name, sentence(error)))
            continue
        loaded.append(item.name)
        assert sample.mask.shape == sample.pixels.shape[:2]
        assert sample.mask.any()
    names = [item.name for item in dataset.items]
    assert len(set(names)) == len(names)
    assert [(p.where, p.text) for p in problems[len(dataset.problems) :]] == failed
    assert listed.isdisjoint(loaded)
    assert len(dataset.fingerprint()) == 64
    return loaded, "\n".join(f"{problem.where}: {problem.text}" for problem in problems)


def sentence(error):
    text = str(error)
    assert text.isprintable()
    assert len(text) < 1500
    return text


@pytest.mark.parametrize(("format_", "objects"), [("coco", 6), ("lvis", 6), ("coco_panoptic", 6)])
def test_a_sound_set_has_no_problems(tmp_path, format_, objects):
    write(tmp_path, format_, document(format_))
    names, complaints = outcome(tmp_path, format_)
    assert (len(names), complaints) == (objects, "")
    dataset = open_dataset(format_, json_file(tmp_path, format_))  # the file itself is a root too
    assert [item.name for item in dataset.items] == names
    assert dataset.expected is None
    crowds = {"coco": "1 crowd regions", "lvis": "0 crowd regions", "coco_panoptic": "3 crowd regions"}
    assert crowds[format_] in dataset.note


def test_masks_are_what_the_file_draws(tmp_path):
    write(tmp_path, "coco", document("coco"))
    dataset = open_dataset("coco", tmp_path)
    masks = {item.name: dataset.load(item).mask for item in dataset.items}
    assert list(masks)[:3] == ["coco/000007#100", "coco/000007#101", "coco/000008#102"]
    assert np.array_equal(masks["coco/000007#100"], block(2, 2, 6, 7))  # the square covers pixels 2…8, 2…7
    assert np.array_equal(masks["coco/000007#101"], block(3, 4))
    assert np.array_equal(masks["coco/000008#102"], block(2, 2, 5, 2))
    both = masks["coco/000008#103"]
    assert both[4, 4]
    assert both[2, 12]
    assert not both[3, 9]
    write(tmp_path, "coco_panoptic", document("coco_panoptic"))
    panoptic = open_dataset("coco_panoptic", tmp_path)
    assert [item.name for item in panoptic.items][:2] == ["coco_panoptic/000007#300", "coco_panoptic/000007#5"]
    assert np.array_equal(panoptic.load(panoptic.items[1]).mask, block(0, 10, 6, 5))


# ---------------------------------------------------------------- shapes, among them those that break pycocotools

FAR = 10.0**9
SHAPES = {
    "nan": ([[float("nan"), *SQUARE[1:]]], "NaN, infinite or huge"),
    "infinite": ([[float("inf"), *SQUARE[1:]]], "NaN, infinite or huge"),
    "huge float": ([[1e300, *SQUARE[1:]]], "NaN, infinite or huge"),
    "huge whole": ([[10**400, *SQUARE[1:]]], "NaN, infinite or huge"),
    "far": ([[FAR, *SQUARE[1:]]], "far outside"),
    "just too far": ([[-WIDTH - 1.0, *SQUARE[1:]]], "far outside"),
    "odd": ([SQUARE[:7]], "7 numbers"),
    "short": ([SQUARE[:4]], "4 numbers"),
    "no point": ([[]], "0 numbers"),
    "no polygon": ([], "no polygon"),
    "one sound, one short": ([SQUARE, SQUARE[:2]], "polygon 1 has 2 numbers"),
    "flat list": (SQUARE, "polygon 0 is 2.0"),
    "text": ([["2", *SQUARE[1:]]], "not a list of numbers"),
    "bool": ([[True, *SQUARE[1:]]], "not a list of numbers"),
    "point pairs": ([[[2, 2], [9, 2], [9, 8]]], "not a list of numbers"),
    "endless": ([[0, 0, 16, 12, 0, 12] * 400_000], "outline"),
    "without area": ([[3, 3, 3, 3, 3, 3]], "holds no object"),
    "outside": ([[-8, -8, -2, -8, -2, -2]], "holds no object"),
    "number": (5, "neither polygons nor run lengths"),
    "nothing": (None, "neither polygons nor run lengths"),
    "short runs": ({"size": [HEIGHT, WIDTH], "counts": [10, 5]}, "add up to 15"),
    "long runs": ({"size": [HEIGHT, WIDTH], "counts": [10, 150, 100]}, "add up to 260"),
    "negative runs": ({"size": [HEIGHT, WIDTH], "counts": [200, -8]}, "from 0 to"),
    "huge runs": ({"size": [HEIGHT, WIDTH], "counts": [10**30]}, "from 0 to"),
    "bool runs": ({"size": [HEIGHT, WIDTH], "counts": [True, 191]}, "neither a text nor"),
    "empty runs": ({"size": [HEIGHT, WIDTH], "counts": []}, "add up to 0"),
    "no counts": ({"size": [HEIGHT, WIDTH]}, "counts is nothing"),
    "swapped size": (rle.encode(block(3, 4).T), "12x16 pixels, the picture has 16x12"),
    "zero size": ({"size": [0, 0], "counts": "0"}, "0x0 pixels"),
    "absurd size": ({"size": [10**9, 10**9], "counts": [10**18]}, "the picture has 16x12"),
    "bool size": ({"size": [True, WIDTH], "counts": [192]}, "not [height, width]"),
    "no size": ({"counts": [192]}, "not [height, width]"),
    "cut text": ({"size": [HEIGHT, WIDTH], "counts": rle.encode(block(3, 4))["counts"][:-2]}, "add up to"),
    "endless number": ({"size": [HEIGHT, WIDTH], "counts": "o" * 30}, "cut off"),
    "foreign text": ({"size": [HEIGHT, WIDTH], "counts": "~~~~"}, "outside '0'"),
    "lone surrogate": ({"size": [HEIGHT, WIDTH], "counts": "\ud800"}, "outside '0'"),
    "empty text": ({"size": [HEIGHT, WIDTH], "counts": ""}, "add up to 0"),
    "no object": ({"size": [HEIGHT, WIDTH], "counts": [192]}, "holds no object"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_bad_shapes_are_listed_and_the_rest_loads(tmp_path, name):
    shape, text = SHAPES[name]
    content = document("coco")
    content["annotations"][1]["segmentation"] = shape
    write(tmp_path, "coco", content)
    names, complaints = outcome(tmp_path, "coco")
    assert [name[-3:] for name in names] == ["100", "102", "103", "104", "105"]
    assert text in complaints
    assert complaints.count("\n") == 0
    assert "101" in complaints


@pytest.mark.parametrize("reach", [WIDTH, -WIDTH])
def test_a_polygon_may_stand_out_of_its_picture(tmp_path, reach):
    content = document("coco")
    content["annotations"][0]["segmentation"] = [[4, 4, 8 + reach, 4, 8 + reach, 9, 4, 9]]
    write(tmp_path, "coco", content)
    names, complaints = outcome(tmp_path, "coco")
    assert (len(names), complaints) == (6, "")


# ---------------------------------------------------------------- entries

ENTRIES = {
    "bad id": ("annotations", {"id": "101"}, "id is '101', not a whole number"),
    "bool id": ("annotations", {"id": True}, "id is True"),
    "negative id": ("annotations", {"id": -1}, "id is -1"),
    "endless id": ("annotations", {"id": 10**400}, "not a whole number"),
    "duplicate id": ("annotations", {"id": 102}, "id 102 is used by 2 entries"),
    "unknown image": ("annotations", {"image_id": 1}, "image_id 1 is not among the images"),
    "unknown category": ("annotations", {"category_id": 3}, "category_id 3 is not among the categories"),
    "crowd as text": ("annotations", {"iscrowd": "0"}, "iscrowd is '0'"),
    "crowd as bool": ("annotations", {"iscrowd": False}, "iscrowd is False"),
    "box": ("annotations", {"bbox": [1, 2, 3]}, "bbox is a list of 3"),
    "box of NaN": ("annotations", {"bbox": [1, 2, 3, float("nan")]}, "bbox is a list of 4"),
    "area": ("annotations", {"area": "42"}, "area is '42'"),
    "image id": ("images", {"id": 7.0}, "id is 7.0"),
    "image used twice": ("images", {"id": 7}, "id 7 is used by 2 entries"),
    "no width": ("images", {"width": 0}, "width is 0"),
    "width as text": ("images", {"width": "16"}, "width is '16'"),
    "absurd picture": ("images", {"width": 10**8, "height": 10**8}, "is more than"),
    "swapped sizes": ("images", {"width": HEIGHT, "height": WIDTH}, "16x12"),
    "other size": ("images", {"width": WIDTH + 1}, "17x12"),
    "missing picture": ("images", {"file_name": "nowhere.png"}, "there is no file nowhere.png"),
    "climbing": ("images", {"file_name": "../outside.png"}, "not a plain path"),
    "climbing later": ("images", {"file_name": "a/../../outside.png"}, "not a plain path"),
    "climbing with backslashes": ("images", {"file_name": "..\\outside.png"}, "not a plain path"),
    "absolute": ("images", {"file_name": "/etc/passwd"}, "not a plain path"),
    "drive": ("images", {"file_name": "C:/outside.png"}, "not a plain path"),
    "NUL": ("images", {"file_name": "a\0.png"}, "is no file name"),
    "lone surrogate": ("images", {"file_name": "\ud800.png"}, "is no file name"),
    "long name": ("images", {"file_name": "a" * 5000}, "is no file name"),
    "longer than files may be": ("images", {"file_name": "a" * 400}, "'a"),
    "a folder": ("images", {"file_name": "val"}, "there is no file val"),
    "empty name": ("images", {"file_name": ""}, "file_name is ''"),
    "name as list": ("images", {"file_name": ["000008.png"]}, "file_name is a list of 1"),
    "through a link": ("images", {"file_name": "link.png"}, "leads out of the data set's folder"),
    "through a linked folder": ("images", {"file_name": "far/outside.png"}, "leads out of the data set's folder"),
    "round a link": ("images", {"file_name": "loop.png"}, "loop.png"),
    "category id": ("categories", {"id": None}, "id is nothing"),
    "category name": ("categories", {"name": 5}, "name is 5"),
    "category twice": ("categories", {"id": 1}, "id 1 is used by 2 entries"),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_bad_entries_are_listed_and_the_rest_loads(tmp_path, name):
    table, change, text = ENTRIES[name]
    root = tmp_path / "root"
    content = document("coco")
    content[table][1] |= change
    write(root, "coco", content)
    Image.fromarray(np.zeros((HEIGHT, WIDTH, 3), np.uint8)).save(tmp_path / "outside.png")
    (root / "val/link.png").symlink_to(tmp_path / "outside.png")
    (root / "val/far").symlink_to(tmp_path)
    (root / "val/loop.png").symlink_to(root / "val/loop.png")
    names, complaints = outcome(root, "coco")
    assert text in complaints
    expected = {"annotations": 5, "images": 4, "categories": 3}[table]
    if "used by" in text:
        expected = {"annotations": 4, "images": 2, "categories": 0}[table]
    assert len(names) == expected


def test_a_link_within_the_root_is_followed(tmp_path):
    write(tmp_path, "coco", document("coco"))
    (tmp_path / "val").rename(tmp_path / "elsewhere")
    (tmp_path / "val").symlink_to(tmp_path / "elsewhere")
    assert len(outcome(tmp_path, "coco")[0]) == 6


def test_lvis_pictures_are_found_by_url_and_names_in_it_are_checked(tmp_path):
    content = document("lvis")
    content["images"][0]["coco_url"] = "http://example.org/../secret.png"
    content["images"][1] |= {"file_name": "ignored.png"}
    del content["images"][2]["coco_url"]
    content["images"][2]["file_name"] = "val/000009.png"
    write(tmp_path, "lvis", content)
    names, complaints = outcome(tmp_path, "lvis")
    assert [name.split("#")[0] for name in names] == ["lvis/000008"] * 2 + ["lvis/000009"] * 2
    assert "image 7: '../secret.png' is not a plain path" in complaints


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe\xfa", "not JSON"),
        (b'{"images": [', "damaged or cut off"),
        (b"[" * 200_000, "nested too deeply"),
        (b"[1, 2]", "holds a list of 2"),
        (b'{"images": [], "annotations": {}, "categories": []}', "an object of 0 for annotations, not a list"),
        (b'{"images": [], "annotations": []}', "nothing for categories, not a list"),
        (b'{"images": ' + b"9" * 5000 + b"}", ""),
    ],
    ids=["empty", "no text", "cut", "deep", "list", "object", "no categories", "digits"],
)
def test_a_file_that_is_no_annotation_file_is_one_error(tmp_path, format_, raw, text):
    write(tmp_path, format_, raw)
    with pytest.raises(ValueError) as caught:
        open_dataset(format_, tmp_path)
    assert text in sentence(caught.value)


def test_json_over_the_limit_is_not_read(tmp_path, monkeypatch):
    write(tmp_path, "coco", document("coco"))
    monkeypatch.setattr(annotations, "MAX_JSON_BYTES", 100)
    with pytest.raises(ValueError, match=r"the limit is 100; split it"):
        open_dataset("coco", tmp_path)


def test_several_annotation_files(tmp_path):
    write(tmp_path, "coco", document("coco"))
    shutil.copy(tmp_path / "annotations/instances_val.json", tmp_path / "annotations/instances_train.json")
    assert len(open_dataset("coco", tmp_path).items) == 6  # val goes before
    shutil.copy(tmp_path / "annotations/instances_val.json", tmp_path / "annotations/instances_val2.json")
    with pytest.raises(ValueError, match="several annotation files"):
        open_dataset("coco", tmp_path)
    with pytest.raises(ValueError, match="expected COCO panoptic"):
        open_dataset("coco_panoptic", tmp_path)


# ---------------------------------------------------------------- panoptic maps


def panoptic_png(root, change):
    path = root / "annotations/panoptic_val/000008.png"
    pixels = np.array(Image.open(path))
    Image.fromarray(change(pixels)).save(path)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda p: p * (p != 5), "lacks 5"),
        (lambda p: np.where(p.any(2, keepdims=True), p, np.uint8(9)), "holds unlisted 592137;"),
        (lambda p: p[:-1], "is 16x11 and its picture 16x12"),
        (lambda p: np.dstack([p, np.full(p.shape[:2], 128, np.uint8)]), "no 8-bit RGB PNG"),
    ],
    ids=["lacks", "unlisted", "size", "alpha"],
)
def test_a_map_that_does_not_fit_its_entry(tmp_path, change, text):
    write(tmp_path, "coco_panoptic", document("coco_panoptic"))
    panoptic_png(tmp_path, change)
    names, complaints = outcome(tmp_path, "coco_panoptic")
    assert len(names) == 4
    assert complaints.count(text) == 2


@pytest.mark.parametrize(
    ("key", "value", "text", "left"),
    [
        ("file_name", "../000008.png", "not a plain path", 4),
        ("file_name", "no.png", "there is no file no.png", 4),
        ("segments_info", {}, "segments_info is an object of 0, not a list", 4),
        ("image_id", 9, "image_id 9 is used by 2 entries", 2),
        ("segments_info", [{"id": 300, "category_id": 1}] * 2, "id 300 is used by 2 entries", 4),
        ("segments_info", [{"id": 0, "category_id": 1}], "id is 0", 4),
        ("segments_info", [{"id": 2**24, "category_id": 1}], "id is 16777216", 4),
        ("segments_info", [3], "is 3, not an object", 4),
        ("segments_info", [], "lists no segment", 4),
    ],
)
def test_bad_entries_of_a_panoptic_file(tmp_path, key, value, text, left):
    content = document("coco_panoptic")
    content["annotations"][1][key] = value
    write(tmp_path, "coco_panoptic", content)
    names, complaints = outcome(tmp_path, "coco_panoptic")
    assert text in complaints
    assert len(names) == left


# ---------------------------------------------------------------- a generator of damaged sets

WEIRD = (None, True, "7", "", [], {}, [1], [[]], 1.5, -1, float("nan"), float("-inf"), 10**30, "../x", {"id": 1})
CHECKED = {
    "images": ("id", "width", "height", "file_name", "coco_url"),
    "categories": ("id", "name"),
    "annotations": ("id", "image_id", "category_id", "segmentation", "file_name", "segments_info"),
}
OPTIONAL = ("iscrowd", "bbox", "area")


def entry_of(content, dice):
    table = dice.choice(list(CHECKED))
    return table, dice.choice(content[table])


def drop(content, root, dice):
    table, entry = entry_of(content, dice)
    del entry[dice.choice([key for key in CHECKED[table] if key in entry])]


def retype(content, root, dice):
    table, entry = entry_of(content, dice)
    key = dice.choice([key for key in (*CHECKED[table], *OPTIONAL) if key in entry])
    values = [v for v in WEIRD if not (key == "area" and v == 1.5) and not (key == "name" and type(v) is str and v)]
    entry[key] = dice.choice(values)


def repeat(content, root, dice):
    table = dice.choice(list(CHECKED))
    content[table].append(copy.deepcopy(dice.choice(content[table])))


def replace_entry(content, root, dice):
    table = content[dice.choice(list(CHECKED))]
    table[dice.randrange(len(table))] = dice.choice([v for v in WEIRD if v != {"id": 1}])


def replace_table(content, root, dice):
    content[dice.choice(list(CHECKED))] = dice.choice([v for v in WEIRD if type(v) is not list])


def bad_shape(content, root, dice):
    marks = [mark for mark in content["annotations"] if "segmentation" in mark and not mark.get("iscrowd")]
    name = dice.choice([name for name in SHAPES if name != "endless"])
    dice.choice(marks)["segmentation"] = copy.deepcopy(SHAPES[name][0])


def swap_sizes(content, root, dice):
    entry = dice.choice(content["images"])
    entry["width"], entry["height"] = entry["height"], entry["width"]


def cut_json(content, root, dice):
    raw = json.dumps(content).encode()
    return raw[: dice.randrange(len(raw))]


def remove_file(content, root, dice):
    dice.choice(pngs(root)).unlink()


def cut_png(content, root, dice):
    path = dice.choice(pngs(root))
    path.write_bytes(path.read_bytes()[: dice.randrange(40)])


def resize_png(content, root, dice):
    path = dice.choice(pngs(root))
    with Image.open(path) as image:
        image.resize((WIDTH, HEIGHT + 1), Image.Resampling.NEAREST).save(path)


def flip_bytes(content, root, dice):
    """Perhaps harmless."""
    path = dice.choice(pngs(root))
    raw = bytearray(path.read_bytes())
    for _ in range(dice.randint(1, 8)):
        raw[dice.randrange(len(raw))] ^= 1 << dice.randrange(8)
    path.write_bytes(raw)


def flip_json(content, root, dice):
    """Perhaps harmless."""
    raw = bytearray(json.dumps(content).encode())
    for _ in range(dice.randint(1, 4)):
        raw[dice.randrange(len(raw))] ^= 1 << dice.randrange(8)
    return bytes(raw)


def anything(content, root, dice):
    """Any value of the tree becomes another; perhaps harmless."""
    at = content
    while True:
        keys = list(at) if isinstance(at, dict) else range(len(at))
        key = dice.choice(list(keys))
        if not isinstance(at[key], (dict, list)) or not at[key] or dice.random() < 0.1:
            break
        at = at[key]
    at[key] = copy.deepcopy(dice.choice(WEIRD))


PLANTED = (
    drop, retype, repeat, replace_entry, replace_table, bad_shape, swap_sizes, cut_json, remove_file, cut_png, resize_png
)  # fmt: skip
HARMLESS = (flip_bytes, flip_json, anything)


def pngs(root):
    return sorted(root.rglob("*.png"))


def damaged_sets(tmp_path, count, first=0):
    """How often each mutation was made and each end came, over ``count`` sets with one seeded mutation or two."""
    tally = {}
    for seed in range(first, first + count):
        dice = random.Random(seed)
        format_ = dice.choice(FORMATS)
        root = tmp_path / str(seed)
        content = document(format_)
        write(root, format_, content)
        mutation = dice.choice([m for m in PLANTED + HARMLESS if m is not bad_shape or format_ != "coco_panoptic"])
        raw = mutation(content, root, dice)
        hidden = raw is None and mutation is not replace_table and dice.random() < 0.2
        if hidden:  # a second fault may undo the first
            anything(content, root, dice)
        json_file(root, format_).write_bytes(raw if raw is not None else json.dumps(content).encode())
        names, complaints = outcome(root, format_)
        if mutation in PLANTED and not hidden:
            assert complaints, f"seed {seed}: {mutation.__name__} in {format_} was not reported"
        tally[mutation.__name__] = tally.get(mutation.__name__, 0) + 1
        end = "refused whole" if not names else "partly used" if complaints else "unharmed"
        tally[end] = tally.get(end, 0) + 1
        shutil.rmtree(root)
    return tally


def test_damaged_sets(tmp_path):
    tally = damaged_sets(tmp_path, 40)
    assert sum(tally.get(mutation.__name__, 0) for mutation in PLANTED + HARMLESS) == 40


@pytest.mark.slow
def test_a_thousand_damaged_sets(tmp_path):
    tally = damaged_sets(tmp_path, 1000, first=1000)
    print(tally)
    assert all(tally.get(mutation.__name__, 0) > 20 for mutation in PLANTED + HARMLESS)
    assert tally["partly used"] > 300


def test_names_do_not_depend_on_the_machine(tmp_path):
    write(tmp_path / "a", "coco", document("coco"))
    write(tmp_path / "b/c", "coco", document("coco"))
    one, other = open_dataset("coco", tmp_path / "a"), open_dataset("coco", Path(os.path.relpath(tmp_path / "b/c")))
    assert one.fingerprint() == other.fingerprint()
    assert str(tmp_path) not in "".join(item.name for item in one.items)
    content = document("coco")
    content["annotations"][0]["segmentation"][0][0] += 1
    write(tmp_path / "a", "coco", content)
    assert open_dataset("coco", tmp_path / "a").fingerprint() != other.fingerprint()
