"""Settings of a distillation, its recipes, and that its parts fit together."""

from pathlib import Path

import pytest
import torch
from PIL import Image

import hrsam
from hrsam.config import read_settings
from hrsam.data.transforms import CanvasSettings
from hrsam.distill import DistillSettings
from hrsam.frame import Frame
from hrsam.images import read_image
from hrsam.losses import embedding_mse, weighted_sum
from hrsam.models.presets import PRESETS, build
from hrsam.targets import Targets, build_targets, find_pictures, kind_of_file
from hrsam.teachers import check_pair, load_teacher, prepare, real_cells, teacher_config
from hrsam.train import TrainSettings
from hrsam.weightfile import save
from tests.builders import photo, small_model

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


@pytest.mark.parametrize("square", [True, False])
def test_a_student_learns_from_cached_targets(tmp_path, square):
    """Square pictures and pictures without padding, a dozen steps: the student comes nearer to the teacher."""
    save(small_model(), tmp_path / "teacher.safetensors", metadata={"licence": "none", "source": "test"})
    (tmp_path / "pictures").mkdir()
    for i in range(4):
        Image.fromarray(photo(50 + 20 * i, 80, seed=i)).save(tmp_path / "pictures" / f"{i}.png")
    paths = find_pictures([tmp_path / "pictures"])
    build_targets(paths, load_teacher(tmp_path / "teacher.safetensors"), tmp_path / "targets", side=SIDE)
    there = Targets(tmp_path / "targets", kind_of_file(tmp_path / "teacher.safetensors", SIDE))
    wanted = [there.get(path) for path in paths]
    student = small_model(anchor_side=None, seed=1).train()
    pictures = [read_image(path).pixels for path in paths]
    seen = [prepare(picture, SIDE, student.config, square=square) for picture in pictures]
    real = list(real_cells([Frame(*picture.shape[:2], SIDE) for picture in pictures]))
    optimizer = torch.optim.Adam(student.encoder.parameters(), lr=1e-3)
    values = []
    for _ in range(12):
        maps = student.encoder.encode(seen)
        if square:
            losses = [embedding_mse(m, w, r) for m, w, r in zip(maps, wanted, real)]
        else:
            losses = [embedding_mse(m, w[:, : m.shape[1], : m.shape[2]]) for m, w in zip(maps, wanted)]
        loss = weighted_sum(losses, [1 / 4] * 4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.75 * values[0]
