"""Clicks, and the simulated user who places the next one.

Coordinates are (x, y) pixels of the original picture, origin top left.  Whole numbers are pixel centres: pixel i covers
[i − ½, i + ½).

The simulated user looks at the two kinds of error, missed object and extra mask, and clicks where an error is deepest,
that is farthest from its boundary (the picture's edge is boundary too).  Rules in use differ in details that move
scores, see :func:`next_click`; a score is comparable only with scores of the same rule.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real

import numpy as np
import torch
from torch import Tensor

from hrsam.ops.distance import squared_distance

RULES = ("frozen", "hrsam", "ritm")


@dataclass(frozen=True)
class Click:
    """One click: ``x``, ``y`` in pixels of the original picture, ``positive`` for object, else background.

    Raises ``ValueError`` for coordinates that are not finite numbers and labels other than ``True``, ``False``, 0, 1.
    """

    x: float
    y: float
    positive: bool = True

    def __post_init__(self) -> None:
        for name in ("x", "y"):
            value = getattr(self, name)
            if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
                raise ValueError(f"a click's {name} must be a finite number of pixels; got {value!r}")
            object.__setattr__(self, name, float(value))
        if not isinstance(self.positive, (Real, np.bool_)) or self.positive not in (0, 1):
            raise ValueError(f"a click's label must be 1 (object) or 0 (background); got {self.positive!r}")
        object.__setattr__(self, "positive", bool(self.positive))


def parse_click(text: str) -> Click:
    """``"X,Y"`` or ``"X,Y,1"`` (object), ``"X,Y,0"`` (background) -> :class:`Click`; else ``ValueError``."""
    parts = text.split(",")
    try:
        x, y, label = parts if len(parts) == 3 else (*parts, "1")
        return Click(float(x), float(y), {"0": False, "1": True}[label.strip()])
    except (ValueError, KeyError):
        raise ValueError(f"a click is X,Y or X,Y,1 (object) or X,Y,0 (background) in pixels; got {text!r}") from None


def check_clicks(clicks: Sequence[Click], height: int, width: int) -> None:
    """``ValueError`` naming the first click (counted from 0) that lies on no pixel of a ``height`` × ``width`` picture.

    Valid are −½ <= x < width − ½ and −½ <= y < height − ½.
    """
    for index, click in enumerate(clicks):
        row, col = _pixel(click)
        if not (0 <= row < height and 0 <= col < width):
            raise ValueError(
                f"click {index} at ({click.x:g}, {click.y:g}) is outside the picture of {width} x {height} pixels; "
                f"x must be in [-0.5, {width - 0.5:g}) and y in [-0.5, {height - 0.5:g})"
            )


def _pixel(click: Click) -> tuple[int, int]:
    """(row, col) of the pixel that holds the click."""
    return math.floor(click.y + 0.5), math.floor(click.x + 0.5)


def next_click(
    truth: np.ndarray | Tensor,
    mask: np.ndarray | Tensor,
    clicks: Sequence[Click],
    *,
    rule: str = "frozen",
    rng: random.Random | None = None,
    ignore: np.ndarray | Tensor | None = None,
) -> Click | None:
    """The simulated user's next click, on a pixel centre; ``None`` if nothing is wrong.

    ``truth``, ``mask`` (H, W) bool at the original size, NumPy or tensors on one device, where the work is then done with
    the same answer; ``clicks`` made so far.  With a and b the greatest distance to
    the boundary inside the missed object and inside the extra mask, the click is positive if a > b, else negative.

    ======== =================================== ============================= =====================================
    rule     clicked pixels                      several deepest pixels        nothing wrong
    ======== =================================== ============================= =====================================
    frozen   holes: not wrong, and boundary      first in scan order           ``None``
    hrsam    holes                               one drawn with ``rng``        ``None``
    ritm     skipped, but not boundary           first in scan order           a negative click on pixel (0, 0)
    ======== =================================== ============================= =====================================

    ``frozen`` is ours: HRSAM's rule without chance.  ``hrsam`` is that of HRSAM, FocSAM and Inter2Former, ``ritm`` that
    of RITM, SimpleClick and SegNext.  If a click changed nothing, ``ritm`` puts the next beside it, the others far off.
    With ``rng`` every rule draws among several deepest pixels.  ``ignore`` (H, W) bool: pixels that are never wrong.
    Distances are compared as exact integers (squared), so rounding decides no tie; for sides up to 16,384.
    Raises ``ValueError`` for arrays that are not bool (H, W) of one size, clicks outside of them, an unknown rule,
    ``hrsam`` without ``rng``.
    """
    kind = torch.bool if isinstance(truth, Tensor) else bool
    if truth.dtype != kind or mask.dtype != kind or truth.ndim != 2 or truth.shape != mask.shape:
        raise ValueError(
            "truth and mask must be bool arrays (H, W) of one size; "
            f"got {truth.dtype} {tuple(truth.shape)} and {mask.dtype} {tuple(mask.shape)}"
        )
    if rule not in RULES:
        raise ValueError(f"unknown click rule {rule!r}; choose one of {', '.join(RULES)}")
    if rule == "hrsam" and rng is None:
        raise ValueError("the rule 'hrsam' draws among equals: give rng=random.Random(seed)")
    check_clicks(clicks, *truth.shape)
    missed, extra = truth & ~mask, mask & ~truth
    if ignore is not None:
        if ignore.dtype != kind or ignore.shape != truth.shape:
            raise ValueError(
                f"ignore must be bool {tuple(truth.shape)} as truth; got {ignore.dtype} {tuple(ignore.shape)}"
            )
        missed, extra = missed & ~ignore, extra & ~ignore
    clicked = [_pixel(click) for click in clicks]
    if rule != "ritm":
        for pixel in clicked:
            missed[pixel] = extra[pixel] = False
        clicked = []
    depth_missed, deepest_missed = _deepest(missed, clicked)
    depth_extra, deepest_extra = _deepest(extra, clicked)
    if depth_missed == depth_extra == 0:
        return Click(0, 0, positive=False) if rule == "ritm" else None
    positive = depth_missed > depth_extra
    deepest = deepest_missed if positive else deepest_extra
    row, col = deepest[0 if rng is None else rng.randrange(len(deepest))]
    return Click(int(col), int(row), positive)


def _deepest(region: np.ndarray | Tensor, skip: Sequence[tuple[int, int]]) -> tuple[int, np.ndarray | Tensor]:
    """Greatest squared distance to a False pixel or the outside, and all pixels (n, 2) that have it, in scan order.

    ``skip``: pixels that are not candidates.  Without candidates 0 and no pixels.
    """
    if not isinstance(region, Tensor):
        return _deepest_on_cpu(region, skip)
    squared = squared_distance(region)
    for pixel in skip:
        squared[pixel] = 0
    greatest = int(squared.max())
    pixels = torch.nonzero(squared == greatest) if greatest else squared.new_empty(0, 2)
    return greatest, pixels


def _deepest_on_cpu(region: np.ndarray, skip: Sequence[tuple[int, int]]) -> tuple[int, np.ndarray]:
    """:func:`_deepest` without a transform of the whole picture.

    A chamfer transform, within 2 % of the truth, finds the pixels that could be deepest.  Few and shallow ones are
    settled in integers at once; else an exact transform of what is within their reach narrows the choice first.  OpenCV
    computes that one in float32: by its algorithm the error of a squared distance stays below ``slack``, the sum of
    inexact intersections of parabolas (4·D·n·2⁻²³ for distance D and width n), the root and its square (D²·2⁻²²), both
    doubled for safety, and sums beyond 2²⁴.
    """
    import cv2

    left, top, width, height = cv2.boundingRect(region.view(np.uint8))
    crop = region[top : top + height, left : left + width].view(np.uint8)
    crop = cv2.copyMakeBorder(crop, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    rough = cv2.distanceTransform(crop, cv2.DIST_L2, cv2.DIST_MASK_5)
    for row, col in skip:
        if top <= row < top + height and left <= col < left + width:
            rough[row - top + 1, col - left + 1] = 0
    greatest = float(rough.max(initial=0))
    if greatest == 0:
        return 0, np.empty((0, 2), dtype=np.int64)
    pixels = np.argwhere(rough >= 0.95 * greatest)
    least = int((0.93 * greatest) ** 2)
    if (len(pixels) + 1000) * (greatest**2 - least) > crop.size / 8:  # a ring costs about as much as 1000 pixels on it
        reach = math.ceil(1.05 * greatest) + 1
        y0, x0 = np.maximum(pixels.min(axis=0) - reach, 0)
        y1, x1 = pixels.max(axis=0) + reach + 1
        near = cv2.distanceTransform(crop[y0:y1, x0:x1], cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        distance = near[pixels[:, 0] - y0, pixels[:, 1] - x0]
        greatest, width = float(distance.max()), near.shape[1]
        squared = round(greatest**2)
        slack = int(greatest * width / 2**20 + squared / 2**21) + 3 * ((squared + width**2) >> 24)
        pixels = pixels[distance >= math.sqrt(max(squared - 2 * slack, 1) - 0.5)]
        least = squared - 3 * slack
    squared, pixels = _settle(crop.view(bool), pixels, max(least, 1))
    return squared, pixels + np.array([top - 1, left - 1])


def _settle(region: np.ndarray, pixels: np.ndarray, squared: int) -> tuple[int, np.ndarray]:
    """Exact greatest squared distance among True ``pixels`` (n, 2), none of which is below ``squared``, and who has it.

    Rings of growing radius: at each squared distance the pixels that meet a False pixel leave; the last to leave are
    the deepest.  ``region`` holds a nearest False pixel of each of the ``pixels``, so no ring reaches beyond it.
    """
    while True:
        reach = math.isqrt(squared)
        dy = np.arange(-reach, reach + 1)
        dx = np.rint(np.sqrt(squared - dy**2)).astype(np.int64)
        on_ring = dx**2 + dy**2 == squared
        dy, dx = np.tile(dy[on_ring], 2), np.concatenate((dx[on_ring], -dx[on_ring]))
        met = ~region[pixels[:, :1] + dy, pixels[:, 1:] + dx].all(axis=1)
        if met.all():
            return squared, pixels
        pixels = pixels[~met]
        squared += 1


@dataclass(frozen=True, eq=False)
class Draws:
    """Chance for the rows of a batch: the first ``rows[0]`` of them draw from ``generators[0]``, and so on.

    What a row draws depends on its generator's rows only, not on what else is in the batch.
    """

    generators: Sequence[torch.Generator]
    rows: Sequence[int]

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """(rows of all, *shape) in [0, 1)."""
        return self._each(torch.rand, shape, dtype)

    def normal(self, *shape: int) -> Tensor:
        """(rows of all, *shape) float32 of mean 0 and variance 1."""
        return self._each(torch.randn, shape, torch.float32)

    def _each(self, draw: Callable[..., Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        drawn = [
            draw(rows, *shape, dtype=dtype, device=generator.device, generator=generator)
            for generator, rows in zip(self.generators, self.rows)
        ]
        return torch.cat(drawn) if len(drawn) > 1 else drawn[0]


def simulate_clicks(
    truth: Tensor,
    mask: Tensor,
    generator: torch.Generator | Draws,
    *,
    spread: float | Tensor,
    real: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The simulated user for a batch, on its device and without waiting for it; for training.

    ``truth``, ``mask`` (B, H, W) bool at a reduced size; ``generator`` on their device, or :class:`Draws` of the B rows.
    ``real`` (B, H, W) bool: where the pictures are, a rectangle at the top left each; the rest is padding, which is outside
    as what lies beyond the edge is, so that a picture gets the click it gets without padding.  Of missed object and extra
    mask the one with the greater distance D to its boundary is clicked (extra if equal), at a pixel drawn uniformly
    among those with distance >= D / ``spread``; 1 means the deepest only.  ``spread`` >= 1: a number or a tensor (B,).
    To make earlier clicks holes, as the rules of :func:`next_click` do, set ``mask`` equal to ``truth`` there.

    Returns ``xy`` (B, 2) float32 pixel indices of the reduced picture, ``positive`` (B,) bool, ``any_wrong`` (B,) bool.
    Where nothing is wrong the click is a harmless true one: uniform in the object, or negative if there is no object.
    Source: HRSAM (arXiv 2407.02109), training clicks; there ``spread`` is 1 for the first click, then 1.7.
    """
    if truth.dtype != torch.bool or mask.dtype != torch.bool or truth.ndim != 3 or truth.shape != mask.shape:
        raise ValueError(
            "truth and mask must be bool tensors (B, H, W) of one size; "
            f"got {truth.dtype} {tuple(truth.shape)} and {mask.dtype} {tuple(mask.shape)}"
        )
    if not isinstance(spread, Tensor) and spread < 1:
        raise ValueError(f"spread must be at least 1; got {spread}")
    if real is not None:
        _check_real(real, truth)
        truth, mask = truth & real, mask & real
    squared = squared_distance(torch.stack((truth & ~mask, mask & ~truth)), impl="torch").flatten(2)
    missed, extra = squared.amax(2)
    any_wrong = torch.maximum(missed, extra) > 0
    some_object = truth.flatten(1).any(1)
    positive = torch.where(any_wrong, missed > extra, some_object)
    # The factor keeps pixels at exactly D / spread whatever float32 makes of the quotient; below D = 1400 it adds none.
    least = (torch.maximum(missed, extra) / spread**2 * (1 - 5e-7)).ceil().clamp(min=1)
    wrong = torch.where(positive.unsqueeze(1), squared[0], squared[1]) >= least.unsqueeze(1)
    harmless = truth.flatten(1) == some_object.unsqueeze(1)
    if real is not None:
        harmless &= real.flatten(1)
    candidates = torch.where(any_wrong.unsqueeze(1), wrong, harmless)
    return _draw(candidates, 1, _draws(generator, len(truth)), truth.shape[2]).squeeze(1), positive, any_wrong


