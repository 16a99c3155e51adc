"""Training on a few coloured shapes: steps, states, resuming, and what stops it."""

import itertools
import json
import math
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from hrsam import train as training
from hrsam.checkpoint import load_state
from hrsam.data.bank import PhotoBank
from hrsam.data.transforms import make_batch
from hrsam.models.model import HRSAM
from hrsam.models.presets import PRESETS
from hrsam.rollout import ClickRollout, Rounds
from hrsam.train import Phase, TrainSettings, build_optimizer, load_bank
from hrsam.weightfile import save
from tests.builders import small_config

GUESSES = "mask_decoder.output_hypernetworks_mlps."  # only the best of them is pulled
FEW_ROUNDS = Rounds(trained=2, another=0.5, most_silent=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four photos of 64x64 with a disc each, the first with a block as its second object."""
    root = tmp_path_factory.mktemp("photos") / "part1"
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


@pytest.fixture(scope="module")
def bank(folder):
    return PhotoBank.load([folder], long_side=64)


@pytest.fixture(autouse=True)
def _small_preset_on_the_cpu(monkeypatch):
    monkeypatch.setitem(PRESETS, "test", small_config)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # only there runs are equal to the bit


def settings(out, steps=2, **changes):
    values = {
        "preset": "test",
        "data": ("unused",),
        "out": str(out),
        "phases": (Phase(side=64, batch=2, steps=steps, lr=1e-3),),
        "rounds": FEW_ROUNDS,
        "warmup": 1,
        "log_every": 1,
        "save_every": 1,
    }
    return TrainSettings(**{**values, **changes})


def fresh_model(seed=0):
    torch.manual_seed(seed)
    return HRSAM(small_config()).train()


def on_batch(monkeypatch, change):
    """Let the next run train on ``change(number, batch)``, steps numbered from 1."""
    numbers = itertools.count(1)
    monkeypatch.setattr(training, "make_batch", lambda *args: change(next(numbers), make_batch(*args)))


def assert_same_states(a, b):
    flat_a, flat_b = ({**s["model"], **{f"average {k}": v for k, v in s["average"].items()}} for s in (a, b))
    assert flat_a.keys() == flat_b.keys()
    for name, value in flat_a.items():
        assert torch.equal(value, flat_b[name]), name
    moments = [[v for slots in s["optimizer"]["state"].values() for v in slots.values()] for s in (a, b)]
    assert len(moments[0]) > 100
    assert all(torch.equal(x, y) for x, y in zip(*moments, strict=True))
    assert a["step"] == b["step"]


def test_a_run_writes_state_and_log(tmp_path, folder, monkeypatch):
    canvases = []
    on_batch(monkeypatch, lambda number, batch: canvases.append(batch.pixels) or batch)
    run = settings(tmp_path / "new" / "run", data=(str(folder),))
    path = training.train(run)
    assert path == tmp_path / "new" / "run" / "state.pt"
    state = load_state(path)
    assert state["step"] == 2
    assert TrainSettings(**state["settings"]) == run
    start = fresh_model(run.seed).state_dict()
    assert state["model"].keys() == state["average"].keys() == start.keys()
    fixed = [name for name, value in state["model"].items() if torch.equal(value, start[name])]
    fixed.remove("prompt_encoder.pe_layer.positional_encoding_gaussian_matrix")
    assert all(name.startswith(GUESSES) for name in fixed)
    assert len(canvases) == 2
    assert not torch.equal(*canvases)
    lines = [json.loads(line) for line in (path.parent / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert [line["images"] for line in lines] == [2, 4]
    assert [line["lr"] for line in lines] == [round(run.lr_at(step), 7) for step in (0, 1)]
    for line in lines:
        assert 0 < line["loss"] < 10
        assert 0 <= line["iou_first"] <= 1
        assert line["grad_norm"] > 0


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path, bank, monkeypatch):
    def kill(number, batch):
        if number == 2:
            raise KeyboardInterrupt
        return batch

    straight = load_state(training.train(settings(tmp_path / "straight", steps=3), bank=bank))
    with monkeypatch.context() as patch:
        on_batch(patch, kill)
        with pytest.raises(KeyboardInterrupt):
            training.train(settings(tmp_path / "killed", steps=3), bank=bank)
    assert load_state(tmp_path / "killed" / "state.pt")["step"] == 1
    torch.rand(7)  # nothing may hang on the global generator
    assert_same_states(load_state(training.train(settings(tmp_path / "killed", steps=3), bank=bank)), straight)
    log = (tmp_path / "killed" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [1, 2, 3]


def test_a_finished_run_is_not_repeated_and_another_seed_differs(tmp_path, bank):
    path = training.train(settings(tmp_path, steps=1), bank=bank)
    first = load_state(path)
    assert_same_states(load_state(training.train(settings(tmp_path, steps=1), bank=bank)), first)
    other = load_state(training.train(settings(tmp_path / "other", steps=1, seed=1), bank=bank))
    name = "encoder.patch_embed.weight"
    assert not torch.equal(other["model"][name], first["model"][name])
    start = fresh_model().state_dict()[name]  # the average of early steps forgets it quickly
    torch.testing.assert_close(first["average"][name], start.lerp(first["model"][name], 0.9))


def test_stop_after_saves_and_returns(tmp_path, bank):
    assert load_state(training.train(settings(tmp_path), bank=bank, stop_after=0))["step"] == 0


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_state(tmp_path, bank, monkeypatch):
    on_batch(monkeypatch, lambda number, batch: replace(batch, pixels=batch.pixels * (math.nan if number == 2 else 1)))
    with pytest.raises(FloatingPointError, match="the loss is nan at step 2; the last saved state is kept"):
        training.train(settings(tmp_path, steps=3), bank=bank)
    state = load_state(tmp_path / "state.pt")
    assert state["step"] == 1
    assert all(value.isfinite().all() for value in state["model"].values())


class Plan(random.Random):
    """A course whose first draw, the kind of the first prompt, is given."""

    def __init__(self, kind):
        super().__init__(0)
        self.kind = kind

    def random(self):
        kind, self.kind = self.kind, None
        return super().random() if kind is None else kind


KINDS = {"box": 0.0, "random clicks": 0.2, "click": 0.9}


def test_gradients_reach_every_parameter(tmp_path, bank):
    model = fresh_model()
    rollout = ClickRollout(model, Rounds())
    moved = dict.fromkeys((name for name, _ in model.named_parameters()), 0.0)
    for kind, draw in KINDS.items():
        generator = torch.Generator().manual_seed(1)
        batch = make_batch(bank, 2, 64, generator)
        loss, ious = rollout(batch.pixels, batch.truth, generator, Plan(draw))
        model.zero_grad(set_to_none=True)
        loss.backward()
        assert loss.isfinite()
        assert ious.shape == (4,)  # three rounds and the last; silent ones are not trained
        for name, p in model.named_parameters():
            assert p.grad is not None, (kind, name)
            moved[name] += float(p.grad.abs().sum())
    assert all(math.isfinite(total) for total in moved.values())
    still = [name for name, total in moved.items() if total == 0]
    assert all(name.startswith(GUESSES) for name in still), still


def test_the_loss_of_a_batch_falls(tmp_path, bank):
    model = fresh_model()
    rollout = ClickRollout(model, settings(tmp_path).rounds)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batch = make_batch(bank, 2, 64, torch.Generator().manual_seed(1))
    losses = []
    for _ in range(8):
        loss, _ = rollout(batch.pixels, batch.truth, torch.Generator().manual_seed(2), Plan(KINDS["click"]))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0], losses


def test_the_anchor_is_half_the_canvas_in_training(tmp_path):
    rollout = ClickRollout(HRSAM(small_config(anchor_side=512)), settings(tmp_path).rounds)
    rollout.set_side(384)
    assert rollout.model.encoder.anchor_side == 192
    plain = ClickRollout(HRSAM(small_config(anchor_side=None)), settings(tmp_path).rounds)
    plain.set_side(384)
    assert plain.model.encoder.anchor_side is None


def test_learning_rates(tmp_path):
    phases = (Phase(side=64, batch=1, steps=60, lr=1e-3), Phase(side=128, batch=1, steps=40, lr=5e-4))
    run = settings(tmp_path, phases=phases, warmup=10, decay=0.2, final_lr=0.1)
    assert run.steps == 100
    assert [run.phase_at(step) for step in (0, 59, 60, 99, 100)] == [phases[0]] * 2 + [phases[1]] * 3
    got = [run.lr_at(step) for step in (0, 4, 9, 59, 60, 80, 90, 100)]
    assert got == pytest.approx([1e-4, 5e-4, 1e-3, 1e-3, 5e-4, 5e-4, 5e-4 * 0.55, 5e-4 * 0.1])
    rates = [run.lr_at(step) for step in range(80, 101)]
    assert rates == sorted(rates, reverse=True)
    assert settings(tmp_path, warmup=0).lr_at(0) == pytest.approx(1e-3)


def test_only_matrices_decay(tmp_path):
    model = HRSAM(small_config())
    names = {id(p): name for name, p in model.named_parameters()}
    decaying, free = build_optimizer(model, settings(tmp_path)).param_groups
    assert (decaying["weight_decay"], free["weight_decay"]) == (0.05, 0.0)
    assert len(decaying["params"]) + len(free["params"]) == len(names)
    decaying, free = ({names[id(p)] for p in group["params"]} for group in (decaying, free))
    for name in ("encoder.blocks.0.attn.qkv.weight", "encoder.scans.0.in_proj.weight", "encoder.laterals.0.0.weight"):
        assert name in decaying
    for name in (
        "encoder.pos_embed",
        "encoder.blocks.0.attn.padding",
        "encoder.blocks.0.norm1.weight",
        "encoder.scans.0.A_log",
        "encoder.scans.0.gamma",
        "mask_decoder.mask_tokens.weight",
        "prompt_encoder.no_mask_embed.weight",
    ):
        assert name in free


def test_held_out_photos_are_not_trained_on(folder, tmp_path):
    run = settings(tmp_path, data=(str(folder),), hold_out=2)
    assert load_bank(run).names == ("part1/shape0", "part1/shape2")
    assert len(load_bank(settings(tmp_path, data=(str(folder),)))) == 4


@pytest.fixture
def slow_clock(monkeypatch):
    """A clock that moves on by a tenth of a second whenever somebody looks at it."""
    ticks = itertools.count()
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: next(ticks) / 10))
    monkeypatch.setattr(training, "CLOCK_EVERY", 2)


def test_a_time_budget_is_kept_and_shared_out_to_the_phases(tmp_path, bank, slow_clock):
    phases = (Phase(side=32, batch=1, steps=3, lr=1e-3), Phase(side=64, batch=1, steps=1, lr=5e-4))
    state = torch.load(training.train(settings(tmp_path, phases=phases, budget=4.0, save_every=99), bank=bank))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    sides = [line["side"] for line in lines]
    assert 4.0 <= state["spent"] < 5.0
    assert state["step"] % 2 == 0
    assert sides == sorted(sides)
    assert 0.5 < sides.count(32) / len(sides) < 0.95  # three quarters of the time
    assert sides.count(64) > 0
    assert lines[-1]["lr"] < 5e-4 < lines[0]["lr"]  # it falls over the last part of the time


def test_a_spent_budget_is_not_spent_again(tmp_path, bank, slow_clock):
    first = torch.load(training.train(settings(tmp_path, budget=2.0), bank=bank))
    again = torch.load(training.train(settings(tmp_path, budget=2.0), bank=bank))
    assert again["step"] == first["step"] > 0


def test_a_run_can_start_from_weights(tmp_path, bank):
    torch.manual_seed(5)
    begin = HRSAM(small_config())
    save(begin, tmp_path / "begin.safetensors", metadata={"licence": "none", "source": "test"})
    run = settings(tmp_path / "a", steps=1, start=str(tmp_path / "begin.safetensors"))
    run = run.model_copy(update={"phases": (Phase(side=64, batch=2, steps=1, lr=0.0),)})
    state = torch.load(training.train(run, bank=bank))
    for name, value in begin.state_dict().items():
        assert torch.equal(state["model"][name], value), name
    save(
        HRSAM(small_config(anchor_side=None)),
        tmp_path / "other.safetensors",
        metadata={"licence": "none", "source": "test"},
    )
    with pytest.raises(ValueError, match="not a test; start from weights of that architecture"):
        training.train(settings(tmp_path / "b", start=str(tmp_path / "other.safetensors")), bank=bank)
    assert not (tmp_path / "b").exists()
