"""Losses of masks.  Each reduces over the pixels (H, W), keeps the leading dimensions, computes in float32 at least."""

from __future__ import annotations

import torch
from torch import Tensor

from hrsam.metrics import iou


def normalized_focal_loss(
    logits: Tensor,
    truth: Tensor,
    valid: Tensor | None = None,
    *,
    alpha: float = 0.5,
    gamma: float = 2.0,
    eps: float = torch.finfo(torch.float32).eps,
) -> Tensor:
    """Focal loss whose weights are scaled to a mean of 1, so it does not fade as the mask gets right.

    With q the probability given to the true class, w = (1 − q)^gamma and a = ``alpha`` inside the object, 1 − ``alpha``
    outside::

        Σ a · w · −log min(q + eps, 1)  /  (Σ w + eps)        sums over the valid pixels of one picture

    The denominator is a constant for the gradient; the weights above it are not.  Exactly right logits give 0, no valid
    pixel gives 0.
    ``logits`` (..., H, W), ``truth`` bool, ``valid`` bool or ``None`` (all), of one shape -> (...).  ``gamma`` >= 1.
    Raises ``ValueError`` for other shapes and types.
    Source: Sofiiuk et al., "AdaptIS" (arXiv 1909.07829), §3.3; constants as in HRSAM (arXiv 2407.02109).
    """
    if gamma < 1:
        raise ValueError(f"gamma must be at least 1, or the gradient of a right pixel is unbounded; got {gamma}")
    logits = _checked(logits, truth, valid)
    margin = torch.where(truth, logits, -logits)
    if valid is not None:
        margin = margin.masked_fill(~valid, torch.inf)  # certain and right: no weight, no loss, no gradient
    weight = torch.sigmoid(-margin) ** gamma
    surprise = -(torch.sigmoid(margin) + eps).clamp(max=1).log()
    balance = torch.where(truth, alpha, 1 - alpha).to(logits.dtype)
    return (balance * weight * surprise).sum((-2, -1)) / (weight.sum((-2, -1)).detach() + eps)


def dice_loss(logits: Tensor, truth: Tensor, valid: Tensor | None = None, *, smooth: float = 1.0) -> Tensor:
    """1 − (2 Σ p·y + smooth) / (Σ p + Σ y + smooth), p the probability of object: 1 minus a soft Dice coefficient.

    ``smooth`` pixels make an empty mask of an empty object perfect.  Shapes as in :func:`normalized_focal_loss`.
    Source: Milletari et al., "V-Net" (arXiv 1606.04797), §3, without squares in the denominator.
    """
    logits = _checked(logits, truth, valid)
    if valid is not None:
        logits, truth = logits.masked_fill(~valid, -torch.inf), truth & valid
    p = torch.sigmoid(logits)
    both = torch.where(truth, p, 0).sum((-2, -1))
    return 1 - (2 * both + smooth) / (p.sum((-2, -1)) + truth.sum((-2, -1)) + smooth)


def iou_target(logits: Tensor, truth: Tensor) -> Tensor:
    """What the IoU head should predict: IoU of the mask ``logits > 0`` with ``truth``, without gradient.

    ``logits`` and ``truth`` bool, both (..., H, W) -> (...) float32.  An empty mask of an empty object gives 1.
    """
    _checked(logits, truth, None)
    return iou(logits > 0, truth)


def _checked(logits: Tensor, truth: Tensor, valid: Tensor | None) -> Tensor:
    for name, other in (("truth", truth), ("valid", valid)):
        if other is not None and (other.dtype != torch.bool or other.shape != logits.shape):
            shape, wanted = tuple(other.shape), tuple(logits.shape)
            raise ValueError(f"{name} must be bool with the shape of the logits, {wanted}; got {other.dtype} {shape}")
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
