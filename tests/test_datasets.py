"""Data sets of the evaluation: each in miniature, in its real layout, made here."""

import os
import pickle
import sys

import numpy as np
import pytest
from PIL import Image

from hrsam.data import datasets, sbd
from hrsam.data.datasets import DATASETS, Problem, check, open_dataset
from hrsam.data.folders import index_masks, inside

HEIGHT, WIDTH = 12, 18


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8)).save(path, **options)


def photo(path, height=HEIGHT, width=WIDTH, value=90):
    save(path, np.full((height, width, 3), value))


def box(top=3, left=4, height=5, width=6, value=1):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[top : top + height, left : left + width] = value
    return mask


def names(dataset):
    return [item.name for item in dataset.items]


def masks(dataset):
    return [dataset.load(item).mask for item in dataset.items]


def lines(problems):
    return [f"{problem.where}: {problem.text}" for problem in problems]


# ---------------------------------------------------------------- DAVIS


def focuscut(root):
    """Two frames as FocusCut has them: 1 is object, 255 void."""
    for stem, labels in (("bear_00012", box() + box(9, 0, 2, 2, 255)), ("ant_00001", box(1, 1))):
        photo(root / "img" / f"{stem}.jpg")
        save(root / "gt" / f"{stem}#001.png", labels)
    return root


def test_davis_as_focuscut_has_it(tmp_path):
    focuscut(tmp_path / "DAVIS")
    for root in (tmp_path, tmp_path / "DAVIS", str(tmp_path)):
        dataset = open_dataset("davis", root)
        assert names(dataset) == ["davis/ant_00001", "davis/bear_00012"]
        assert (dataset.name, dataset.expected, dataset.problems) == ("davis", 345, ())
        assert "255 (void) background" in dataset.note
        assert {item.group for item in dataset.items} == {"davis"}
        assert np.array_equal(masks(dataset)[1], box() > 0)
    sample = dataset.load(dataset.items[1])
    assert (sample.name, sample.dataset, sample.ignore) == ("davis/bear_00012", "davis", None)
    assert sample.pixels.shape == (HEIGHT, WIDTH, 3)
    assert check(dataset) == ()


def test_davis_as_ritm_has_it(tmp_path):
    photo(tmp_path / "img/goat.jpg")
    colour = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    colour[..., 1] = box(value=128)  # several objects in several colours count as one
    colour[..., 2] = box(0, 0, 2, 2, 64)
    save(tmp_path / "gt/goat.png", colour)
    dataset = open_dataset("davis", tmp_path)
    assert names(dataset) == ["davis/goat"]
    assert np.array_equal(masks(dataset)[0], box() | box(0, 0, 2, 2) > 0)


def test_davis_palette_masks_are_read_by_index(tmp_path):
    photo(tmp_path / "img/goat.jpg")
    image = Image.fromarray(box() + box(9, 0, 2, 2, 2))
    image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    (tmp_path / "gt").mkdir()
    image.save(tmp_path / "gt/goat.png")
    assert np.array_equal(masks(open_dataset("davis", tmp_path))[0], box() > 0)


def test_a_soft_mask_that_happens_to_hold_a_one_is_refused(tmp_path):
    photo(tmp_path / "img/goat.jpg")
    save(tmp_path / "gt/goat.png", np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 200)
    assert "holds 1 and 199 other values" in lines(check(open_dataset("davis", tmp_path)))[0]