def random_clicks(
    truth: Tensor,
    n: int,
    generator: torch.Generator | Draws,
    *,
    positive_share: float = 0.6,
    real: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``n`` clicks a picture at once, each positive with probability ``positive_share``; for training.

    ``truth`` (B, H, W) bool, ``generator`` and ``real`` as in :func:`simulate_clicks` -> ``xy`` (B, n, 2) float32 pixel
    indices, ``positive`` (B, n) bool.  Positive clicks are uniform in the object, negative ones outside of it,
    independently (repeats are possible).  Where there is no object all are negative, where there is nothing else all are
    positive.
    """
    if truth.dtype != torch.bool or truth.ndim != 3:
        raise ValueError(f"truth must be a bool tensor (B, H, W); got {truth.dtype} {tuple(truth.shape)}")
    inside, outside = truth, ~truth
    if real is not None:
        _check_real(real, truth)
        inside, outside = inside & real, outside & real
    inside, outside = inside.flatten(1), outside.flatten(1)
    draws = _draws(generator, len(truth))
    wanted = draws.uniform(n) < positive_share
    positive = (wanted & inside.any(1, keepdim=True)) | ~outside.any(1, keepdim=True)
    hits, misses = (_draw(candidates, n, draws, truth.shape[2]) for candidates in (inside, outside))
    return torch.where(positive.unsqueeze(2), hits, misses), positive


def _check_real(real: Tensor, truth: Tensor) -> None:
    if real.dtype != torch.bool or real.shape != truth.shape:
        raise ValueError(f"real must be bool {tuple(truth.shape)} as truth; got {real.dtype} {tuple(real.shape)}")


def _draws(generator: torch.Generator | Draws, rows: int) -> Draws:
    if not isinstance(generator, Draws):
        return Draws((generator,), (rows,))
    if sum(generator.rows) != rows:
        raise ValueError(f"a batch of {rows} needs as many draws; got {sum(generator.rows)}")
    return generator


def _draw(candidates: Tensor, n: int, draws: Draws, width: int) -> Tensor:
    """``n`` uniform draws a row from the True of ``candidates`` (B, H·W) -> xy (B, n, 2); (0, 0) for a row without."""
    rank = candidates.cumsum(1, dtype=torch.int32)
    count = rank[:, -1:]
    index = torch.searchsorted(rank, torch.minimum((draws.uniform(n, dtype=torch.float64) * count).int() + 1, count))
    return torch.stack((index % width, index.div(width, rounding_mode="floor")), dim=2).float()
