"""Teachers: what they see, what they give, what they refuse."""

import hashlib
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from hrsam.data.transforms import MEAN, STD
from hrsam.frame import Frame
from hrsam.losses import embedding_mse
from hrsam.models.model import HRSAM, ModelConfig
from hrsam.models.sam_vit import SamVitConfig
from hrsam.teachers import check_pair, load_teacher, prepare, real_cells, teacher_config
from hrsam.weightfile import save
from hrsam.weights import WeightsError, convert
from tests.builders import photo, small_config, small_model
from tests.numerics import assert_within_budget

SIDE = 64
ABOUT = {"licence": "none", "source": "test"}
SMALL_SAM = SamVitConfig(width=32, depth=2, heads=2, global_at=(1,), window=3, image_size=SIDE)
PICTURES = [photo(40, 60), photo(90, 50, seed=1), photo(64, 64, seed=2)]


def written(model, path):
    save(model, path, metadata=ABOUT)
    return path


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    return written(small_model(), tmp_path_factory.mktemp("weights") / "ours.safetensors")


@pytest.fixture(scope="module")
def sam(tmp_path_factory):
    torch.manual_seed(0)
    model = HRSAM(ModelConfig("sam_custom", SMALL_SAM)).eval()
    with torch.no_grad():  # timm begins with zeros, which would hide wiring mistakes
        for name, parameter in model.encoder.named_parameters():
            if "rel_pos" in name or "pos_embed" in name:
                parameter.normal_()
    return written(model, tmp_path_factory.mktemp("weights") / "sam.safetensors")


@pytest.mark.parametrize("kind", ["ours", "sam"])
def test_a_teacher_gives_the_embeddings_of_its_weight_file(kind, request):
    teacher = load_teacher(request.getfixturevalue(kind))
    assert teacher_config(teacher.path) == teacher.model.config
    assert not teacher.model.training
    assert not any(p.requires_grad for p in teacher.model.parameters())
    config = teacher.model.config
    got = teacher.targets(PICTURES, SIDE)
    for picture, target in zip(PICTURES, got):
        assert target.shape == (256, 4, 4)
        assert target.dtype == torch.float32
        assert not target.requires_grad
        seen = Frame(*picture.shape[:2], SIDE).prepare(picture, config.mean, config.std, bgr=config.bgr)
        assert torch.equal(target, teacher.model.encoder.encode([seen])[0])
    assert torch.equal(got[1], teacher.targets(PICTURES[1:2], SIDE)[0])


def test_a_tag_is_a_teacher():
    teacher = load_teacher("hrsam_pp_t.starter")
    assert teacher.model.config.preset == "hrsam_pp_t"
    assert teacher.sha256 == hashlib.sha256(teacher.path.read_bytes()).hexdigest()


def test_the_encoder_of_hq_sam_is_a_teacher(sam, tmp_path):
    """Its file has SAM's names and more of its own in the decoder."""
    state = load_teacher(sam).model.state_dict()
    foreign = {
        name.replace("encoder.vit.", "image_encoder.").replace(".mlp.fc", ".mlp.lin"): value
        for name, value in state.items()
        if name.startswith("encoder.")
    }
    foreign |= {
        "mask_decoder.hf_token.weight": torch.ones(1, 256),
        "mask_decoder.hf_mlp.layers.0.bias": torch.ones(256),
    }
    torch.save(foreign, tmp_path / "sam_hq.pth")
    convert(tmp_path / "sam_hq.pth", tmp_path / "hq.safetensors", "sam", encoder_only=True)
    hq = load_teacher(tmp_path / "hq.safetensors")
    for a, b in zip(hq.targets(PICTURES, SIDE), load_teacher(sam).targets(PICTURES, SIDE)):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match=r"hq\.safetensors has no mask decoder"):
        hq.logits(torch.zeros(1, 256, 4, 4), torch.zeros(1, 1, 2), torch.ones(1, 1))


@pytest.mark.parametrize("kind", ["ours", "sam"])
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_precision_is_of_products_and_results(kind, precision, request):
    path = request.getfixturevalue(kind)
    exact, rough = (load_teacher(path, precision=p).targets(PICTURES[:1], SIDE)[0] for p in (torch.float32, precision))
    assert rough.dtype == precision
    error = (rough.float() - exact).abs().max()
    assert 0 < error < 0.1 * exact.abs().max()