@pytest.mark.parametrize("form", ["{}#001", "{}", "{}.jpg", " {}#001.png "])
def test_a_list_chooses_the_frames(tmp_path, form):
    focuscut(tmp_path)
    photo(tmp_path / "img/unlisted.jpg")
    save(tmp_path / "gt/other#001.png", box())
    (tmp_path / "list").mkdir()
    listed = tmp_path / "list/val.txt"
    listed.write_text(form.format("bear_00012") + "\n\n")
    assert names(open_dataset("davis", tmp_path)) == ["davis/bear_00012"]
    assert open_dataset("davis", tmp_path).problems == ()
    listed.write_text("\n".join(form.format(stem) for stem in ("bear_00012", "gone", "unlisted")))
    dataset = open_dataset("davis", tmp_path)
    assert names(dataset) == ["davis/bear_00012"]
    complaints = "\n".join(lines(dataset.problems))
    assert "gone" in complaints
    assert "unlisted" in complaints
    assert "other" not in complaints


def test_a_list_cannot_name_files_elsewhere(tmp_path):
    focuscut(tmp_path / "set")
    photo(tmp_path / "secret.jpg")
    (tmp_path / "set/list").mkdir()
    (tmp_path / "set/list/val.txt").write_text("../../secret\n")
    dataset = open_dataset("davis", tmp_path / "set")
    assert dataset.items == ()
    assert "../../secret" in lines(dataset.problems)[0]
    (tmp_path / "set/list/val.txt").write_bytes(b"\xff\xfe\x00bear")
    with pytest.raises(ValueError, match="cannot be read as UTF-8"):
        open_dataset("davis", tmp_path / "set")


# ---------------------------------------------------------------- HQSeg-44K

PLACES = {
    "DIS5K/DIS-VD": ("im", "gt"),
    "thin_object_detection/ThinObject5K": ("images_test", "masks_test"),
    "thin_object_detection/HRSOD": ("images", "masks_max255"),
    "thin_object_detection/COIFT": ("images", "masks"),
}


def hqseg44k(root):
    for part, (images, folder) in PLACES.items():
        for stem in ("z_1", "y"):
            photo(root / part / images / f"{stem}.jpg")
            save(root / part / folder / f"{stem}.png", box(value=200))
    return root


def test_hqseg44k_order_and_groups(tmp_path):
    dataset = open_dataset("hqseg44k", hqseg44k(tmp_path))
    parts = ("COIFT", "HRSOD", "ThinObject5K", "DIS-VD")
    assert names(dataset) == [f"{part}/{stem}" for part in parts for stem in ("y", "z_1")]
    assert [item.group for item in dataset.items] == [part for part in parts for _ in range(2)]
    assert dataset.expected == 1537
    assert check(dataset) == ()


def test_hqseg44k_without_a_part_says_so(tmp_path):
    root = hqseg44k(tmp_path)
    (root / "thin_object_detection/HRSOD").rename(root / "away")
    (root / "DIS5K/DIS-VD/gt/y.png").unlink()
    dataset = open_dataset("hqseg44k", root)
    assert len(dataset.items) == 5
    assert [problem.where for problem in dataset.problems] == [
        "thin_object_detection/HRSOD",
        "DIS5K/DIS-VD/im/y.jpg",
    ]


# ---------------------------------------------------------------- GrabCut, Berkeley


def test_grabcut_ignores_the_unsure_band(tmp_path):
    photo(tmp_path / "data_GT/flower.jpg")
    photo(tmp_path / "data_GT/bool.bmp")
    band, inner = box(2, 3, 7, 8, 128), box(3, 4)
    save(tmp_path / "boundary_GT/flower.bmp", np.where(inner, 255, np.where(band, 128, 64)))
    save(tmp_path / "boundary_GT/bool.bmp", box(value=255))
    dataset = open_dataset("grabcut", tmp_path)
    assert (names(dataset), dataset.expected) == (["grabcut/bool", "grabcut/flower"], 50)
    sample = dataset.load(dataset.items[1])
    assert np.array_equal(sample.mask, inner > 0)
    assert np.array_equal(sample.ignore, (band > 0) & (inner == 0))
    assert sample.ignore.dtype == bool
    assert dataset.load(dataset.items[0]).ignore is None


