"""Distillation: its recipes, its steps against formulas, resume, and both stages from the shipped configs."""

import os
import shutil
import signal
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional as F

import hrsam
from hrsam import distill as distilling
from hrsam.checkpoint import load_state
from hrsam.cli import main
from hrsam.config import read_settings
from hrsam.data.transforms import CanvasSettings
from hrsam.distill import DistillSettings, Look, Looks, Reader, distill, false_colours
from hrsam.frame import Frame
from hrsam.images import read_image
from hrsam.models.model import HRSAM
from hrsam.models.presets import PRESETS, build
from hrsam.optim import Phase
from hrsam.targets import MissingTarget, find_pictures
from hrsam.teachers import check_pair, load_teacher, prepare, real_cells, teacher_config
from hrsam.train import TrainSettings, start_model
from hrsam.weightfile import read_metadata, save
from hrsam.weights import load
from tests.builders import photo, small_config, small_model
from tests.processes import exit_code
from tests.tiny_training import (
    assert_same_logs,
    assert_same_states,
    last_state,
    log_lines,
    use_small_preset,
    write_photos,
)

pytestmark = pytest.mark.usefixtures("small_preset")

CONFIGS = Path(hrsam.__file__).parents[1] / "configs"
SIDE = 64


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*distill*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_are_distillation_settings(path):
    settings = read_settings(DistillSettings, path)
    assert settings.preset in PRESETS
    assert settings.steps > 0
    assert all(phase.side % 16 == 0 for phase in settings.phases)


def test_the_papers_recipes():
    distill = read_settings(DistillSettings, CONFIGS / "distill_hrsam_pp_b.yaml")
    tune = read_settings(TrainSettings, CONFIGS / "train_hrsam_pp_b_hqseg44k.yaml")
    assert (distill.steps, tune.steps) == (160_000, 40_000)
    assert 4 * sum(phase.batch * phase.steps for phase in distill.phases) == 640_000
    for recipe in (distill, tune):
        assert [phase.side for phase in recipe.phases] == [1024]
        assert {phase.lr for phase in recipe.phases} == {1e-4}
        assert (recipe.warmup, recipe.weight_decay, recipe.betas) == (1500, 0.05, (0.9, 0.999))
        assert (recipe.decay, recipe.final_lr) == (1.0, 0.0)
    for step in (1500, 10_000, 39_999):  # beside linear warm-up, then linear to 0 at the end
        assert tune.lr_at(step) == pytest.approx(1e-4 * (40_000 - step) / 38_500, abs=4e-6)
    still = {
        name: getattr(tune.canvas, name) for name in ("aspect", "rotate", "copy_paste", "grey", "blur", "noise", "jpeg")
    }
    assert set(still.values()) == {0.0}
    standard = read_settings(TrainSettings, CONFIGS / "train_hrsam_pp_b_coco.yaml")
    assert standard.canvas == tune.canvas != CanvasSettings()
    assert standard.rounds == tune.rounds


def test_the_toy_can_be_made_of_what_is_shipped():
    settings = read_settings(DistillSettings, CONFIGS / "toy_distill.yaml")
    for phase in settings.phases:
        check_pair(teacher_config(settings.teacher), build(settings.preset).config, phase.side)
    assert load_teacher(settings.teacher).model.config.decoder  # for decoder_weight


def test_cached_targets_are_not_mirrored():
    path, whole = CONFIGS / "toy_distill.yaml", "mirror=0.5"
    with pytest.raises(ValueError, match="cached targets are of unmirrored pictures; set mirror to 0") as caught:
        read_settings(DistillSettings, path, [whole])
    assert "\n" not in str(caught.value)
    assert read_settings(DistillSettings, path, [whole, "targets="]).mirror == 0.5
    with pytest.raises(ValueError, match="did you mean 'teacher'"):
        read_settings(DistillSettings, path, ["teecher=x"])


# ---------------------------------------------------------------- a run


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save(small_model(seed=7), path, metadata={"licence": "none", "source": "test"})
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(5):
        Image.fromarray(photo(50 + 15 * i, 80, seed=i)).save(folder / f"{i}.png")
    return folder