def other_looks(path, tmp_path, **changes):
    """The same teacher as ``path`` that expects its pixels otherwise: the first layer is changed to make up for it."""
    model = load_teacher(path).model
    conv, config = model.encoder.patch_embed, model.config
    mean, std = (torch.tensor(v, dtype=torch.float64) for v in (changes.get("mean", MEAN), changes.get("std", STD)))
    weight, bias = conv.weight.detach().double(), conv.bias.detach().double()
    if changes.get("bgr"):
        mean, std = mean.flip(0), std.flip(0)  # now in the order of red, green, blue
    old_mean, old_std = torch.tensor(MEAN, dtype=torch.float64), torch.tensor(STD, dtype=torch.float64)
    new = weight * (std / old_std).view(1, 3, 1, 1)
    bias = bias + (weight * ((mean - old_mean) / old_std).view(1, 3, 1, 1)).sum((1, 2, 3))
    conv.weight.copy_(new.flip(1) if changes.get("bgr") else new)
    conv.bias.copy_(bias)
    model.config = replace(config, **changes)
    return load_teacher(written(model, tmp_path / "other.safetensors"))


LOOKS = {"bgr": True, "mean": (100.0, 110.0, 120.0), "std": (50.0, 60.0, 70.0)}


def test_a_teacher_sees_pictures_in_its_own_colours(ours, tmp_path):
    """No padding in this picture, whose zeros mean another colour to another teacher."""
    square = PICTURES[2:]
    got, expected = other_looks(ours, tmp_path, **LOOKS).targets(square, SIDE), load_teacher(ours).targets(square, SIDE)
    assert torch.allclose(got[0], expected[0], atol=1e-4)
    wrong = load_teacher(tmp_path / "other.safetensors").model
    wrong.config = replace(wrong.config, bgr=False)
    as_rgb = wrong.encode_normalised([prepare(square[0], SIDE, wrong.config)])[0].features[0]
    assert not torch.allclose(as_rgb, expected[0], atol=1e-1)  # the test can tell


@pytest.mark.parametrize("changes", [{}, LOOKS], ids=["as in training", "bgr"])
def test_canvases_and_pictures_give_the_same(ours, tmp_path, changes):
    teacher = other_looks(ours, tmp_path, **changes) if changes else load_teacher(ours)
    frames = [Frame(*picture.shape[:2], SIDE) for picture in PICTURES]
    canvases = torch.stack([frame.prepare(p, MEAN, STD) for frame, p in zip(frames, PICTURES)])
    valid = torch.zeros(3, 1, SIDE, SIDE, dtype=torch.bool)
    for i, frame in enumerate(frames):
        height, width = frame.resized
        valid[i, :, :height, :width] = True
    got = teacher.on_canvases(canvases, valid)
    expected = torch.stack(teacher.targets(PICTURES, SIDE))
    assert torch.allclose(got, expected, atol=1e-4)
    cells = F.max_pool2d(valid.float(), 16)[:, 0] > 0
    assert torch.equal(real_cells(frames), cells)
    assert cells.sum().item() == 3 * 4 + 4 * 3 + 16


def test_a_student_without_the_padding_has_the_real_cells(ours):
    for picture in PICTURES:
        seen = prepare(picture, SIDE, small_config(), square=False)
        real = real_cells([Frame(*picture.shape[:2], SIDE)])[0]
        rows, columns = seen.shape[1] // 16, seen.shape[2] // 16
        assert (rows, columns) == (int(real.any(1).sum()), int(real.any(0).sum()))
        assert torch.equal(seen, prepare(picture, SIDE, small_config())[:, : 16 * rows, : 16 * columns])


def test_what_does_not_fit_is_refused(ours, sam, tmp_path):
    sam_teacher, teacher = load_teacher(sam), load_teacher(ours)
    check_pair(sam_teacher.model.config, small_config(), SIDE)
    with pytest.raises(ValueError, match="sam_custom takes a side of 64 pixels only; got 128"):
        check_pair(sam_teacher.model.config, small_config(), 128)
    with pytest.raises(ValueError, match="takes a side of 64 pixels only; got 128"):
        check_pair(teacher.model.config, sam_teacher.model.config, 128)
    with pytest.raises(ValueError, match="takes a side of 64 pixels only; got 128"):
        sam_teacher.targets(PICTURES, 128)
    with pytest.raises(
        ValueError, match="gives 256 channels for every 16 pixels and the student test 128 for every 16"
    ):
        check_pair(teacher.model.config, small_config(out_channels=128), SIDE)
    with pytest.raises(ValueError, match="256 for every 8;"):
        check_pair(teacher.model.config, small_config(patch=8), SIDE)
    with pytest.raises(ValueError, match=r"got precision torch\.float64"):
        load_teacher(ours, precision=torch.float64)
    with pytest.raises(ValueError, match="sam_h is an architecture"):
        load_teacher("sam_h")
    with pytest.raises(WeightsError, match="there is no weight file"):
        load_teacher(tmp_path / "none.safetensors")


