"""A run may be killed, asked to stop, run out of disk or meet a NaN at any moment; it goes on to the same last bit."""

import importlib
import itertools
import math
import os
import resource
import shutil
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hrsam import loop
from hrsam import train as training
from hrsam.checkpoint import checkpoints, load_state, newest_checkpoint, step_of
from hrsam.cli import main
from hrsam.data.bank import PhotoBank
from hrsam.data.workers import WorkerError
from hrsam.loop import Loop
from hrsam.models.presets import PRESETS
from hrsam.optim import Gradients, Phase
from hrsam.rollout import ClickRollout, Rounds
from hrsam.run import DISK, NOT_FINITE, WORKER, RunFailed
from tests.builders import small_config
from tests.processes import exit_code
from tests.tiny_training import (
    assert_same_logs,
    assert_same_states,
    last_state,
    log_lines,
    on_batch,
    settings,
    use_small_preset,
    write_photos,
)

pytestmark = pytest.mark.usefixtures("small_preset")

STEPS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos") / "part1")


@pytest.fixture(scope="module")
def bank(folder):
    return PhotoBank.load([folder])


def long_run(out, folder, **changes):
    """Twelve steps, saved every other one; the log's lines, of three steps each, do not fall on the checkpoints."""
    return settings(out, steps=STEPS, batch=1, data=(str(folder),), save_every=2, log_every=3, **changes)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, folder):
    """The run that nobody disturbed."""
    run = long_run(tmp_path_factory.mktemp("straight") / "run", folder)
    assert exit_code(child, run) == 0
    return run


# ---------------------------------------------------------------- kill -9


def bomb(target, number, after):
    """Kill this process before, or after, call ``number`` of ``module.name`` or ``module.class.name``."""
    *path, name = target.split(".")
    try:
        place = importlib.import_module(".".join(path))
    except ModuleNotFoundError:
        place = getattr(importlib.import_module(".".join(path[:-1])), path[-1])
    function, numbers = getattr(place, name), itertools.count(1)

    def call(*args, **kwargs):
        now = next(numbers) == number
        if now and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **kwargs)
        if now:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(place, name, call)


def child(run, fuse=None):
    use_small_preset()
    if fuse is not None:
        bomb(*fuse)
    training.train(run)


IN_STEPS, IN_SAVES = (1, 4, 7, 10, 12), (2, 3, 5, 6, 7)
IN_NAMES = (3, 5, 7, 9, 13)  # the first name is a checkpoint's, then a picture's and a checkpoint's in turn
PLACES = {
    "before a forward pass": ("hrsam.train.make_batch", False, IN_STEPS),
    "between gradient and update": ("hrsam.loop.move", False, IN_STEPS),
    "after the averaged weights": ("hrsam.optim.Average.update", True, IN_STEPS),
    "before a checkpoint gets its name": ("os.replace", False, IN_NAMES),
    "after it got its name": ("os.replace", True, IN_NAMES),
    "after the old ones are removed": ("hrsam.loop.save_checkpoint", True, IN_SAVES),
}
FUSES = {f"{place} {n}": (what, n, after) for place, (what, after, numbers) in PLACES.items() for n in numbers}
FUSES["while a checkpoint is written"] = ("hrsam.checkpoint._Hashed.write", 3000, False)
FEW = (
    "before a forward pass 10",
    "between gradient and update 4",
    "after it got its name 5",
    "while a checkpoint is written",
)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FEW else pytest.mark.slow) for n in FUSES])
def test_a_killed_run_goes_on_to_the_same_last_bit(tmp_path, folder, straight, name):
    run = long_run(tmp_path / "run", folder)
    assert exit_code(child, run, FUSES[name]) == -signal.SIGKILL
    assert exit_code(child, run) == 0
    assert_same_as(run, straight)
    shutil.rmtree(tmp_path)


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_arrives(tmp_path, folder, straight):
    """Each piece makes three steps and dies in the fourth, so it saves at least once and repeats at most one step."""
    run = long_run(tmp_path / "run", folder)
    codes = []
    while not codes or codes[-1] != 0:
        codes.append(exit_code(child, run, ("hrsam.loop.move", 4, False)))
        assert len(codes) < STEPS
    assert codes[:-1] == [-signal.SIGKILL] * (len(codes) - 1)
    assert len(codes) > 4
    assert_same_as(run, straight)


def assert_same_as(run, straight):
    assert_same_states(last_state(run), last_state(straight))
    assert_same_logs(run, straight)
    assert curve(run) == curve(straight) == [3, 6, 9, 12]
    left = len(checkpoints(Path(run.out) / "checkpoints"))
    assert left in (run.keep, run.keep + 1)  # one more: killed before the oldest went
    assert not [path for path in Path(run.out).rglob("*") if path.name.startswith(".")]


