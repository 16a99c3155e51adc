"""The way from a picture's pixels to the model's and back.

A picture is resized so that its longest side is ``side``, then padded at the bottom and right.  Original and resized
picture cover the same area and a whole coordinate is a pixel's centre, so x becomes ``(x + 0.5) · w / width − 0.5``.
Pictures and masks of the original are arrays; what belongs to the model is a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_PATCH = 16  # pixels of a token's side; the padded size is a multiple of it
_STRIDE = 4  # model pixels per mask logit
_BAND = 1 << 22  # original pixels enlarged at a time


@dataclass(frozen=True)
class Frame:
    """Geometry of one picture in the model's input.

    ``height``, ``width``: the original's pixels.  ``side``: longest side of the model's input, in pixels.
    ``square``: pad to a square, as SAM does; ``False`` pads each axis only to the next multiple of 16.
    Raises ``ValueError`` for an empty picture or a side below 16.
    """

    height: int
    width: int
    side: int
    square: bool = True

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise ValueError(f"got a picture of {self.height}x{self.width} pixels; it needs at least one")
        if self.side < _PATCH:
            raise ValueError(f"got side={self.side}; the model's input needs at least {_PATCH} pixels")

    @property
    def resized(self) -> tuple[int, int]:
        """(h, w) of the resized picture: ``int(scale · n + 0.5)`` for each axis, but at least 1."""
        scale = self.side / max(self.height, self.width)
        return max(1, int(scale * self.height + 0.5)), max(1, int(scale * self.width + 0.5))

    @property
    def padded(self) -> tuple[int, int]:
        """(PH, PW) of the model's input, multiples of 16."""
        height, width = self.resized
        if self.square:
            height = width = max(height, width)
        return _round_up(height), _round_up(width)

    @property
    def logits_size(self) -> tuple[int, int]:
        """(PH / 4, PW / 4): size of the decoder's mask logits."""
        return self.padded[0] // _STRIDE, self.padded[1] // _STRIDE

    def to_model(self, points: Tensor) -> Tensor:
        """(n, 2) x, y in original pixels → (n, 2) x, y in model pixels; whole numbers are pixel centres in both.

        Floating dtypes are kept.  HRSAM's own evaluation uses ``x · w / width`` instead; the two differ by less than
        half a pixel of the coarser picture.
        """
        return (_points(points) + 0.5) * self._ratio(points) - 0.5

    def to_original(self, points: Tensor) -> Tensor:
        """Inverse of :meth:`to_model`."""
        return (_points(points) + 0.5) / self._ratio(points) - 0.5

    def _ratio(self, points: Tensor) -> Tensor:
        height, width = self.resized
        dtype = points.dtype if points.is_floating_point() else torch.float32
        return torch.tensor([width / self.width, height / self.height], dtype=dtype, device=points.device)

    def prepare(
        self,
        pixels: np.ndarray,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        bgr: bool = False,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Picture (height, width, 3) uint8 RGB → model input (3, PH, PW) float32 on ``device``.

        A picture of the size :attr:`resized` is taken as it is.  Any other is resized by area averaging when it shrinks
        (no aliasing) and bilinearly when it grows, rounded to whole grey levels; then ``(value − mean) / std`` with both
        on the 0–255 scale; then padded with 0, the mean colour.
        ``bgr=True`` turns the channels round *before* normalising, so that channel 0 is blue with ``mean[0]``, which is
        what the official HRSAM weights were trained on.
        """
        import cv2

        height, width = self.resized
        if pixels.dtype != np.uint8 or pixels.shape not in ((self.height, self.width, 3), (height, width, 3)):
            raise ValueError(
                f"got pixels {pixels.dtype} {pixels.shape}; this frame is for uint8 {(self.height, self.width, 3)}"
            )
        pixels = np.ascontiguousarray(pixels)
        if (height, width) != pixels.shape[:2]:
            pixels = cv2.resize(pixels, (width, height), interpolation=self._interpolation())
        small = torch.from_numpy(np.array(pixels[..., ::-1] if bgr else pixels)).to(device).permute(2, 0, 1)
        out = torch.zeros(3, *self.padded, device=device)
        offset, scale = (torch.tensor(list(v), dtype=torch.float32, device=device).view(3, 1, 1) for v in (mean, std))
        out[:, :height, :width].copy_(small).sub_(offset).div_(scale)
        return out

    def _interpolation(self) -> int:
        import cv2

        return cv2.INTER_AREA if self.side < max(self.height, self.width) else cv2.INTER_LINEAR

    def logits_to_original(self, logits: Tensor) -> Tensor:
        """Mask logits :attr:`logits_size` → (height, width) float32 on the CPU.

        Bilinear to the padded size, padding cut off, bilinear to the original (both with ``align_corners=False`` and no
        antialias, as HRSAM evaluates).  Takes the result, one plane of the model's size and a small band of memory.
        """
        out = np.empty((self.height, self.width), np.float32)
        for rows, band in self.bands(logits):
            out[rows] = band
        return torch.from_numpy(out)

    def mask_to_original(self, logits: Tensor, above: float = 0.0) -> np.ndarray:
        """``logits_to_original(logits) > above`` as (height, width) bool, in a quarter of the memory."""
        out = np.empty((self.height, self.width), bool)
        for rows, band in self.bands(logits):
            np.greater(band, above, out=out[rows])
        return out

    def mask_on_device(self, logits: Tensor, above: float = 0.0) -> Tensor:
        """:meth:`mask_to_original` where the logits are: (height, width) bool on their device.

        Takes about ten bytes a pixel of the original.  Single pixels on the outline may differ from the CPU's answer, by
        rounding.
        """
        if tuple(logits.shape) != self.logits_size:
            raise ValueError(f"got logits of shape {tuple(logits.shape)}; this frame needs {self.logits_size}")
        height, width = self.resized
        plane = F.interpolate(logits.detach().float()[None, None], self.padded, mode="bilinear")
        plane = plane[..., :height, :width]
        return F.interpolate(plane, (self.height, self.width), mode="bilinear")[0, 0] > above

    def bands(self, logits: Tensor, rows: range | None = None) -> Iterator[tuple[slice, np.ndarray]]:
        """:meth:`logits_to_original` of some rows, a band at a time: places in ``rows``, (n, width) float32.

        ``rows``: rows of the original, all unless given.  A row is the same to the bit whatever else is asked for.
        """
        import cv2

        low = logits.detach().to("cpu", torch.float32).numpy()
        if low.shape != self.logits_size:
            raise ValueError(f"got logits of shape {low.shape}; this frame needs {self.logits_size}")
        height, width = self.resized
        wanted = np.arange(self.height) if rows is None else np.asarray(rows, dtype=np.int64)
        if not wanted.size:
            return
        centre = np.clip((wanted + 0.5) * (height / self.height) - 0.5, 0, height - 1)
        above = centre.astype(np.int64)
        below = np.minimum(above + 1, height - 1)
        weight = (centre - above).astype(np.float32)[:, None]
        # only the logits that these rows are made of, and their neighbours
        first = max(0, int(above.min()) // _STRIDE - 1)
        part = low[first : int(below.max()) // _STRIDE + 2]
        plane = cv2.resize(part, (self.padded[1], _STRIDE * len(part)), interpolation=cv2.INTER_LINEAR)[:, :width]
        above, below = above - _STRIDE * first, below - _STRIDE * first
        step = max(2, _BAND // self.width)
        for top in range(0, len(wanted), step):
            some = slice(top, min(top + step, len(wanted)))
            band = plane[above[some]]
            band += (plane[below[some]] - band) * weight[some]
            alone = len(band) == 1  # OpenCV rounds a single row differently
            wide = cv2.resize(np.repeat(band, 1 + alone, axis=0), (self.width, len(band) + alone))
            yield some, wide[: len(band)]

    def rows_above(self, logits: Tensor, above: float = 0.0) -> range:
        """Rows of the original outside which :meth:`logits_to_original` is nowhere over ``above``."""
        found = torch.nonzero((logits.detach() > above).any(1)).flatten().tolist()
        if not found:
            return range(0)
        # A logit reaches two model pixels beyond its own four, a model pixel one further; one more for rounding.
        ratio = self.height / self.resized[0]
        top = math.floor((_STRIDE * found[0] - 4) * ratio) - 1
        bottom = math.ceil((_STRIDE * (found[-1] + 1) + 4) * ratio) + 1
        return range(max(0, min(top, self.height)), max(0, min(bottom, self.height)))

    def mask_to_logits(self, mask: np.ndarray, magnitude: float) -> Tensor:
        """A given mask (height, width) bool → logits :attr:`logits_size` float32, to refine it by clicks.

        Of a mask thinned to every s-th row and column it takes (⌈height / s⌉, ⌈width / s⌉).  The share ``p`` of a
        logit's cell that the mask covers becomes ``magnitude · (2p − 1)``; padding is background.
        """
        import cv2

        if mask.dtype != bool or not self._covers(mask.shape):
            raise ValueError(f"got a mask {mask.dtype} {mask.shape}; this frame needs bool {(self.height, self.width)}")
        height, width = self.resized
        grey = np.where(mask, np.uint8(255), np.uint8(0))
        cover = cv2.resize(grey, (width, height), interpolation=self._interpolation())
        return torch.from_numpy(magnitude * (2 * (self._cells(cover, 0) / 255) - 1))

    def logits_to_model(self, logits: np.ndarray) -> Tensor:
        """Logits (height, width) float32 of the original → :attr:`logits_size` float32, to go on from them.

        Thinned ones as in :meth:`mask_to_logits`.  A cell is the mean over its area; padding is −10.
        """
        import cv2

        if logits.dtype != np.float32 or not self._covers(logits.shape):
            raise ValueError(f"got logits {logits.dtype} {logits.shape}; give float32 {(self.height, self.width)}")
        small = cv2.resize(logits, self.resized[::-1], interpolation=self._interpolation())
        return torch.from_numpy(self._cells(small, -10))

    def _covers(self, shape: tuple[int, ...]) -> bool:
        """Whether ``shape`` is the original's, or that of every s-th of its rows and columns."""
        step = -(-self.height // max(1, shape[0]))
        return shape == (-(-self.height // step), -(-self.width // step))

    def _cells(self, values: np.ndarray, outside: float) -> np.ndarray:
        """Mean of each logit's cell of ``values`` :attr:`resized`, float32; the padding is ``outside``."""
        plane = np.full(self.padded, outside, np.float32)
        plane[: values.shape[0], : values.shape[1]] = values
        rows, columns = self.logits_size
        return plane.reshape(rows, _STRIDE, columns, _STRIDE).mean(axis=(1, 3))


def _round_up(pixels: int) -> int:
    return -(-pixels // _PATCH) * _PATCH


def _points(points: Tensor) -> Tensor:
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(f"got points of shape {tuple(points.shape)}; give (n, 2) with x, y in each row")
    return points
