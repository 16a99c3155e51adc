"""Losses against their formulas written out, and their edges."""

import math

import pytest
import torch

from hrsam.losses import dice_loss, iou_target, normalized_focal_loss

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