def test_a_mask_of_nothing_but_the_unsure_band_holds_no_object(tmp_path):
    photo(tmp_path / "data_GT/flower.jpg")
    save(tmp_path / "boundary_GT/flower.png", box(value=128))
    assert "holds no object" in lines(check(open_dataset("grabcut", tmp_path)))[0]


@pytest.mark.parametrize(("images", "folder", "suffix"), [("images", "masks", ""), ("img", "gt", "#1")])
def test_berkeley_in_both_layouts(tmp_path, images, folder, suffix):
    photo(tmp_path / images / "3063.jpg")
    photo(tmp_path / images / "42049.jpg")
    value = 255 if images == "images" else 1
    save(tmp_path / folder / f"3063{suffix}.png", box(value=value))
    save(tmp_path / folder / "42049#1.png", box(value=value))
    save(tmp_path / folder / "42049#2.png", box(0, 0, value=value))
    dataset = open_dataset("berkeley", tmp_path)
    assert names(dataset) == ["berkeley/3063", "berkeley/42049#1", "berkeley/42049#2"]
    assert dataset.expected == 100
    assert np.array_equal(masks(dataset)[2], box(0, 0) > 0)


# ---------------------------------------------------------------- SBD


def sbd_set(root):
    io = pytest.importorskip("scipy.io", reason="SBD needs scipy")
    (root / "inst").mkdir(parents=True)
    for stem, labels in (("2008_1", box() + box(0, 11, 3, 3, 2)), ("2008_2", box(0, 0, value=7))):
        photo(root / "img" / f"{stem}.jpg")
        content = {"Segmentation": labels, "Boundaries": np.zeros((2, 1)), "Categories": np.array([[3], [5]], np.uint8)}
        io.savemat(root / "inst" / f"{stem}.mat", {"GTinst": content}, do_compression=True)
    (root / "val.txt").write_text("2008_2\n2008_1\n")
    return root


def test_sbd(tmp_path):
    root = sbd_set(tmp_path / "dataset")
    for place in (root, tmp_path):
        dataset = open_dataset("sbd", place)
        assert names(dataset) == ["sbd/2008_2#7", "sbd/2008_1#1", "sbd/2008_1#2"]
        assert dataset.expected == 6671
    assert np.array_equal(masks(dataset)[2], box(0, 11, 3, 3) > 0)
    assert check(dataset) == ()
    assert len(dataset.fingerprint()) == 64


def test_sbd_faults_are_listed(tmp_path):
    root = sbd_set(tmp_path)
    (root / "val.txt").write_text("2008_1\n2008_2\ngone\n../up\n2008_3\n2008_4\n")
    (root / "inst/2008_2.mat").write_bytes((root / "inst/2008_2.mat").read_bytes()[:150])
    for stem in ("2008_3", "2008_4"):
        photo(root / "img" / f"{stem}.jpg")
    (root / "inst/2008_3.mat").write_bytes(b"MATLAB 5.0 MAT-file".ljust(400, b"\xff"))
    dataset = open_dataset("sbd", root)
    assert names(dataset) == ["sbd/2008_1#1", "sbd/2008_1#2"]
    wrong = {problem.where for problem in dataset.problems}
    assert wrong == {"inst/2008_2.mat", "inst/2008_3.mat", "img/2008_4.jpg", "val.txt"}
    assert sum(problem.where == "val.txt" for problem in dataset.problems) == 2
    photo(root / "img/2008_1.jpg", width=WIDTH + 1)
    assert "is 18x12 and its picture 19x12" in lines(check(dataset))[-1]


def test_sbd_without_scipy_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    for folder in ("img", "inst"):
        (tmp_path / folder).mkdir()
    (tmp_path / "val.txt").write_text("")
    with pytest.raises(ValueError, match=r"pip install .hrsam\[sbd\]"):
        open_dataset("sbd", tmp_path)


