"""A training of seconds on a CPU: four photos, a small model, two or three rounds a step."""

import itertools
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from hrsam import train as training
from hrsam.checkpoint import load_state, newest_checkpoint
from hrsam.data.transforms import make_batch
from hrsam.models.presets import PRESETS
from hrsam.optim import Phase
from hrsam.rollout import Rounds
from hrsam.train import TrainSettings
from tests.builders import small_config

# Of a line of the log, not the same in two runs.
CLOCK = ("seconds", "waiting", "memory_gib", "images_per_s", "clicks_per_s", "tokens_per_s")


def write_photos(root):
    """Four photos of 64x64 with a disc each, the first with a block as its second object."""
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    rows, columns = np.mgrid[:64, :64]
    for i in range(4):
        pixels = np.full((64, 64, 3), 40 * i, np.uint8)
        masks = [(rows - 20 - 6 * i) ** 2 + (columns - 36) ** 2 < 144]
        if i == 0:
            masks.append((rows > 44) & (columns < 30))
        for k, mask in enumerate(masks):
            pixels[mask] = ((220, 30, 40), (20, 200, 60))[k]
            Image.fromarray(mask.astype(np.uint8) * 255).save(root / "masks" / f"shape{i}_{k}.png")
        Image.fromarray(pixels).save(root / "images" / f"shape{i}.png")
    return root


def settings(out, steps=2, batch=2, **changes):
    values = {
        "preset": "test",
        "data": ("unused",),
        "out": str(out),
        "phases": (Phase(side=64, batch=batch, steps=steps, lr=1e-3),),
        "rounds": Rounds(trained=2, another=0.5, most_silent=1),
        "warmup": 1,
        "log_every": 1,
        "save_every": 1,
    }
    return TrainSettings(**{**values, **changes})


def use_small_preset():
    """For the rest of this process: the preset "test", one thread and no CUDA, so that runs are equal to the bit."""
    PRESETS["test"] = small_config
    torch.cuda.is_available = lambda: False
    torch.set_num_threads(1)


def on_batch(monkeypatch, change):
    """Let the next run train on ``change(number, batch)``, batches numbered from 1."""
    numbers = itertools.count(1)
    monkeypatch.setattr(training, "make_batch", lambda *args: change(next(numbers), make_batch(*args)))


def log_lines(run):
    return [json.loads(line) for line in (Path(run.out) / "log.jsonl").read_text().splitlines()]


def last_state(run):
    return load_state(newest_checkpoint(Path(run.out) / "checkpoints"))


def assert_same_states(a, b):
    flat_a, flat_b = ({**s["model"], **{f"average {k}": v for k, v in s["average"].items()}} for s in (a, b))
    assert flat_a.keys() == flat_b.keys()
    for name, value in flat_a.items():
        assert torch.equal(value, flat_b[name]), name
    moments = [[v for slots in s["optimizer"]["state"].values() for v in slots.values()] for s in (a, b)]
    assert len(moments[0]) > 100
    assert all(torch.equal(x, y) for x, y in zip(*moments, strict=True))
    assert a["step"] == b["step"]


def assert_same_logs(a, b):
    """All but what the clock says."""
    without_clock = [[{k: v for k, v in line.items() if k not in CLOCK} for line in log_lines(run)] for run in (a, b)]
    assert without_clock[0] == without_clock[1]
