"""Losses of masks and of embeddings.

Each reduces over one picture (pixels or cells, and channels), keeps the leading dimensions, computes in float32 at least.
How pictures are joined is said by explicit weights, :func:`weighted_sum`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
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


def embedding_mse(student: Tensor, target: Tensor, real: Tensor | None = None) -> Tensor:
    """Mean over channels and real cells of the squared difference of two feature maps.

    ``student``, ``target`` (..., C, h, w), the target without gradient; ``real`` (..., h, w) bool: cells that show a part of
    the picture, ``None``: all -> (...).  No real cell gives 0, and what stands in the others does not matter.
    Raises ``ValueError`` for other shapes and types.
    Source: HRSAM (arXiv 2407.02109) with ``real=None``: the mean over 256 · 64 · 64, padding included.
    """
    student, target = _two_maps(student, target, real, channels=True)
    squared = _where(real, student - target).square()
    return squared.sum((-3, -2, -1)) / (student.shape[-3] * _count(real, student))


def embedding_cosine(student: Tensor, target: Tensor, real: Tensor | None = None) -> Tensor:
    """Mean over real cells of 1 − cosine of the angle between the two feature vectors; as :func:`embedding_mse`."""
    student, target = _two_maps(student, target, real, channels=True)
    if real is not None:
        student, target = (torch.where(real.unsqueeze(-3), x, 1.0) for x in (student, target))
    return (1 - F.cosine_similarity(student, target, dim=-3)).sum((-2, -1)) / _count(real, student)


def logit_divergence(student: Tensor, target: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean over valid pixels of the Kullback–Leibler divergence between two masks given as logits.

    With p and q the probabilities of object that ``target`` and ``student`` say: p log(p/q) + (1 − p) log((1 − p)/(1 − q)).
    Its gradient for a student's logit is (q − p) / |V|.  ``student``, ``target`` (..., H, W), the target without gradient;
    ``valid`` (..., H, W) bool or ``None`` (all) -> (...).  Raises ``ValueError`` for other shapes and types.
    """
    student, target = _two_maps(student, target, valid, channels=False)
    if valid is not None:
        student, target = student.masked_fill(~valid, 0), target.masked_fill(~valid, 0)
    p = torch.sigmoid(target)
    inside = p * (F.logsigmoid(target) - F.logsigmoid(student))
    outside = (1 - p) * (F.logsigmoid(-target) - F.logsigmoid(-student))
    return (inside + outside).sum((-2, -1)) / _count(valid, student)


def weighted_sum(losses: Tensor | Sequence[Tensor], weights: Tensor | Sequence[float]) -> Tensor:
    """Σ w_i · loss_i over the pictures at hand, with weights made from the counts of the whole step.

    ``losses``: (I,) or I scalars; ``weights``: I numbers without gradient -> scalar.  A mean over what happens to lie in one
    pack, micro-batch or process is not the mean over the step.  These weights are exact, however the step is cut up:

    * mean over pictures: 1 / I_global, so a cell of picture i with n_i real cells weighs 1 / (n_i · I_global);
    * mean over cells: n_i / Σ n over the step.

    Where gradients are averaged over processes, each process multiplies its weights by their number.  Raises ``ValueError``
    when the numbers of losses and weights differ.
    """
    losses = losses if isinstance(losses, Tensor) else torch.stack(list(losses))
    weights = torch.as_tensor(weights, dtype=losses.dtype, device=losses.device).detach()
    if losses.ndim != 1 or weights.shape != losses.shape:
        raise ValueError(
            f"got losses {tuple(losses.shape)} and weights {tuple(weights.shape)}; give one of each a picture"
        )
    return (losses * weights).sum()


def _two_maps(student: Tensor, target: Tensor, real: Tensor | None, channels: bool) -> tuple[Tensor, Tensor]:
    if student.shape != target.shape or student.ndim < 2 + channels:
        raise ValueError(
            f"student and target must have one shape, {'(..., C, h, w)' if channels else '(..., H, W)'}; "
            f"got {tuple(student.shape)} and {tuple(target.shape)}"
        )
    cells = student.shape[:-3] + student.shape[-2:] if channels else student.shape
    if real is not None and (real.dtype != torch.bool or real.shape != cells):
        raise ValueError(f"the mask must be bool {tuple(cells)}; got {real.dtype} {tuple(real.shape)}")
    dtype = torch.promote_types(student.dtype, torch.float32)
    return student.to(dtype), target.detach().to(dtype)


def _where(real: Tensor | None, maps: Tensor) -> Tensor:
    return maps if real is None else torch.where(real.unsqueeze(-3), maps, 0.0)


def _count(real: Tensor | None, maps: Tensor) -> Tensor | int:
    """Cells or pixels that count, at least 1: an empty picture has the loss 0."""
    return maps.shape[-2] * maps.shape[-1] if real is None else real.sum((-2, -1)).clamp(min=1)


def _checked(logits: Tensor, truth: Tensor, valid: Tensor | None) -> Tensor:
    for name, other in (("truth", truth), ("valid", valid)):
        if other is not None and (other.dtype != torch.bool or other.shape != logits.shape):
            shape, wanted = tuple(other.shape), tuple(logits.shape)
            raise ValueError(f"{name} must be bool with the shape of the logits, {wanted}; got {other.dtype} {shape}")
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