def test_a_mat_file_over_the_limit_is_not_unpacked(tmp_path, monkeypatch):
    root = sbd_set(tmp_path)
    monkeypatch.setattr(sbd, "MAX_MAT_BYTES", 50)
    dataset = open_dataset("sbd", root)
    assert dataset.items == ()
    assert "more than 50 bytes" in lines(dataset.problems)[0]


# ---------------------------------------------------------------- any pairs, and what may be wrong with them


def pairs(root):
    photo(root / "images/7.png", value=10)
    photo(root / "images/7_9.png", value=20)
    save(root / "masks/7_0.png", box(value=255))
    save(root / "masks/7_1.png", box(0, 0, value=255))
    save(root / "masks/7_9.png", box(1, 1, value=255))  # of picture 7_9, not the tenth of picture 7
    return root


def test_pairs_has_one_object_for_each_mask(tmp_path):
    dataset = open_dataset("pairs", pairs(tmp_path / "part"))
    assert names(dataset) == ["part/7_0", "part/7_1", "part/7_9"]
    assert dataset.expected is None
    assert np.array_equal(masks(dataset)[1], box(0, 0) > 0)
    assert dataset.load(dataset.items[2]).pixels[0, 0].tolist() == [20, 20, 20]


def test_every_fault_is_listed_at_once_and_the_rest_loads(tmp_path):
    root = pairs(tmp_path / "part")
    photo(root / "images/bare.png")
    save(root / "masks/stray.png", box())
    for name in ("twin.png", "twin.jpg"):
        photo(root / "images" / name)
    save(root / "masks/twin.png", box())
    for stem in ("wide", "empty", "cut", "cut_picture"):
        photo(root / "images" / f"{stem}.png")
        save(root / "masks" / f"{stem}.png", box())
    photo(root / "images/wide.png", width=WIDTH + 1)
    save(root / "masks/empty.png", box(value=0))
    for path in (root / "masks/cut.png", root / "images/cut_picture.png"):
        path.write_bytes(path.read_bytes()[:50])
    dataset = open_dataset("pairs", root)
    assert {p.where for p in dataset.problems} == {"images/bare.png", "masks/stray.png", "images/twin.jpg"}
    assert "part/twin" not in names(dataset)
    complaints = check(dataset)
    assert complaints[:3] == dataset.problems
    by_item = {problem.where: problem.text for problem in complaints[3:]}
    assert list(by_item) == ["part/cut", "part/cut_picture", "part/empty", "part/wide"]
    assert "masks/cut.png: cannot be read" in by_item["part/cut"]
    assert "images/cut_picture.png: cannot be read" in by_item["part/cut_picture"]
    assert "empty.png holds no object" in by_item["part/empty"]
    assert "wide.png is 18x12 and its picture 19x12" in by_item["part/wide"]
    for item in dataset.items:
        if item.name in by_item:
            with pytest.raises(ValueError) as caught:
                dataset.load(item)
            assert str(caught.value) == by_item[item.name]
        else:
            assert dataset.load(item).mask.any()


def test_masks_that_share_a_name_are_left_out(tmp_path):
    root = pairs(tmp_path / "part")
    save(root / "masks/7_0.bmp", box())
    dataset = open_dataset("pairs", root)
    assert names(dataset) == ["part/7_1", "part/7_9"]
    assert dataset.problems == (Problem("part/7_0", "2 masks have this name; keep one"),)


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux only")
def test_a_file_name_that_is_not_text(tmp_path):
    root = pairs(tmp_path / "part")
    os.rename(root / "images/7_9.png", os.fsencode(root / "images") + b"/\xff\n.png")
    found, problems = index_masks(root / "images", root / "masks", numbered=r"_\d+")
    assert [picture.name for picture, _ in found] == ["7.png"]
    assert len(found[0][1]) == 3  # without its picture 7_9 reads as the tenth mask of 7
    assert [problem.text for problem in problems] == ["has a name that is not text; rename it"]
    assert all(problem.where.isprintable() for problem in problems)


