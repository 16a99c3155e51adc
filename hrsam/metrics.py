"""Measures of interactive segmentation: overlap of two masks, and how many clicks an overlap costs.

A table ``ious`` (n, k) holds one sample a row, column j the IoU after click j + 1.  Every session is played to the last
click; one that ends early, because nothing is wrong any more, repeats its last IoU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def iou(a: np.ndarray | Tensor, b: np.ndarray | Tensor) -> Any:
    """Intersection over union of bool masks (..., H, W), NumPy or torch -> (...) of the same kind; two empty give 1.

    Raises ``ValueError`` for masks that are not bool or differ in shape.
    """
    kind = torch.bool if isinstance(a, Tensor) else bool
    if a.dtype != kind or b.dtype != kind or a.shape != b.shape:
        raise ValueError(
            f"masks must be bool and of one shape; got {a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)}"
        )
    if isinstance(a, np.ndarray) and a.ndim == 2:  # counting all at once is ten times as fast as adding along axes
        intersection, union = np.count_nonzero(a & b), np.count_nonzero(a | b)
    else:
        intersection, union = (a & b).sum((-2, -1)), (a | b).sum((-2, -1))
    empty = union == 0
    return (intersection + empty) / (union + empty)


def boundary_iou(a: np.ndarray, b: np.ndarray, *, share: float = 0.02) -> float:
    """IoU of the inner boundary bands of two masks (H, W) bool; two empty masks give 1.

    The band is what an erosion by d pixels (chessboard distance, the outside counts as background) takes away, with
    d = ``share`` of the picture's diagonal, rounded, at least 1.
    Source: Cheng et al., "Boundary IoU" (arXiv 2103.16562), §4.
    """
    if a.dtype != bool or a.ndim != 2:
        raise ValueError(f"masks must be bool arrays (H, W); got {a.dtype} {a.shape}")
    width = max(1, round(share * float(np.hypot(*a.shape))))
    return float(iou(_band(a, width), _band(b, width)))


def _band(mask: np.ndarray, width: int) -> np.ndarray:
    import cv2

    framed = np.pad(mask.view(np.uint8), 1)
    return mask & (cv2.distanceTransform(framed, cv2.DIST_C, cv2.DIST_MASK_3)[1:-1, 1:-1] <= width)


def thin_part(mask: np.ndarray, *, share: float = 0.01) -> np.ndarray:
    """What is thin of a mask (H, W) bool: what an opening by a disc takes away.

    The disc's diameter is ``share`` of the picture's diagonal, at least 3 pixels; the picture's edge is no boundary, so
    that objects cut by it are not thin there.  Corners lose a few pixels to any opening: a part below 1 % of the mask
    counts as none, all False.  Ours; for the recall of antlers, poles and cables.
    """
    import cv2

    if mask.dtype != bool or mask.ndim != 2:
        raise ValueError(f"a mask must be a bool array (H, W); got {mask.dtype} {mask.shape}")
    radius = max(1.5, share * float(np.hypot(*mask.shape)) / 2)

    def distance(region: np.ndarray) -> np.ndarray:
        return cv2.distanceTransform(region.view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)

    if mask.all():
        return np.zeros_like(mask)
    core = distance(mask) > radius
    thin = mask & (distance(~core) > radius) if core.any() else mask.copy()
    return thin if thin.sum() >= 0.01 * mask.sum() else np.zeros_like(mask)


def clicks_needed(ious: np.ndarray, threshold: float, max_clicks: int = 20) -> np.ndarray:
    """Clicks (n,) until the IoU is at least ``threshold``; ``max_clicks`` if it never is.

    Raises ``ValueError`` for a table without samples, with fewer than ``max_clicks`` columns or with NaN.
    """
    reached = _table(ious, max_clicks)[:, :max_clicks] >= threshold
    return np.where(reached.any(1), reached.argmax(1) + 1, max_clicks)


def noc(ious: np.ndarray, threshold: float, max_clicks: int = 20) -> float:
    """Number of clicks: the mean of :func:`clicks_needed` (NoC@threshold)."""
    return float(clicks_needed(ious, threshold, max_clicks).mean())


def failures(ious: np.ndarray, threshold: float, max_clicks: int = 20) -> dict[str, int]:
    """Number of failed samples, by both definitions in use.

    ``never_reached`` (ours): the IoU is below ``threshold`` after each of the first ``max_clicks`` clicks.
    ``equals_max`` (RITM, SimpleClick, SegNext: "NoF"): :func:`clicks_needed` is ``max_clicks``, so a success at the
    last click counts too.
    """
    never = (_table(ious, max_clicks)[:, :max_clicks] < threshold).all(1)
    last = clicks_needed(ious, threshold, max_clicks) == max_clicks
    return {"never_reached": int(never.sum()), "equals_max": int(last.sum())}


def mean_iou_after(ious: np.ndarray, clicks: int) -> float:
    """Mean IoU after click number ``clicks`` (1 is the first); 5 gives the literature's "5-mIoU"."""
    if clicks < 1:
        raise ValueError(f"clicks are counted from 1; got {clicks}")
    return float(_table(ious, clicks)[:, clicks - 1].mean())


def _table(ious: np.ndarray, columns: int) -> np.ndarray:
    ious = np.asarray(ious)
    if ious.ndim != 2 or len(ious) == 0 or ious.shape[1] < columns:
        raise ValueError(f"expected IoUs of at least one sample and {columns} clicks, (n, k); got shape {ious.shape}")
    if np.isnan(ious).any():
        raise ValueError(f"sample {int(np.isnan(ious).any(1).argmax())} has an IoU that is not a number")
    return ious