def run_of(out, teacher, pictures, **changes):
    values = {
        "preset": "test",
        "teacher": str(teacher),
        "data": (str(pictures),),
        "out": str(out),
        "phases": (Phase(side=SIDE, batch=2, steps=2, lr=1e-3),),
        "warmup": 1,
        "workers": 0,
        "log_every": 1,
        "save_every": 1,
    }
    return DistillSettings(**{**values, **changes})


def test_a_student_comes_nearer_and_only_its_encoder_moves(tmp_path, teacher, pictures):
    phases = (Phase(side=SIDE, batch=5, steps=12, lr=2e-3),)
    run = run_of(tmp_path / "run", teacher, pictures, phases=phases, targets=str(tmp_path / "targets"), colour=0.0)
    said = []
    path = distill(run, say=said.append)
    assert said[0].startswith("5 of 5 targets to compute")
    lines = log_lines(run)
    assert lines[-1]["loss"] < 0.75 * lines[0]["loss"]
    assert lines[-1]["cosine"] > lines[0]["cosine"]
    assert lines[-1]["images"] == 60
    assert [line["loss"] for line in lines] == [line["embedding"] for line in lines]
    state, wanted = load_state(path), load_teacher(teacher).model.state_dict()
    begin = start_model(run).state_dict()
    for name, value in state["model"].items():
        if not name.startswith("encoder."):
            assert torch.equal(value, wanted[name]), name  # the teacher's own decoder
    moved = [n for n, v in state["model"].items() if n.startswith("encoder.") and not torch.equal(v, begin[n])]
    assert len(moved) > 40
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"images": 0}).Reload()
    shown = board.Images("train/clicks")[0]
    height, width = seen_first(run)
    assert (shown.width, shown.height) == (3 * width, height)  # the picture, the teacher's and the student's


def seen_first(run):
    """Height and width of the first picture of the run's first step."""
    looks = Looks(run, run.phases[0], find_pictures(run.data), None, 1)
    with closing(looks.batches(0, [0])) as steps:
        return next(steps)[0].pixels.shape[:2]


def test_cached_targets_are_those_the_teacher_gives_in_every_step(tmp_path, teacher, pictures):
    exact = {"stored": "float32", "colour": 0.0, "decoder_weight": 0.5, "prompts": 2}
    cached = run_of(tmp_path / "a", teacher, pictures, targets=str(tmp_path / "targets"), **exact)
    live = run_of(tmp_path / "b", teacher, pictures, **exact)
    distill(cached)
    distill(live)
    for x, y in zip(log_lines(cached), log_lines(live), strict=True):
        assert x["loss"] == pytest.approx(y["loss"], abs=1e-4)
        assert x["decoder"] == pytest.approx(y["decoder"], abs=1e-4) != 0
        assert x["loss"] == pytest.approx(x["embedding"] + 0.5 * x["decoder"], abs=2e-4)


@pytest.mark.parametrize("padding", ["ignored", "counted"])
@pytest.mark.parametrize("loss", ["mse", "cosine"])
def test_the_loss_is_the_formula(tmp_path, teacher, pictures, padding, loss):
    run = run_of(
        tmp_path,
        teacher,
        pictures,
        padding=padding,
        loss=loss,
        colour=0.0,
        phases=(Phase(side=SIDE, batch=5, steps=1, lr=0.0),),
    )
    distill(run)
    student, wise = start_model(run), load_teacher(teacher)
    student.encoder.anchor_side = SIDE // 2
    losses = []
    for path in sorted(pictures.iterdir()):
        pixels = read_image(path).pixels
        frame = Frame(*pixels.shape[:2], SIDE)
        found = student.encoder(prepare(pixels, SIDE, student.config).unsqueeze(0))[0]
        target, real = wise.targets([pixels], SIDE)[0], real_cells([frame])[0]
        keep = real if padding == "ignored" else torch.ones_like(real)
        each = (found - target).square().mean(0) if loss == "mse" else 1 - F.cosine_similarity(found, target, dim=0)
        losses.append(each[keep].mean().item())
    assert log_lines(run)[0]["loss"] == pytest.approx(np.mean(losses), abs=1e-4)