def curve(run):
    """Steps of the loss that TensorBoard shows."""
    return [event.step for event in EventAccumulator(f"{run.out}/tensorboard").Reload().Scalars("train/loss")]


def test_a_damaged_last_checkpoint_costs_steps_and_no_bits(tmp_path, bank, caplog):
    run = settings(tmp_path)
    last = training.train(run, bank=bank)
    undamaged = load_state(last)
    os.truncate(last, last.stat().st_size // 2)
    training.train(run, bank=bank)
    assert f"{last} is damaged and set aside" in caplog.text
    assert_same_states(last_state(run), undamaged)
    assert [line["step"] for line in log_lines(run)] == [1, 2]


# ---------------------------------------------------------------- the same run, or another one


def trained(out, bank, **changes):
    """A run for many tests."""
    run = settings(out, **changes)
    training.train(run, bank=bank)
    return run


@pytest.fixture(scope="module")
def three(tmp_path_factory, bank):
    """Three steps that nobody disturbed."""
    return trained(tmp_path_factory.mktemp("three") / "run", bank, steps=3)


@pytest.fixture(scope="module")
def begun(tmp_path_factory, bank):
    """A run of one step of two parts."""
    return trained(tmp_path_factory.mktemp("begun") / "run", bank, steps=1, batch=1, accumulate=2)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 7}, "seed=0, not 7"),
        ({"data": ("elsewhere",)}, r"data.0=unused, not elsewhere"),
        ({"phases": (Phase(side=64, batch=1, steps=1, lr=2e-3),)}, r"phases.0.lr=0.001, not 0.002"),
        ({"phases": (Phase(side=64, batch=1, steps=1, lr=1e-3),) * 2}, r"phases.1.batch=None, not 1"),
        ({"rounds": Rounds(trained=1, another=0.5, most_silent=1)}, r"rounds.trained=2, not 1"),
        ({"ema": 0.5}, r"ema=0.999, not 0.5"),
        ({"hold_out": 2}, r"hold_out=0, not 2"),
        ({"accumulate": 1}, r"accumulate × processes=2, not 1"),
    ],
)
def test_a_folder_of_another_run_is_refused(begun, bank, changes, said):
    before = newest_checkpoint(Path(begun.out) / "checkpoints").read_bytes()
    with pytest.raises(ValueError, match=f"holds a run with {said}; go on with that, or give another out") as caught:
        training.train(begun.model_copy(update=changes), bank=bank)
    assert "\n" not in str(caught.value)
    assert newest_checkpoint(Path(begun.out) / "checkpoints").read_bytes() == before


def test_other_photos_are_another_run(begun, bank):
    brighter = replace(bank, colours=bank.colours + 0.01)
    with pytest.raises(ValueError, match=r"the data's content=[0-9a-f]{16}, not [0-9a-f]{16}; go on with that"):
        training.train(begun, bank=brighter)


def test_what_does_not_move_the_weights_may_change(begun, bank, tmp_path):
    shutil.copytree(begun.out, tmp_path / "moved")
    changes = {"out": str(tmp_path / "moved"), "log_every": 7, "save_every": 9, "keep": 1, "graphs": False}
    path = training.train(begun.model_copy(update=changes), bank=bank)
    assert path.parent.parent == tmp_path / "moved"
    assert step_of(path) == 1


def test_a_run_without_its_checkpoints_does_not_begin_anew(begun, bank, tmp_path):
    run = begun.model_copy(update={"out": str(tmp_path / "run")})
    shutil.copytree(begun.out, run.out)
    for path in checkpoints(tmp_path / "run" / "checkpoints"):
        os.truncate(path, 100)
    with pytest.raises(ValueError, match=r"all checkpoints in .* are damaged"):
        training.train(run, bank=bank)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(
        ValueError, match="holds the log of a run but no checkpoint; bring back its checkpoints, or give"
    ):
        training.train(run, bank=bank)
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == (Path(begun.out) / "log.jsonl").read_bytes()


# ---------------------------------------------------------------- asked to stop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_asked_to_stop_saves_and_goes_on_later(tmp_path, bank, three, monkeypatch, caplog, number):
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]

    def ask(count, batch):
        if count == 2:
            os.kill(os.getpid(), number)
        return batch

    run = settings(tmp_path, steps=3, save_every=10)
    with monkeypatch.context() as patch:
        on_batch(patch, ask)
        assert step_of(training.train(run, bank=bank)) == 2
    assert caplog.messages == [f"{number.name}: stopped after step 2, which is saved; the same command goes on"]
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers
    training.train(run, bank=bank)
    assert_same_states(last_state(run), last_state(three))
    assert_same_logs(run, three)