# ---------------------------------------------------------------- opening


def test_an_unknown_name_lists_the_known_ones(tmp_path):
    with pytest.raises(
        ValueError, match="got data set 'davos'; give one of davis, hqseg44k, grabcut, berkeley, sbd, coco"
    ):
        open_dataset("davos", tmp_path)


@pytest.mark.parametrize("name", DATASETS)
def test_a_wrong_folder_is_one_sentence(tmp_path, name):
    with pytest.raises(ValueError, match="there is no folder"):
        open_dataset(name, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="; expected ") as caught:
        open_dataset(name, tmp_path)
    assert DATASETS[name].line in str(caught.value)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="there is no folder"):
        open_dataset(name, tmp_path / "file")


@pytest.mark.parametrize("name", DATASETS)
def test_a_json_file_is_a_root_only_for_formats_that_have_one(tmp_path, name):
    path = tmp_path / "x.json"
    path.write_text("{}")
    with pytest.raises(ValueError):
        open_dataset(name, path)


def test_an_empty_picture_folder_is_one_sentence(tmp_path):
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    with pytest.raises(ValueError, match="holds no pictures"):
        open_dataset("pairs", tmp_path)


def test_nothing_is_decoded_while_indexing(tmp_path, monkeypatch):
    def refuse(*_args, **_options):
        raise AssertionError("decoded")

    monkeypatch.setattr("hrsam.data.index.read_image", refuse)
    monkeypatch.setattr("hrsam.data.index.read_labels", refuse)
    assert len(open_dataset("davis", focuscut(tmp_path)).items) == 2


def test_items_travel_to_other_processes(tmp_path):
    dataset = open_dataset("davis", focuscut(tmp_path))
    again = pickle.loads(pickle.dumps(dataset))
    assert again.items == dataset.items
    assert np.array_equal(again.load(again.items[0]).mask, masks(dataset)[0])


def test_the_fingerprint_is_of_content_and_names_only(tmp_path, monkeypatch):
    one = open_dataset("davis", focuscut(tmp_path / "one"))
    fingerprint = one.fingerprint()
    assert len(fingerprint) == 64
    assert open_dataset("davis", focuscut(tmp_path / "two" / "DAVIS")).fingerprint() == fingerprint
    save(tmp_path / "one/gt/ant_00001#001.png", box(2, 2))
    assert one.fingerprint() != fingerprint
    focuscut(tmp_path / "one")
    assert one.fingerprint() == fingerprint
    (tmp_path / "one/img/ant_00001.jpg").unlink()
    with pytest.raises(ValueError, match=r"there is no file .*ant_00001\.jpg"):
        one.fingerprint()


def test_a_picture_with_many_objects_is_hashed_and_checked_once(tmp_path, monkeypatch):
    dataset = open_dataset("pairs", pairs(tmp_path / "part"))
    read, hashed = [], []
    read_image, sha256 = datasets.read_image, sys.modules["hrsam.data.index"]._file_sha256
    monkeypatch.setattr(datasets, "read_image", lambda path: read.append(path) or read_image(path))
    monkeypatch.setattr("hrsam.data.index._file_sha256", lambda path: hashed.append(path) or sha256(path))
    assert check(dataset, threads=1) == ()
    dataset.fingerprint()
    assert len(read) == 2
    assert len(hashed) == len(set(hashed)) == 5


def test_names_of_a_file_stay_inside(tmp_path):
    (tmp_path / "root").mkdir()
    assert inside(tmp_path / "root", "a/b.png") == (tmp_path / "root/a/b.png").resolve()
    assert inside(tmp_path / "root", "a..b.png").name == "a..b.png"
    for name in ("", "..", "a/..", "/a", "a//b", "a\\b", "C:a", "a\0b", "a\nb", "\ud800", "a" * 1001):
        with pytest.raises(ValueError):
            inside(tmp_path / "root", name)