def test_the_student_sees_what_the_teacher_sees(pictures):
    """Mirrored and recoloured pictures; with a cache the colours change for the student alone."""
    path = sorted(pictures.iterdir())[2]
    plain = Reader(None)(Look(path, SIDE, 0.0, 0.0, 3)).pixels
    assert plain.shape == (SIDE, SIDE, 3)  # of 80 × 80
    mirrored = Reader(None)(Look(path, SIDE, 1.0, 0.0, 3)).pixels
    assert np.array_equal(mirrored, plain[:, ::-1])
    changed = Reader(None)(Look(path, SIDE, 0.0, 1.0, 3)).pixels
    assert changed.shape == plain.shape
    assert not np.array_equal(changed, plain)
    assert np.array_equal(changed, Reader(None)(Look(path, SIDE, 0.0, 1.0, 3)).pixels)


def test_every_picture_once_an_epoch_whoever_computes_it(tmp_path, teacher, pictures):
    """Two parts of two pictures each, in one process or two, against one part of four."""
    paths = find_pictures([pictures])
    run = run_of(tmp_path, teacher, pictures)

    def seen(batch, parts, rank):
        looks = Looks(run, Phase(side=SIDE, batch=batch, steps=5, lr=1e-3), paths, None, parts)
        with closing(looks.batches(0, [rank])) as steps:
            return [[one.pixels.tobytes() for one in next(steps)] for _ in range(5)]

    whole, halves = seen(4, 1, 0), [seen(2, 2, rank) for rank in (0, 1)]
    assert whole == [a + b for a, b in zip(*halves)]
    order = [picture for step in whole for picture in step]  # 20 of 5 pictures
    assert all(len(set(order[start : start + 5])) == len(paths) for start in range(0, 20, 5))


def test_a_missing_target_is_an_error(tmp_path, teacher, pictures, monkeypatch):
    run = run_of(tmp_path / "run", teacher, pictures, targets=str(tmp_path / "targets"))
    assert distill(run, targets_only=True) is None
    assert not (tmp_path / "run").exists()
    folder = tmp_path / "more"
    shutil.copytree(pictures, folder)
    Image.fromarray(photo(40, 40, seed=99)).save(folder / "new.png")
    monkeypatch.setattr(distilling, "build_targets", lambda *args, **options: None)
    more = run_of(
        tmp_path / "more run",
        teacher,
        folder,
        targets=str(tmp_path / "targets"),
        phases=(Phase(side=SIDE, batch=6, steps=1, lr=1e-3),),
    )
    with pytest.raises(MissingTarget, match=r"there is no target of a picture in .*; compute it first"):
        distill(more)
    other = run_of(tmp_path / "other", teacher, pictures, targets=str(tmp_path / "nowhere"))
    with pytest.raises(MissingTarget, match="compute them first"):
        distill(other)


def test_what_cannot_be_distilled_is_refused(tmp_path, teacher, pictures):
    with pytest.raises(ValueError, match="there is no folder for the targets; give one"):
        distill(run_of(tmp_path / "a", teacher, pictures), targets_only=True)
    bare = tmp_path / "bare.safetensors"
    save(HRSAM(replace(small_config(), decoder=False)), bare, metadata={"licence": "none", "source": "test"})
    with pytest.raises(ValueError, match=r"bare\.safetensors has no mask decoder; set decoder_weight=0"):
        distill(run_of(tmp_path / "b", bare, pictures, decoder_weight=1.0))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="there are no pictures"):
        distill(run_of(tmp_path / "c", teacher, tmp_path / "empty"))
    broken = tmp_path / "broken"
    shutil.copytree(pictures, broken)
    (broken / "1.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"broken/1\.png"):
        distill(run_of(tmp_path / "d", teacher, broken, phases=(Phase(side=SIDE, batch=5, steps=1, lr=1e-3),)))
    assert not list(tmp_path.glob("*/checkpoints/step-00000001*"))


def killed_child(run, step):
    use_small_preset()
    batches = Looks.batches

    def until(self, first, ranks):
        for number, batch in enumerate(batches(self, first, ranks), first):
            if number == step:
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch

    Looks.batches = until
    distill(run)


@pytest.mark.usefixtures("quick_processes")
@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_killed_run_goes_on_to_the_same_last_bit(tmp_path, teacher, pictures, workers):
    phases = (Phase(side=SIDE, batch=2, steps=3, lr=1e-3), Phase(side=32, batch=3, steps=3, lr=1e-3))
    changes = {
        "phases": phases,
        "save_every": 2,
        "targets": str(tmp_path / "targets"),
        "decoder_weight": 0.1,
        "drop_path": 0.3,
    }
    straight = run_of(tmp_path / "straight", teacher, pictures, **changes)
    distill(straight)
    run = run_of(tmp_path / "run", teacher, pictures, workers=workers, **changes)
    assert exit_code(killed_child, run, 5) == -signal.SIGKILL
    assert log_lines(run)[-1]["step"] == 5
    distill(run)
    assert_same_states(last_state(run), last_state(straight))
    assert_same_logs(run, straight)


SCRIPT = """
import sys
from hrsam.cli import main
from tests.tiny_training import use_small_preset
use_small_preset()
sys.argv = ["hrsam", "distill", *sys.argv[1:]]
main()
"""


@pytest.mark.slow
def test_two_processes_share_targets_and_steps(tmp_path, teacher, pictures):
    (tmp_path / "script.py").write_text(SCRIPT)
    one = run_of(tmp_path / "one", teacher, pictures, accumulate=2, targets=str(tmp_path / "targets"), stored="float32")
    distill(one)
    two = one.model_copy(update={"out": str(tmp_path / "two"), "accumulate": 1, "targets": str(tmp_path / "shared")})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(two.model_dump(mode="json")))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "script.py")]
    fresh = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command, str(tmp_path / "run.yaml")], env=fresh, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "shared").rglob("*.safetensors"))) == 2  # a shard of each process
    a, b = last_state(one), last_state(two)
    for name, value in a["model"].items():
        torch.testing.assert_close(b["model"][name], value, rtol=0, atol=2e-6, msg=name)