def test_torchs_own_random_numbers_are_part_of_the_step(tmp_path, bank, monkeypatch):
    """Stochastic depth of canvases is drawn from them."""
    monkeypatch.setitem(PRESETS, "test", lambda: small_config(drop_path=0.5))
    straight, run = settings(tmp_path / "straight"), settings(tmp_path / "run")
    training.train(straight, bank=bank)
    with monkeypatch.context() as patch:
        on_batch(patch, lambda number, batch: os.kill(os.getpid(), signal.SIGTERM) or batch)
        assert step_of(training.train(run, bank=bank)) == 1
    torch.rand(7)
    training.train(run, bank=bank)
    assert_same_states(last_state(run), last_state(straight))


def test_a_second_ctrl_c_stops_at_once(tmp_path, bank, monkeypatch):
    def ask(count, batch):
        if count == 2:
            for _ in range(2):  # to this thread, since two that another one gets at once are one to Python
                signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        return batch

    on_batch(monkeypatch, ask)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin without one
    try:
        with pytest.raises(KeyboardInterrupt):
            training.train(settings(tmp_path, steps=4), bank=bank)
    finally:
        signal.signal(signal.SIGINT, before)
    assert last_state(settings(tmp_path))["step"] == 1


# ---------------------------------------------------------------- what fails


def failed(run, bank, code):
    """The run fails with ``code``; its message, one sentence."""
    with pytest.raises(RunFailed) as caught:
        training.train(run, bank=bank)
    assert caught.value.exit_code == code
    assert "\n" not in str(caught.value)
    return str(caught.value)


def no_space(function, number):
    """``function``, but its call ``number`` and all later ones find the disk full."""
    numbers = itertools.count(1)

    def call(*args, **kwargs):
        if next(numbers) >= number:
            raise OSError(28, "No space left on device")
        return function(*args, **kwargs)

    return call


@pytest.mark.parametrize(
    ("place", "name", "number", "saved"),
    [
        (os, "replace", 1, None),
        (os, "replace", 4, 1),  # the picture before the checkpoint
        (os, "replace", 5, 1),
        (loop.Reports, "write", 2, 1),
        (loop.Reports, "flush", 3, 1),
    ],
)
def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, bank, three, monkeypatch, place, name, number, saved):
    run = settings(tmp_path / "run", steps=3)
    with monkeypatch.context() as patch:
        patch.setattr(place, name, no_space(getattr(place, name), number))
        message = failed(run, bank, DISK)
    assert "No space left on device" in message
    if saved is None:
        assert "nothing is saved yet" in message
        assert not checkpoints(tmp_path / "run" / "checkpoints")
    else:
        assert f"the checkpoint of step {saved} is kept: make room and run the same command again" in message
        assert last_state(run)["step"] == saved
    training.train(run, bank=bank)
    assert_same_states(last_state(run), last_state(three))
    assert_same_logs(run, three)


def test_a_file_that_may_not_grow_is_found_before_the_first_step(tmp_path, bank, monkeypatch):
    on_batch(monkeypatch, lambda number, batch: pytest.fail("a step was made"))
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        assert "File too large" in failed(settings(tmp_path), bank, DISK)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def test_a_folder_that_cannot_be_is_named(tmp_path, bank):
    (tmp_path / "file").write_text("")
    assert f"cannot write in {tmp_path}/file/run" in failed(settings(tmp_path / "file" / "run"), bank, DISK)


def inject(monkeypatch, place, step, value):
    """Put ``value`` into ``place`` of ``step``; returns a list that then holds copies of the weights before that step."""
    before, models = [], []
    build = training.build
    monkeypatch.setattr(training, "build", lambda preset: models.append(build(preset)) or models[-1])

    def on_pixels(number, batch):
        if number != step:
            return batch
        weights = list(models[0].parameters())
        if place == "weight":
            with torch.no_grad():
                weights[20].view(-1)[0] = value
        before.extend(p.detach().clone() for p in weights)
        return replace(batch, pixels=batch.pixels * value) if place == "pixels" else batch

    on_batch(monkeypatch, on_pixels)
    forward, clip = ClickRollout.forward, Gradients.clip
    forwards, clips = itertools.count(1), itertools.count(1)

    def on_loss(self, *args):
        loss, ious = forward(self, *args)
        return (loss * value if next(forwards) == step and place == "loss" else loss), ious

    def on_gradient(self, largest):
        if next(clips) == step and place == "gradient":
            self.flat[1234] = value
        return clip(self, largest)

    monkeypatch.setattr(ClickRollout, "forward", on_loss)
    monkeypatch.setattr(Gradients, "clip", on_gradient)
    return before, models


PLACES_OF_NAN = ("pixels", "loss", "gradient", "weight")


