"""Cached targets: found by what they depend on, whole or not there, verified, shared, and gone on with."""

import errno
import hashlib
import itertools
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes

from hrsam import targets
from hrsam.images import read_image
from hrsam.models.encoder import Encoder
from hrsam.targetfile import LIST, STORED, read_target
from hrsam.targets import DamagedTargets, MissingTarget, Targets, build_targets, find_pictures, kind_of, kind_of_file
from hrsam.teachers import load_teacher
from hrsam.weightfile import save
from tests.builders import photo, small_model
from tests.processes import assert_gone, exit_code

pytestmark = pytest.mark.usefixtures("one_thread")

SIDE = 32
SIZE = 256 * 2 * 2 * 2  # bytes of a target
COUNT = 8
ABOUT = {"licence": "none", "source": "test"}


def written(path, seed=0):
    save(small_model(anchor_side=None, seed=seed), path, metadata=ABOUT)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return written(tmp_path_factory.mktemp("weights") / "teacher.safetensors")


@pytest.fixture(scope="module")
def teacher(weights):
    return load_teacher(weights)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(COUNT):
        Image.fromarray(photo(20 + i, 30, seed=i)).save(folder / f"{i}.png")
    return find_pictures([folder])


def build(pictures, teacher, folder, **changes):
    return build_targets(pictures, teacher, folder, **{"side": SIDE, "shard_bytes": 3 * SIZE, **changes})


@pytest.fixture(scope="module")
def whole(pictures, teacher, tmp_path_factory):
    """A folder built in one go: shards of 3, 3 and 2 targets.  Not to be changed."""
    folder = tmp_path_factory.mktemp("whole")
    build(pictures, teacher, folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    """A copy of it."""
    return shutil.copytree(whole, tmp_path / "targets")


def shards(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).glob("*/*.safetensors"))}


def leftovers(folder):
    return [path.name for path in Path(folder).rglob("*.part")]


@pytest.fixture
def never_computed(monkeypatch):
    def forward(*args, **kwargs):
        raise AssertionError("a model was asked")

    monkeypatch.setattr(Encoder, "encode", forward)
    monkeypatch.setattr(Encoder, "forward", forward)


# ---------------------------------------------------------------- what is in the folder


