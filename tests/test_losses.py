"""Losses against their formulas written out, and their edges."""

import math

import pytest
import torch

from hrsam.losses import (
    dice_loss,
    embedding_cosine,
    embedding_mse,
    iou_target,
    logit_divergence,
    normalized_focal_loss,
    weighted_sum,
)

EPS = torch.finfo(torch.float32).eps


def case(*shape, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(shape, generator=g, dtype=torch.float64)
    truth = torch.rand(shape, generator=g) < 0.4
    valid = torch.rand(shape, generator=g) < 0.8
    return logits.to(dtype), truth, valid


def focal_by_pixel(logits, truth, valid):
    """One picture in Python numbers: mean of -0.5 m (1 - q)² log(q + eps) over V, m = |V| / (Σ (1 - q)² + eps)."""
    wrong = []
    for z, y, v in zip(logits.flatten().tolist(), truth.flatten().tolist(), valid.flatten().tolist()):
        if v:
            wrong.append(abs(1 / (1 + math.exp(-z)) - y))
    m = len(wrong) / (sum(w * w for w in wrong) + EPS)
    return sum(-0.5 * m * w * w * math.log(min(1 - w + EPS, 1)) for w in wrong) / len(wrong)


def test_focal_by_hand():
    # Two pixels, q = 3/4 and 1/2: weights 1/16 and 1/4.
    logits, truth = torch.tensor([[math.log(3), 0.0]], dtype=torch.float64), torch.tensor([[True, False]])
    expected = 0.5 * (math.log(4 / 3) / 16 + math.log(2) / 4) / (1 / 16 + 1 / 4)
    assert normalized_focal_loss(logits, truth).item() == pytest.approx(expected, abs=1e-6)
    expected = (0.3 * math.log(4 / 3) / 16 + 0.7 * math.log(2) / 4) / (1 / 16 + 1 / 4)
    assert normalized_focal_loss(logits, truth, alpha=0.3).item() == pytest.approx(expected, abs=1e-6)


def test_focal_equals_the_sum_over_pixels():
    logits, truth, valid = case(3, 2, 5, 7)
    loss = normalized_focal_loss(logits, truth, valid)
    assert loss.shape == (3, 2)
    assert loss.dtype == torch.float64
    for i in range(3):
        for j in range(2):
            assert loss[i, j].item() == pytest.approx(focal_by_pixel(logits[i, j], truth[i, j], valid[i, j]), rel=1e-12)
    assert torch.equal(normalized_focal_loss(logits, truth), normalized_focal_loss(logits, truth, truth | ~truth))


def test_focal_gradient_holds_the_denominator_constant():
    logits, truth, valid = case(5, 7)
    logits.requires_grad_()
    (got,) = torch.autograd.grad(normalized_focal_loss(logits, truth, valid), logits)

    def loss(z, denominator):
        q = torch.where(truth, torch.sigmoid(z), torch.sigmoid(-z))
        total = ((1 - q) ** 2)[valid].sum() + EPS
        numerator = (-0.5 * (1 - q) ** 2 * torch.log(q + EPS))[valid].sum()
        return numerator / (total if denominator is None else denominator), total.item()

    constant = loss(logits, None)[1]
    (frozen,) = torch.autograd.grad(loss(logits, constant)[0], logits)
    (free,) = torch.autograd.grad(loss(logits, None)[0], logits)
    assert torch.allclose(got, frozen, rtol=1e-10, atol=0)
    assert (got - free).abs().max() > 0.1 * got.abs().max()  # the test can tell the two apart
    assert (got[~valid] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_logits_stay_finite(dtype):
    truth = torch.tensor([[True, False], [True, False]])
    right = torch.where(truth, 100.0, -100.0).to(dtype).requires_grad_()
    wrong = torch.where(truth, -100.0, 100.0).to(dtype).requires_grad_()
    for logits, low, high in ((right, 0.0, 1e-6), (wrong, 7.5, 8.5)):  # at worst 0.5 · -log eps = 7.97
        loss = normalized_focal_loss(logits, truth)
        assert loss.dtype == torch.float32
        assert low <= loss.item() <= high
        (gradient,) = torch.autograd.grad(loss + dice_loss(logits, truth), logits)
        assert torch.isfinite(gradient).all()
    assert dice_loss(right, truth).item() == pytest.approx(0, abs=1e-6)


def test_half_precision_is_computed_in_float32():
    logits, truth, valid = case(2, 64, 64, dtype=torch.bfloat16)
    for loss in (normalized_focal_loss, dice_loss):
        exact = loss(logits.double(), truth, valid)
        assert torch.allclose(loss(logits, truth, valid).double(), exact, rtol=1e-5)


@pytest.mark.parametrize("loss", [normalized_focal_loss, dice_loss])
def test_ignored_pixels_do_not_matter(loss):
    logits, truth, valid = case(2, 6, 6)
    filled = torch.where(valid, logits, torch.nan).requires_grad_()
    value = loss(filled, truth, valid)
    assert torch.equal(value, loss(logits, truth ^ ~valid, valid))
    (gradient,) = torch.autograd.grad(value.sum(), filled)
    assert torch.isfinite(gradient).all()
    assert (gradient[~valid] == 0).all()
    assert (gradient[valid] != 0).all()
    assert (loss(logits, truth, truth & ~truth) == 0).all()


@pytest.mark.parametrize("loss", [normalized_focal_loss, dice_loss])
def test_loss_falls_downhill(loss):
    logits, truth, _ = case(6, 6)
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(logits, truth), logits)
    assert ((gradient < 0) == truth).all()  # raise logits in the object, lower them outside


def test_dice_by_hand():
    logits = torch.tensor([[math.log(3), 0.0, -math.log(3)]], dtype=torch.float64)  # p = 3/4, 1/2, 1/4
    truth, valid = torch.tensor([[True, False, True]]), torch.tensor([[True, True, False]])
    assert dice_loss(logits, truth).item() == pytest.approx(1 - (2 * 1.0 + 1) / (1.5 + 2 + 1))
    assert dice_loss(logits, truth, valid).item() == pytest.approx(1 - (2 * 0.75 + 1) / (1.25 + 1 + 1))
    assert dice_loss(logits, truth, smooth=0.0).item() == pytest.approx(1 - 2 / 3.5)


def test_iou_target():
    logits = torch.tensor([[[1.0, 0.0], [-1.0, 2.0]], [[-1.0, -1.0], [-1.0, 0.0]]], requires_grad=True)
    truth = torch.tensor([[[True, True], [False, True]], [[False, False], [False, False]]])
    target = iou_target(logits, truth)
    assert not target.requires_grad
    assert target.dtype == torch.float32
    assert target.tolist() == pytest.approx([2 / 3, 1.0])


def test_losses_refuse():
    logits, truth, valid = case(2, 4, 4)
    for loss in (normalized_focal_loss, dice_loss, iou_target):
        with pytest.raises(ValueError, match=r"truth must be bool .*float64"):
            loss(logits, truth.double())
        with pytest.raises(ValueError, match=r"\(2, 4, 4\); got torch.bool \(4, 4\)"):
            loss(logits, truth[0])
    with pytest.raises(ValueError, match="valid must be bool"):
        normalized_focal_loss(logits, truth, valid[0])
    with pytest.raises(ValueError, match="gamma"):
        normalized_focal_loss(logits, truth, gamma=0.5)


# ---------------------------------------------------------------- embeddings


def maps(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    student, target = torch.randn(2, *shape, generator=g, dtype=torch.float64)
    real = torch.rand(*shape[:-3], *shape[-2:], generator=g) < 0.6
    return student.requires_grad_(), target, real


def embedding_by_cell(student, target, real, cosine):
    """One picture in Python numbers, cell by cell."""
    channels, height, width = student.shape
    each = []
    for y in range(height):
        for x in range(width):
            if real[y, x]:
                a, b = student[:, y, x].tolist(), target[:, y, x].tolist()
                if cosine:
                    dot, lengths = sum(p * q for p, q in zip(a, b)), [math.sqrt(sum(p * p for p in v)) for v in (a, b)]
                    each.append(1 - dot / (lengths[0] * lengths[1]))
                else:
                    each.append(sum((p - q) ** 2 for p, q in zip(a, b)) / channels)
    return sum(each) / len(each)


@pytest.mark.parametrize("loss", [embedding_mse, embedding_cosine])
def test_embedding_losses_equal_the_sum_over_cells(loss):
    student, target, real = maps(2, 3, 6, 5, 7)
    got = loss(student, target, real)
    assert got.shape == (2, 3)
    assert got.dtype == torch.float64
    for i in range(2):
        for j in range(3):
            expected = embedding_by_cell(student[i, j], target[i, j], real[i, j], loss is embedding_cosine)
            assert got[i, j].item() == pytest.approx(expected, rel=1e-12)
    assert torch.equal(loss(student, target), loss(student, target, real | ~real))
    assert loss(target, target).abs().max() < 1e-12
    assert torch.autograd.gradcheck(lambda s: loss(s, target, real), student)


def test_the_papers_mean_counts_every_number_of_the_map():
    student, target, _ = maps(256, 4, 4)
    total = sum((a - b) ** 2 for a, b in zip(student.flatten().tolist(), target.flatten().tolist()))
    assert embedding_mse(student, target).item() == pytest.approx(total / (256 * 4 * 4), rel=1e-12)


@pytest.mark.parametrize("loss", [embedding_mse, embedding_cosine])
def test_cells_of_padding_do_not_matter(loss):
    student, target, real = maps(2, 4, 6, 6)
    filled = torch.where(real.unsqueeze(1), student.detach(), torch.nan).requires_grad_()
    value = loss(filled, torch.where(real.unsqueeze(1), target, torch.nan), real)
    assert torch.equal(value, loss(student, target, real))
    (gradient,) = torch.autograd.grad(value.sum(), filled)
    assert torch.isfinite(gradient).all()
    assert (gradient.movedim(1, -1)[~real] == 0).all()
    assert (gradient.movedim(1, -1)[real] != 0).all()
    assert (loss(student, target, real & ~real) == 0).all()


@pytest.mark.parametrize("loss", [embedding_mse, embedding_cosine])
def test_a_ragged_map_has_the_loss_of_its_cells_in_the_square(loss):
    student, target, _ = maps(3, 8, 8)
    real = torch.zeros(8, 8, dtype=torch.bool)
    real[:5, :7] = True
    alone = loss(student[:, :5, :7], target[:, :5, :7])
    assert loss(student, target, real).item() == pytest.approx(alone.item(), rel=1e-14)


@pytest.mark.parametrize("loss", [embedding_mse, embedding_cosine])
def test_embeddings_of_half_precision_are_compared_in_float32(loss):
    student, target, real = maps(2, 64, 8, 8)
    student, target = student.detach().bfloat16(), target.bfloat16()
    exact = loss(student.double(), target.double(), real)
    got = loss(student, target, real)
    assert got.dtype == torch.float32
    assert torch.allclose(got.double(), exact, rtol=1e-5)


def test_no_gradient_reaches_a_target():
    student, target, _ = maps(4, 3, 3)
    target.requires_grad_()
    for loss in (embedding_mse, embedding_cosine, logit_divergence):
        loss(student, target).sum().backward()
    assert target.grad is None
    assert student.grad is not None


def test_divergence_by_hand_and_its_gradient():
    logits, target, valid = case(2, 5, 7)[0].requires_grad_(), case(2, 5, 7, seed=1)[0], case(2, 5, 7)[2]
    got = logit_divergence(logits, target, valid)
    for i in range(2):
        each = []
        for z, t, v in zip(logits[i].flatten().tolist(), target[i].flatten().tolist(), valid[i].flatten().tolist()):
            if v:
                p, q = 1 / (1 + math.exp(-t)), 1 / (1 + math.exp(-z))
                each.append(p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)))
        assert got[i].item() == pytest.approx(sum(each) / len(each), rel=1e-10)
    (gradient,) = torch.autograd.grad(got.sum(), logits)
    expected = (torch.sigmoid(logits) - torch.sigmoid(target)) / valid.sum((-2, -1), keepdim=True) * valid
    assert torch.allclose(gradient, expected, rtol=1e-10, atol=1e-14)
    assert (logit_divergence(target, target) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_divergence_of_extreme_logits_stays_finite(dtype):
    far = torch.tensor([[-1e4, 1e4, 0.0, 1e4]], dtype=dtype)
    student = torch.tensor([[1e4, -1e4, 1e4, 1e4]], dtype=dtype, requires_grad=True)
    value = logit_divergence(student, far)
    assert value.isfinite().all()
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert gradient.isfinite().all()


def step_gradient(parameter, pictures, weights):
    """d/d parameter of Σ w_i · loss_i for pictures (feature map, target) of several sizes."""
    losses = [embedding_mse(x * parameter.view(-1, 1, 1), t) for x, t in pictures]
    return torch.autograd.grad(weighted_sum(losses, weights), parameter)[0]


def test_weights_make_the_step_the_same_however_it_is_cut_up():
    """Mean over pictures and over cells: the formula with a weight for every cell, micro-batches, and processes."""
    g = torch.Generator().manual_seed(0)
    sizes = [(1, 1), (5, 7), (2, 3), (8, 1), (4, 4)]
    pictures = [torch.randn(2, 6, h, w, generator=g, dtype=torch.float64).unbind() for h, w in sizes]
    parameter = torch.randn(6, generator=g, dtype=torch.float64).requires_grad_()
    counts = [h * w for h, w in sizes]
    for of_picture in ([1 / 5] * 5, [n / sum(counts) for n in counts]):
        of_cell = torch.cat([torch.full((n,), w / n, dtype=torch.float64) for n, w in zip(counts, of_picture)])
        cells = torch.cat([x.flatten(1) for x, _ in pictures], 1), torch.cat([t.flatten(1) for _, t in pictures], 1)
        packed = (of_cell * (cells[0] * parameter.unsqueeze(1) - cells[1]).square().mean(0)).sum()
        (expected,) = torch.autograd.grad(packed, parameter)
        assert torch.allclose(step_gradient(parameter, pictures, of_picture), expected, rtol=1e-12, atol=0)
        parts = [slice(0, 2), slice(2, 3), slice(3, 5)]
        accumulated = sum(step_gradient(parameter, pictures[part], of_picture[part]) for part in parts)
        assert torch.allclose(accumulated, expected, rtol=1e-12, atol=0)
        ranks = [step_gradient(parameter, pictures[p], [3 * w for w in of_picture[p]]) for p in parts]
        assert torch.allclose(torch.stack(ranks).mean(0), expected, rtol=1e-12, atol=0)
    pack_means = [step_gradient(parameter, pictures[p], [1 / (p.stop - p.start)] * (p.stop - p.start)) for p in parts]
    assert not torch.allclose(torch.stack(pack_means).mean(0), expected, rtol=0.1)  # the test can tell


def test_embedding_losses_refuse():
    student, target, real = maps(2, 4, 3, 3)
    for loss in (embedding_mse, embedding_cosine):
        with pytest.raises(ValueError, match=r"one shape, \(\.\.\., C, h, w\); got \(2, 4, 3, 3\) and \(4, 3, 3\)"):
            loss(student, target[0])
        with pytest.raises(ValueError, match=r"must be bool \(2, 3, 3\); got torch.bool \(3, 3\)"):
            loss(student, target, real[0])
        with pytest.raises(ValueError, match="must be bool"):
            loss(student, target, real.double())
        with pytest.raises(ValueError, match="one shape"):
            loss(student[0, 0], target[0, 0])
    with pytest.raises(ValueError, match="one of each a picture"):
        weighted_sum(embedding_mse(student, target), [1.0])