@pytest.mark.parametrize(
    ("place", "step"),
    [
        pytest.param(place, step, marks=() if step == 3 else pytest.mark.slow)
        for place in PLACES_OF_NAN
        for step in range(1, 11)
    ],
)
def test_what_is_not_finite_is_caught_in_its_step(tmp_path, bank, monkeypatch, place, step):
    value = (math.nan, math.inf)[step % 2] if place in ("gradient", "weight") else math.nan
    run = settings(tmp_path, steps=STEPS, batch=1, save_every=2, log_every=100)
    before, models = inject(monkeypatch, place, step, value)
    message = failed(run, bank, NOT_FINITE)
    saved = (step - 1) // 2 * 2
    assert message.startswith(f"in step {step} the loss is ")
    assert f"the checkpoint of step {saved} is kept" in message
    assert all(torch.equal(a.nan_to_num(), p.nan_to_num()) for a, p in zip(before, models[0].parameters(), strict=True))
    state = last_state(run)
    assert state["step"] == saved
    for part in (state["model"], state["average"]):
        assert all(values.isfinite().all() for values in part.values())


def test_what_is_seen_late_has_moved_nothing(tmp_path, bank, monkeypatch):
    """On CUDA the loop looks only when it writes a line or saves."""
    look = Loop._look
    monkeypatch.setattr(Loop, "_look", lambda self: look(self) if self.step % 4 == 0 else None)
    before, models = inject(monkeypatch, "gradient", 2, math.nan)
    run = settings(tmp_path, steps=6, batch=1, save_every=4, log_every=4)
    assert failed(run, bank, NOT_FINITE).startswith("in step 2 the loss is ")
    assert all(torch.equal(a, p) for a, p in zip(before, models[0].parameters(), strict=True))
    assert last_state(run)["step"] == 0
    assert not (tmp_path / "log.jsonl").exists()


def test_weights_that_overflow_are_not_saved(tmp_path, bank):
    run = settings(tmp_path).model_copy(update={"phases": (Phase(side=64, batch=1, steps=2, lr=1e39),)})
    assert "after step 1 a weight is not finite; the checkpoint of step 0 is kept" in failed(run, bank, NOT_FINITE)
    assert last_state(run)["step"] == 0


def test_reports_that_cannot_be_closed_hide_no_other_failure(tmp_path, bank, monkeypatch):
    monkeypatch.setattr(loop.Reports, "close", no_space(loop.Reports.close, 1))
    assert "No space left on device" in failed(settings(tmp_path / "a", steps=1), bank, DISK)
    inject(monkeypatch, "loss", 1, math.nan)
    assert failed(settings(tmp_path / "b"), bank, NOT_FINITE).startswith("in step 1 the loss is nan")


def dead(number, batch):
    if number == 2:
        raise WorkerError("process 7 was killed by SIGKILL while it worked on cat.jpg")
    return batch


def test_a_dead_worker_has_a_code_of_its_own(tmp_path, bank, monkeypatch):
    on_batch(monkeypatch, dead)
    message = failed(settings(tmp_path), bank, WORKER)
    assert message == "process 7 was killed by SIGKILL while it worked on cat.jpg; the checkpoint of step 1 is kept"


# ---------------------------------------------------------------- the command


@pytest.fixture
def command(tmp_path, folder, monkeypatch, capsys):
    """``command(*overrides)`` trains two steps -> exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    run = settings("run", data=(str(folder),)).model_dump(mode="json")
    Path("run.yaml").write_text(yaml.safe_dump(run))

    def train(*overrides):
        monkeypatch.setattr(sys, "argv", ["hrsam", "train", "run.yaml", *overrides])
        with pytest.raises(SystemExit) as caught:
            main()
        return caught.value.code or 0, *capsys.readouterr()

    return train


def test_exit_codes_of_the_command(command, monkeypatch, tmp_path):
    code, out, _ = command()
    assert code == 0
    assert load_state(out.strip())["step"] == 2
    assert command("seed=1")[0] == 2
    with monkeypatch.context() as patch:
        inject(patch, "loss", 1, math.nan)
        code, out, err = command("out=nan")
    assert (code, out) == (4, "")
    assert err.startswith("hrsam: in step 1 the loss is nan")
    assert err.count("\n") == 1
    with monkeypatch.context() as patch:
        on_batch(patch, dead)
        assert command("out=dead")[0] == 5
    monkeypatch.setattr(os, "replace", no_space(os.replace, 1))
    assert command("out=full")[0] == 3


def test_a_command_that_is_asked_to_stop_ends_well(command, monkeypatch):
    on_batch(monkeypatch, lambda number, batch: os.kill(os.getpid(), signal.SIGTERM) or batch)
    code, out, _ = command()
    assert code == 0
    assert load_state(out.strip())["step"] == 1