@pytest.fixture
def prompt():
    """Two clicks in each of two pictures."""
    return torch.tensor([[[20.0, 30.0], [50.0, 8.0]]] * 2), torch.tensor([[1, 0]] * 2)


def test_the_teachers_decoder_judges_the_students_features(ours, prompt):
    teacher = load_teacher(ours)
    target = torch.stack(teacher.targets(PICTURES[:2], SIDE))
    noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(0))
    student = (target + 0.3 * noise).requires_grad_()
    loss = teacher.decoder_loss(student, target, *prompt)
    assert loss.shape == (2,)
    assert (loss > 0).all()
    loss.sum().backward()
    assert student.grad is not None
    assert student.grad.abs().max() > 0
    assert all(p.grad is None for p in teacher.model.parameters())
    assert teacher.decoder_loss(target, target, *prompt).abs().max() < 1e-6
    with torch.no_grad():  # along the gradient it falls
        better = teacher.decoder_loss(student - 1e-2 * student.grad / student.grad.norm(), target, *prompt)
    assert better.sum() < loss.sum()


def test_the_decoders_gradient_against_float64(ours, prompt):
    teacher = load_teacher(ours)
    target = torch.stack(teacher.targets(PICTURES[:2], SIDE))
    student = target + 0.3 * torch.randn(target.shape, generator=torch.Generator().manual_seed(0))

    def gradient(model, student, target):
        student = student.detach().requires_grad_()
        positions = model.dense_positions((4, 4))
        found, wanted = (
            model.decode_prompts(
                x, positions, torch.cat((prompt[0], torch.zeros(2, 1, 2)), 1).to(x.dtype),
                torch.cat((prompt[1], torch.full((2, 1), -1)), 1), None, (0, 1, 2, 3),
            )[0]
            for x in (student, target)
        )  # fmt: skip
        p, q = torch.sigmoid(wanted).detach(), torch.sigmoid(found)
        divergence = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        return torch.autograd.grad(divergence.mean((1, 2, 3)).sum(), student)[0]

    leaf = student.detach().requires_grad_()
    (got,) = torch.autograd.grad(teacher.decoder_loss(leaf, target, *prompt).sum(), leaf)
    low = gradient(teacher.model, student, target)
    high = gradient(teacher.model.double(), student.double(), target.double())
    assert_within_budget(got, low, high, factor=3.0)


def test_cells_of_padding_do_not_count_for_the_decoder_loss(ours, prompt):
    """Masks are compared where the picture is; what the decoder reads elsewhere still reaches it."""
    teacher = load_teacher(ours)
    target = torch.stack(teacher.targets(PICTURES[:2], SIDE))
    student = target + torch.randn(target.shape, generator=torch.Generator().manual_seed(0))
    real = real_cells([Frame(*picture.shape[:2], SIDE) for picture in PICTURES[:2]])
    found, wanted = teacher.logits(student, *prompt), teacher.logits(target, *prompt)
    pixels = [(slice(0, 12), slice(0, 16)), (slice(0, 16), slice(0, 12))]
    for i, loss in enumerate(teacher.decoder_loss(student, target, *prompt, real=real)):
        q, p = (torch.sigmoid(x[i][(slice(None), *pixels[i])].double()) for x in (found, wanted))
        divergence = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        assert loss.item() == pytest.approx(divergence.mean().item(), rel=1e-4)


def test_embedding_loss_of_a_teacher_against_itself_is_nothing(ours):
    teacher = load_teacher(ours)
    target = torch.stack(teacher.targets(PICTURES, SIDE))
    assert (embedding_mse(target, target, real_cells([Frame(*p.shape[:2], SIDE) for p in PICTURES])) == 0).all()