def test_false_colours_show_differences(tmp_path):
    g = torch.Generator().manual_seed(0)
    target = torch.randn(8, 6, 5, generator=g)
    a, b = false_colours(target, target)
    assert a.shape == (6, 5, 3)
    assert np.array_equal(a, b)
    assert a.std() > 30
    _, far = false_colours(target, -target + 2 * target.flatten(1).mean(1).view(8, 1, 1))
    assert abs(a.astype(int) + far - 255).max() <= 1  # the opposite of each
    flat = false_colours(torch.ones(8, 2, 2), torch.ones(8, 2, 2))
    assert flat[0].std() == 0


# ---------------------------------------------------------------- from pictures to a model


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_stages_from_the_shipped_configs(tmp_path, monkeypatch, capsys, whole, request):
    """Distil, export, tune with clicks, export: the commands of the configs, and the model they give answers clicks."""
    if not whole:
        request.getfixturevalue("quick_processes")
    short = [] if whole else ["phases.0.steps=6", "phases.1.steps=2", "log_every=1"]
    steps = 10 if whole else 6
    monkeypatch.chdir(tmp_path)
    write_photos(tmp_path / "part")
    hrsam_command("distill", CONFIGS / "toy_distill.yaml", "data=[part/images]", *short)
    hrsam_command("export", "out/toy_distill", "toy.safetensors")
    hrsam_command("train", CONFIGS / "toy_train.yaml", *short[::2])
    hrsam_command("export", "out/toy_train", "tuned.safetensors", "--half", "--licence", "mine")
    assert (
        f"from toy.safetensors, trained with simulated clicks, average weights of step {steps} ("
        in capsys.readouterr().out
    )
    distilled, tuned = (log_lines(SimpleNamespace(out=f"out/toy_{name}")) for name in ("distill", "train"))
    assert distilled[-1]["cosine"] > distilled[0]["cosine"] + 0.02
    assert tuned[-1]["step"] == steps
    stages = [load(name).state_dict() for name in ("toy.safetensors", "tuned.safetensors")]
    assert all(
        not torch.equal(stages[0][n], stages[1][n])
        for n in ("encoder.patch_embed.weight", "mask_decoder.iou_token.weight")
    )
    assert read_metadata("tuned.safetensors")["licence"] == "mine"
    hrsam_command(
        "predict", "part/images/shape1.png", "--click", "36,26", "--model", "tuned.safetensors", "--side", "64"
    )
    assert Path("mask.png").exists()
    with pytest.raises(SystemExit):
        hrsam_command("export", "part", "no.safetensors")
    assert "part holds no checkpoint; give the folder that was a training's out" in capsys.readouterr().err
    assert not Path("no.safetensors").exists()


def hrsam_command(*arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["hrsam", *map(str, arguments)])
        try:
            main()
        except SystemExit as end:
            if end.code:
                raise