@pytest.mark.parametrize("stored", STORED)
def test_a_target_is_the_teachers_embedding(pictures, teacher, tmp_path, stored):
    said = []
    built = build(pictures, teacher, tmp_path, stored=stored, say=said.append, shard_bytes=3 * SIZE)
    size = SIZE * STORED[stored][1].itemsize // 2
    a_shard = 3 * SIZE // size
    assert (built.computed, built.kept, built.shards) == (COUNT, 0, -(-COUNT // a_shard))
    assert built.bytes == sum(map(len, shards(tmp_path).values()))
    assert COUNT * size < built.bytes < COUNT * size + built.shards * 2000
    assert said[0].startswith(f"{COUNT} of {COUNT} targets to compute, {COUNT * size / 1e6:.2f} MB in ")
    there = Targets(tmp_path, kind_of(teacher, SIDE, stored))
    assert len(there) == COUNT
    for path in pictures:
        (expected,) = teacher.targets([read_image(path).pixels], SIDE)
        for picture in (path, str(path), path.read_bytes()):
            got = there.get(picture)
            assert got.dtype == STORED[stored][1]
            assert torch.equal(got, expected.to(got.dtype))


def test_nothing_is_computed_twice(pictures, teacher, folder, never_computed):
    before = shards(folder)
    built = build(pictures, teacher, folder)
    assert (built.computed, built.kept, built.shards, built.bytes) == (0, COUNT, 0, 0)
    assert shards(folder) == before


def test_equal_files_share_a_target_wherever_they_lie(pictures, teacher, tmp_path):
    twin = shutil.copy(pictures[0], tmp_path / "twin.png")
    built = build([*pictures[:2], twin, pictures[1]], teacher, tmp_path / "out")
    assert (built.computed, built.kept) == (2, 1)
    there = Targets(tmp_path / "out", kind_of(teacher, SIDE))
    assert torch.equal(there.get(twin), there.get(pictures[0]))


def test_more_pictures_are_added(pictures, teacher, tmp_path):
    build(pictures[:4], teacher, tmp_path)
    before = shards(tmp_path)
    built = build(pictures, teacher, tmp_path)
    assert (built.computed, built.kept) == (COUNT - 4, 4)
    assert before.items() <= shards(tmp_path).items()
    assert Targets(tmp_path, kind_of(teacher, SIDE)).missing(pictures) == []


def test_a_key_depends_on_everything(teacher):
    kind = kind_of(teacher, SIDE)
    others = [
        replace(kind, teacher="0" * 64),
        replace(kind, side=48),
        replace(kind, channels=128),
        replace(kind, computed="bfloat16"),
        replace(kind, stored="float32"),
        replace(kind, transform=kind.transform + 1),
    ]
    assert len({one.key(b"picture") for one in (kind, *others)} | {kind.key(b"Picture")}) == 8
    assert len({one.folder for one in (kind, *others)}) == 6
    assert kind == kind_of(load_teacher(teacher.path), SIDE) == kind_of_file(teacher.path, SIDE)
    half = torch.bfloat16
    assert kind_of(load_teacher(teacher.path, precision=half), SIDE) == kind_of_file(teacher.path, SIDE, half) != kind


# ---------------------------------------------------------------- what is missing or of something else


def test_a_missing_target_is_an_error_and_no_model_is_asked(pictures, folder, teacher, tmp_path, never_computed):
    there = Targets(folder, kind_of(teacher, SIDE))
    Image.fromarray(photo(20, 30, seed=99)).save(tmp_path / "new.png")
    with pytest.raises(MissingTarget, match=r"there is no target of .*new\.png"):
        there.get(tmp_path / "new.png")
    with pytest.raises(MissingTarget, match="there is no target of a picture"):
        there.get((tmp_path / "new.png").read_bytes())
    assert there.missing([pictures[0], tmp_path / "new.png"]) == [tmp_path / "new.png"]
    with pytest.raises(ValueError, match=r"gone\.png cannot be read"):
        there.get(tmp_path / "gone.png")


def test_a_changed_picture_has_no_target(pictures, folder, teacher, tmp_path):
    changed = tmp_path / pictures[0].name
    changed.write_bytes(pictures[0].read_bytes() + b"\0")
    with pytest.raises(MissingTarget):
        Targets(folder, kind_of(teacher, SIDE)).get(changed)


def test_another_teacher_or_side_is_not_found(folder, teacher, tmp_path):
    other = load_teacher(written(tmp_path / "other.safetensors", seed=1))
    here = kind_of(teacher, SIDE).folder
    for kind in (kind_of(other, SIDE), kind_of(teacher, 48), kind_of(teacher, SIDE, "float32")):
        with pytest.raises(MissingTarget, match=f"holds no targets {kind.folder} .* but {here}; compute them first"):
            Targets(folder, kind)
    with pytest.raises(MissingTarget, match="but none at all"):
        Targets(tmp_path / "nowhere", kind_of(teacher, SIDE))


def test_a_shard_of_another_teacher_is_refused_where_it_does_not_belong(folder, teacher):
    kind, other = kind_of(teacher, SIDE), kind_of(teacher, 48)
    (folder / kind.folder).rename(folder / other.folder)
    with pytest.raises(DamagedTargets, match="embeddings of another teacher, side or dtype"):
        Targets(folder, other)


def test_kinds_lie_side_by_side(pictures, teacher, folder):
    build(pictures[:2], teacher, folder, side=48)
    assert Targets(folder, kind_of(teacher, 48)).get(pictures[0]).shape == (256, 3, 3)
    assert Targets(folder, kind_of(teacher, SIDE)).get(pictures[0]).shape == (256, 2, 2)


# ---------------------------------------------------------------- damage


def read_all(folder, kind, pictures):
    there = Targets(folder, kind)
    return [there.get(path) for path in pictures]


def test_every_flipped_bit_is_found(pictures, teacher, folder):
    """All bytes of a shard's head, and 200 of its numbers: never a wrong target, never one that silently is not there."""
    kind = kind_of(teacher, SIDE)
    path = sorted((folder / kind.folder).iterdir())[0]
    content = path.read_bytes()
    head = 8 + int.from_bytes(content[:8], "little")
    rng = random.Random(0)
    for place in [*range(head), *rng.sample(range(head, len(content)), 200)]:
        damaged = bytearray(content)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(DamagedTargets, match=path.name):
            read_all(folder, kind, pictures)
    path.write_bytes(content)
    assert len(read_all(folder, kind, pictures)) == COUNT


def test_every_cut_is_found(pictures, teacher, folder):
    kind = kind_of(teacher, SIDE)
    path = sorted((folder / kind.folder).iterdir())[0]
    content = path.read_bytes()
    for length in [0, 1, 7, 8, 9, 100, *range(200, len(content), len(content) // 40), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(DamagedTargets, match=path.name):
            read_all(folder, kind, pictures)


def test_a_shard_that_changes_or_goes_while_it_is_used_is_found(pictures, teacher, folder):
    kind = kind_of(teacher, SIDE)
    there = Targets(folder, kind)
    paths = sorted((folder / kind.folder).iterdir())
    other = paths[1].read_bytes()
    paths[0].unlink()
    paths[1].write_bytes(paths[2].read_bytes())
    paths[2].write_bytes(other)
    for path in pictures:
        with pytest.raises(DamagedTargets):
            there.get(path)


def hostile(path, listed, tensors=None, header=None, length=0):
    """A shard with any list under its right checksum; or with any header, followed by a hole of ``length`` bytes."""
    text = listed if isinstance(listed, str) else json.dumps(listed)
    checked = {LIST: f"{hashlib.sha256(text.encode()).hexdigest()} {text}"}
    if header is None:
        path.write_bytes(to_bytes(tensors or {}, checked))
        return
    raw = json.dumps({"__metadata__": checked, **header}).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + length)


def test_a_hostile_shard_is_refused_and_costs_no_memory(teacher, tmp_path):
    kind = kind_of(teacher, SIDE)
    path = tmp_path / kind.folder / "x.safetensors"
    path.parent.mkdir()
    told = {"kind": asdict(kind), "targets": {"a": "0"}}
    right, wide = torch.zeros(256, 2, 2, dtype=torch.bfloat16), torch.zeros(256, 2, 3, dtype=torch.bfloat16)
    huge = {"a": {"dtype": "BF16", "shape": [2**28, 2, 2], "data_offsets": [0, 2**31]}}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for case in (
        ("[" * 100_000,), ("3",), ([],), ({"kind": told["kind"]},), ({**told, "targets": 1},),
        (told, {"b": right}), (told, {"a": wide}), (told, {"a": right.float()}), (told, {"a": right[0]}),
        (told, {"a": right, "b": right.clone()}), (told, None, huge, 2**31), (told, None, huge, 2048),
        (told, None, {"a": {"dtype": "BF16", "shape": [256, 2, 2], "data_offsets": [0, 2048]}}, 2047),
    ):  # fmt: skip
        hostile(path, *case)
        with pytest.raises(DamagedTargets, match=r"x\.safetensors is damaged"):
            Targets(tmp_path, kind)
        with pytest.raises(DamagedTargets, match=r"x\.safetensors is damaged"):
            read_target(path, "a", "0", kind)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kilobytes; the largest claims 2 GiB
    hostile(path, told, {"a": right})
    assert len(Targets(tmp_path, kind)) == 1  # as they would be read


def test_a_damaged_shard_is_named_set_aside_and_computed_again(pictures, teacher, folder, caplog):
    kind = kind_of(teacher, SIDE)
    paths = sorted((folder / kind.folder).iterdir())
    before = shards(folder)
    bad = bytearray(before[paths[0].name])
    bad[-1] ^= 1
    paths[0].write_bytes(bad)
    paths[1].write_bytes(before[paths[1].name][:100])
    kept = paths[2].stat().st_ino
    with pytest.raises(DamagedTargets, match=paths[1].name):  # without being asked it changes nothing
        build(pictures, teacher, folder)
    assert paths[0].read_bytes() == bad
    built = build(pictures, teacher, folder, repair=True)
    assert built.kept + built.computed == COUNT
    assert built.shards == 2
    aside = folder / kind.folder / "damaged"
    assert built.set_aside == (aside / paths[0].name, aside / paths[1].name)
    assert built.set_aside[0].read_bytes() == bad
    assert all(path.name in caplog.text for path in paths[:2])
    assert paths[2].stat().st_ino == kept
    assert all(torch.equal(a, b) for a, b in zip(read_all(folder, kind, pictures), read_first(before, kind, pictures)))
    assert build(pictures, teacher, folder, repair=True).set_aside == ()


def read_first(content, kind, pictures):
    """The targets that are in these bytes of shards."""
    found = {key: value for payload in content.values() for key, value in from_bytes(payload).items()}
    return [found[kind.key(path.read_bytes())] for path in pictures]


# ---------------------------------------------------------------- what stops a run


def killed(pictures, weights, folder, after, processes, told):
    """Build, and be killed before shard ``after`` gets its name; the file ``told`` gets the numbers of the processes."""
    real, numbers = os.replace, itertools.count()

    def rename(old, new):
        if next(numbers) == after:
            told.write_text(" ".join(str(child.pid) for child in multiprocessing.active_children()))
            os.kill(os.getpid(), signal.SIGKILL)
        return real(old, new)

    os.replace = rename
    build(pictures, load_teacher(weights), folder, processes=processes)


@pytest.mark.parametrize(("after", "processes"), [(0, 1), (2, 1), (1, 2)])
def test_a_killed_run_goes_on_and_leaves_the_same_shards(pictures, teacher, weights, whole, tmp_path, after, processes):
    """Killed with a shard written but not yet in its place, after so many others; its processes end with it."""
    told = tmp_path / "told"
    assert exit_code(killed, pictures, weights, tmp_path, after, processes, told, seconds=60) == -signal.SIGKILL
    workers = told.read_text().split()
    assert len(workers) == (2 if processes == 2 else 0)
    assert_gone(map(int, workers))
    expected = shards(whole)
    assert len(shards(tmp_path)) == after
    assert shards(tmp_path).items() <= expected.items()
    assert len(leftovers(tmp_path)) == 1
    built = build(pictures, teacher, tmp_path)
    assert built.computed == COUNT - 3 * after
    assert shards(tmp_path) == expected
    (part,) = tmp_path.rglob("*.part")
    os.utime(part, (0, time.time() - 2 * targets.ABANDONED))
    build(pictures, teacher, tmp_path)
    assert leftovers(tmp_path) == []


def test_a_disk_that_fills_up_keeps_what_was_written(pictures, teacher, whole, tmp_path):
    """The largest file the system writes is set to 20 shares of a shard."""
    expected = shards(whole)
    largest = max(map(len, expected.values()))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for level in range(20):
        folder = tmp_path / str(level)
        build(pictures[:2], teacher, folder)  # a smaller shard
        before = shards(folder)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest * level // 20, hard))
        try:
            with pytest.raises(OSError, match=r"does not take another .* make room") as caught:
                build(pictures[2:5], teacher, folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert caught.value.errno == errno.EFBIG
        assert shards(folder) == before
        assert leftovers(folder) == []
    assert build(pictures, teacher, folder).computed == COUNT - 2
    assert len(read_all(folder, kind_of(teacher, SIDE), pictures)) == COUNT


def test_a_disk_without_the_space_is_refused_before_anything_is_computed(
    pictures, teacher, tmp_path, monkeypatch, never_computed
):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=COUNT * SIZE - 1))
    said = []
    with pytest.raises(ValueError, match=r"the targets need 0\.02 MB and .* has 0\.02 MB left; make room"):
        build(pictures, teacher, tmp_path, say=said.append)
    assert f"{COUNT} of {COUNT} targets to compute" in said[0]
    assert shards(tmp_path) == {}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_not_stored(pictures, teacher, tmp_path, monkeypatch, value):
    real = Encoder.encode

    def encode(self, images):
        count.append(1)
        return [m.fill_(value) if len(count) == 5 else m for m in real(self, images)]

    count = []
    monkeypatch.setattr(Encoder, "encode", encode)
    with pytest.raises(ValueError, match=rf"gives NaN or infinity for .*{pictures[4].name} in float32"):
        build(pictures, teacher, tmp_path)
    assert len(shards(tmp_path)) == 1
    monkeypatch.undo()
    assert build(pictures, teacher, tmp_path).computed == COUNT - 3


def test_what_float16_cannot_hold_is_not_stored(pictures, teacher, tmp_path, monkeypatch):
    real = Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda self, images: [m * 1e6 for m in real(self, images)])
    with pytest.raises(ValueError, match="stored as float16"):
        build(pictures, teacher, tmp_path, stored="float16")
    build(pictures, teacher, tmp_path, stored="bfloat16")


def test_a_picture_that_cannot_be_read_is_named(pictures, teacher, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(pictures[0].read_bytes()[:60])
    with pytest.raises(ValueError, match=r"bad\.png: cannot be read"):
        build([*pictures[:3], bad], teacher, tmp_path / "out")
    assert len(shards(tmp_path / "out")) == 1
    with pytest.raises(ValueError, match=r"gone\.png cannot be read .No such file"):
        build([tmp_path / "gone.png"], teacher, tmp_path / "out")


# ---------------------------------------------------------------- several processes


def test_processes_change_nothing(pictures, teacher, whole, tmp_path):
    assert build(pictures, teacher, tmp_path, processes=2).computed == COUNT
    assert shards(tmp_path) == shards(whole)


@pytest.mark.usefixtures("quick_processes")
def test_an_error_in_another_process_comes_back(pictures, teacher, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"bad\.png: not a JPEG"):
        build([*pictures, bad], teacher, tmp_path / "out", processes=2)
    assert len(shards(tmp_path / "out")) == 2


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_is_an_error(pictures, teacher, tmp_path, victim):
    """Even while the other one still starts."""

    def kill():
        while len(children := multiprocessing.active_children()) <= victim:
            begun.wait(0.001)
        children[victim].kill()

    begun = threading.Event()
    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(
        ValueError, match=r"process \d+ was killed by SIGKILL .*; run the same command again, with fewer"
    ):
        build(pictures, teacher, tmp_path, processes=2)
    killer.join()
    assert leftovers(tmp_path) == []
    assert build(pictures, teacher, tmp_path).computed == COUNT


def test_under_a_launcher_every_process_takes_its_share(pictures, teacher, whole, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = []
    for number in ("0", "1"):
        monkeypatch.setenv("RANK", number)
        done.append(build(pictures, teacher, tmp_path, processes=8))  # the launcher's number counts
        with pytest.raises(ValueError, match="repair in one process"):
            build(pictures, teacher, tmp_path, repair=True)
    assert [built.computed for built in done] == [4, 4]
    kind = kind_of(teacher, SIDE)
    assert all(torch.equal(a, b) for a, b in zip(read_all(tmp_path, kind, pictures), read_all(whole, kind, pictures)))
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    assert build(pictures, teacher, tmp_path).computed == 0


def test_results_do_not_pile_up():
    """Never more than so many are begun and not taken."""
    begun = []
    with ThreadPoolExecutor(1) as pool:
        taken = 0
        for item in targets._ahead(pool, lambda item: begun.append(item) or item, range(20), 4):
            assert item == taken
            taken += 1
            assert len(begun) <= taken + 3
    assert taken == 20


# ---------------------------------------------------------------- names and refusals


def test_find_pictures(tmp_path, pictures):
    for name in ("b.JPG", "a.png", ".hidden.png", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "c.png").write_bytes(b"")
    assert find_pictures([tmp_path, tmp_path]) == [tmp_path / "a.png", tmp_path / "b.JPG"]
    with pytest.raises(ValueError, match="there is no folder"):
        find_pictures([tmp_path / "none"])
    (tmp_path / "deeper" / "c.png").unlink()
    with pytest.raises(ValueError, match="there are no pictures"):
        find_pictures([tmp_path / "deeper"])


def test_build_refuses(pictures, teacher, tmp_path):
    with pytest.raises(ValueError, match="stored as float32, bfloat16, float16; got 'int8'"):
        build(pictures, teacher, tmp_path, stored="int8")
    assert list(tmp_path.iterdir()) == []


def test_targets_can_be_sent_to_another_process(pictures, teacher, whole):
    there = pickle.loads(pickle.dumps(Targets(whole, kind_of(teacher, SIDE))))
    assert torch.equal(there.get(pictures[0]), Targets(whole, there.kind).get(pictures[0]))
