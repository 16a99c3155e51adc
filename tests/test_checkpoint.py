"""Files are whole or not there; a training state holds numbers and nothing that runs."""

import os
import pickle

import pytest
import torch

from hrsam.checkpoint import load_state, save_state, write_atomically


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_state_round_trip(tmp_path):
    state = {"model": {"w": torch.randn(3, 4)}, "step": 7, "settings": {"lr": 1e-3, "data": ["a"], "mixed": None}}
    path = save_state(state, tmp_path / "state.pt")
    back = load_state(path)
    assert torch.equal(back["model"].pop("w"), state["model"].pop("w"))
    assert back == state
    assert os.listdir(tmp_path) == ["state.pt"]


def test_a_state_that_would_run_code_is_refused(tmp_path):
    trace = tmp_path / "trace"
    save_state({"step": Trap(trace)}, tmp_path / "state.pt")
    with pytest.raises(pickle.UnpicklingError):
        load_state(tmp_path / "state.pt")
    assert not trace.exists()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "state.pt"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"half of the new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["state.pt"]


def test_a_file_is_flushed_before_it_takes_its_place(tmp_path, monkeypatch):
    order = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (order.append("fsync"), sync(handle))[1])
    monkeypatch.setattr(os, "replace", lambda old, new: (order.append("replace"), replace(old, new))[1])
    path = write_atomically(tmp_path / "a", lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"
    assert order == ["fsync", "replace", "fsync"]  # the file, its name, the folder
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_atomically(tmp_path / "nowhere" / "a", lambda file: None)
