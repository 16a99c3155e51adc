"""Files are whole or not there, whatever fails or is killed; a checkpoint holds numbers and nothing that runs."""

import errno
import hashlib
import os
import pickle
import random
import resource
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

from hrsam import checkpoint
from hrsam.checkpoint import (
    checkpoints,
    load_state,
    newest_checkpoint,
    save_checkpoint,
    step_of,
    sweep,
    write_atomically,
)
from tests.processes import begun


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def state(step, size=1000):
    return {"model": {"w": torch.full((size,), float(step))}, "step": step, "settings": {"lr": 1e-3, "data": ["a"]}}


def assert_right(folder, *steps):
    """The newest checkpoint is whole and of one of the ``steps``."""
    found = load_state(newest_checkpoint(folder))
    assert found["step"] in steps
    assert (found["model"]["w"] == found["step"]).all()
    return found["step"]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------- files


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"half of the new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_a_file_is_flushed_before_it_takes_its_place(tmp_path, monkeypatch):
    order = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (order.append("fsync"), sync(handle))[1])
    monkeypatch.setattr(os, "replace", lambda old, new: (order.append("replace"), replace(old, new))[1])
    path = write_atomically(tmp_path / "a", lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"
    assert order == ["fsync", "replace", "fsync"]  # the file, its name, the folder
    assert path.stat().st_mode & 0o777 == 0o644
    order.clear()
    save_checkpoint(state(1), tmp_path, 1, keep=1)
    assert order == ["fsync", "replace", "fsync"]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_atomically(tmp_path / "nowhere" / "a", lambda file: None)


# ---------------------------------------------------------------- checkpoints


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    saved = {**state(7), "mixed": None, "pair": [1, 2.5]}
    path = save_checkpoint(saved, tmp_path, 7, keep=1)
    back = load_state(path)
    assert torch.equal(back["model"].pop("w"), saved["model"].pop("w"))
    assert back == saved
    assert step_of(path) == 7
    assert path.name == f"step-00000007-{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}.pt"
    assert newest_checkpoint(tmp_path) == path


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    path = save_checkpoint({"step": Trap(tmp_path / "trace")}, tmp_path, 1, keep=1)
    with pytest.raises(pickle.UnpicklingError):
        load_state(path)
    assert not (tmp_path / "trace").exists()


def test_the_last_few_are_kept(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    for step in (8, 9, 10, 99_999_999, 100_000_000):
        save_checkpoint(state(step), tmp_path, step, keep=3)
    assert [step_of(path) for path in checkpoints(tmp_path)] == [10, 99_999_999, 100_000_000]
    assert_right(tmp_path, 100_000_000)


def flip(path, place):
    """Change one bit, ``place`` in [0, 1) of the file."""
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)


def cut(path, place):
    os.truncate(path, int(place * path.stat().st_size))


@pytest.mark.parametrize("place", [0.0, 0.3, 0.6, 0.999])
@pytest.mark.parametrize("harm", [flip, cut])
def test_a_damaged_newer_one_is_named_and_skipped(tmp_path, caplog, harm, place):
    for step in (1, 2, 3):
        save_checkpoint(state(step), tmp_path, step, keep=3)
    _, right, wrong = checkpoints(tmp_path)
    harm(wrong, place)
    content = wrong.read_bytes()
    assert newest_checkpoint(tmp_path) == right
    (said,) = caplog.messages
    assert said == f"{wrong} is damaged and set aside as {wrong.name}.damaged; going on from {right.name}"
    assert Path(f"{wrong}.damaged").read_bytes() == content
    assert_right(tmp_path, 2)
    for step in (3, 4, 5, 6):
        save_checkpoint(state(step), tmp_path, step, keep=3)
    assert Path(f"{wrong}.damaged").exists()


def test_none_that_is_right_is_an_error(tmp_path):
    for step in (1, 2):
        flip(save_checkpoint(state(step), tmp_path, step, keep=3), 0.5)
    before = names(tmp_path)
    with pytest.raises(
        ValueError, match=r"all checkpoints in .* are damaged \(step-00000002-.*, step-00000001-.*\); bring back"
    ):
        newest_checkpoint(tmp_path)
    assert names(tmp_path) == before


# ---------------------------------------------------------------- what fails


class Faults:
    """Raises "no space left" at call number ``n`` of all the system calls that a save makes; counts them in ``calls``."""

    def __init__(self, n):
        self.n, self.calls = n, 0

    def __call__(self, function):
        def call(*args, **kwargs):
            self.calls += 1
            if self.calls == self.n:
                raise OSError(errno.ENOSPC, "No space left on device")
            return function(*args, **kwargs)

        return call

    def open(self, *args, **kwargs):
        return Faulty(fdopen(*args, **kwargs), self)


class Faulty:
    def __init__(self, file, faults):
        self.file, self.fileno = file, file.fileno
        self.write, self.flush = faults(file.write), faults(file.flush)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


fdopen = os.fdopen


@contextmanager
def faults(n):
    found = Faults(n)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fdopen", found(found.open))
        for module, name in (
            (tempfile, "mkstemp"),
            (os, "fsync"),
            (os, "chmod"),
            (os, "replace"),
            (os, "open"),
            (os, "close"),
        ):
            patch.setattr(module, name, found(getattr(module, name)))
        patch.setattr(Path, "unlink", found(Path.unlink))
        yield found


def test_every_call_that_can_fail_does(tmp_path):
    save_checkpoint(state(1), tmp_path, 1, keep=2)
    n, done = 0, False
    while not done:
        n += 1
        save_checkpoint(state(2 * n), tmp_path, 2 * n, keep=2)
        with faults(n) as found, suppress(OSError):
            save_checkpoint(state(2 * n + 1), tmp_path, 2 * n + 1, keep=2)
            done = True
        assert_right(tmp_path, 2 * n, 2 * n + 1)  # after the replacement the new one is there, whatever fails then
    assert found.calls == n - 1 > 30


def test_a_full_disk_at_any_level_leaves_the_old_file(tmp_path):
    """No file may grow beyond a share of the checkpoint's size; 20 shares."""
    old = save_checkpoint(state(1, 100_000), tmp_path, 1, keep=3)
    content, (_, hard) = old.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    for level in range(20):
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(content) * level // 20, hard))
        try:
            with pytest.raises(OSError, match="File too large"):
                save_checkpoint(state(2, 100_000), tmp_path, 2, keep=3)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        assert names(tmp_path) == [old.name]
        assert old.read_bytes() == content
    save_checkpoint(state(2, 100_000), tmp_path, 2, keep=3)
    assert_right(tmp_path, 2)


# ---------------------------------------------------------------- who is killed


def save_for_ever(folder, first):
    torch.set_num_threads(1)
    for step in range(first, first + 100_000):
        save_checkpoint(state(step, 250_000), folder, step, keep=2)


def kill_while_saving(folder, hits, seed=0):
    """Kill a process that does nothing but save until ``hits`` kills fell between the first byte and the name of a file."""
    rng, kills, inside, first = random.Random(seed), 0, 0, 1
    save_checkpoint(state(0, 250_000), folder, 0, keep=2)
    while inside < hits:
        child = begun(save_for_ever, folder, first)
        deadline = time.monotonic() + 60
        while step_of(checkpoints(folder)[-1]) < first:
            assert child.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.002)
        child.join(rng.uniform(0, 0.03))
        child.kill()
        child.join()
        kills, inside = kills + 1, inside + any(folder.glob(f".*{checkpoint.PART}"))
        sweep(folder)
        first = assert_right(folder, *range(first, first + 100_000)) + 1
        assert all(path.name.startswith("step-") for path in folder.iterdir())
    print(f"{kills} kills, {inside} while a file was being written")


def test_a_killed_writer_leaves_whole_files(tmp_path):
    kill_while_saving(tmp_path, 6)


@pytest.mark.slow
def test_a_writer_killed_200_times_leaves_whole_files(tmp_path):
    kill_while_saving(tmp_path, 200, seed=1)
