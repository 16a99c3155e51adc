"""What JPEG compression leaves of pictures, for whole batches on the device."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)  # share of red, green and blue in brightness, ITU-R BT.601


def mix_colours(colours: Tensor, matrix: Tensor, offset: Tensor) -> Tensor:
    """``matrix`` (B, 3, 3) times each pixel of (B, 3, S, S), plus ``offset`` (B, 3).

    As sums of planes: libraries for matrix products are slow at three rows and columns.
    """
    red, green, blue = matrix.view(-1, 3, 3, 1, 1).unbind(2)  # what each gives to the new three
    mixed = torch.addcmul(offset.view(-1, 3, 1, 1), red, colours[:, :1])
    return mixed.addcmul_(green, colours[:, 1:2]).addcmul_(blue, colours[:, 2:])


def jpeg_artefacts(colours: Tensor, quality: Tensor) -> Tensor:
    """What JPEG at ``quality`` (B,), 1…100, leaves of RGB pixels (B, 3, S, S) in [0, 1]; S a multiple of 8.

    8 × 8 cosine transform and quantisation with the example tables of ITU-T T.81, Annex K, scaled as libjpeg does;
    colour at full resolution, no rounding to bytes.
    """
    batch, _, height, width = colours.shape
    basis, tables, to_ycc, to_rgb = _jpeg_constants(colours.device)
    factor = torch.where(quality < 50, 50 / quality, 2 - quality / 50).view(-1, 1, 1)
    steps = (tables * factor + 0.5).floor().clamp(1, 255)  # (B, 3, 64)
    planes = mix_colours(colours, *(constant.expand(batch, *constant.shape) for constant in to_ycc))
    blocks = F.pixel_unshuffle(planes.view(batch * 3, 1, height, width), 8).view(batch, 3, 64, -1)
    blocks = (basis.T * steps.unsqueeze(2)) @ ((basis / steps.unsqueeze(3)) @ blocks).round_()
    planes = F.pixel_shuffle(blocks.view(batch * 3, 64, height // 8, width // 8), 8).view(batch, 3, height, width)
    return mix_colours(planes, *(constant.expand(batch, *constant.shape) for constant in to_rgb)).clamp_(0, 1)


# fmt: off
_LUMA_STEPS = (
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56,
    14, 17, 22, 29, 51, 87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92,
    49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99,
)
_CHROMA_STEPS = (
    17, 18, 24, 47, *[99] * 4, 18, 21, 26, 66, *[99] * 4, 24, 26, 56, *[99] * 5, 47, 66, *[99] * 38,
)
# fmt: on


@lru_cache(maxsize=8)
def _jpeg_constants(device: torch.device) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Orthonormal 64 × 64 cosine basis, (3, 64) steps, and matrix (3, 3) and offset (3,) of RGB in [0, 1] → YCbCr from -128 to
    127, and back."""
    frequency, place = torch.arange(8.0, dtype=torch.float64).view(8, 1), torch.arange(8.0, dtype=torch.float64)
    cosine = torch.cos(math.pi / 8 * frequency * (place + 0.5)) / 2
    cosine[0] /= math.sqrt(2)
    red, green, blue = LUMA
    to_ycc = torch.tensor(
        [
            LUMA,
            [-red / (2 - 2 * blue), -green / (2 - 2 * blue), 0.5],
            [0.5, -green / (2 - 2 * red), -blue / (2 - 2 * red)],
        ],
        dtype=torch.float64,
    )
    middle = torch.tensor([128.0, 0.0, 0.0], dtype=torch.float64)  # grey, of which the colour planes have nothing
    tables = torch.tensor([_LUMA_STEPS, _CHROMA_STEPS, _CHROMA_STEPS])
    basis, tables = torch.kron(cosine, cosine).float().to(device), tables.float().to(device)
    to_rgb = torch.linalg.inv(to_ycc)
    there, back = (255 * to_ycc, -middle), (to_rgb / 255, to_rgb @ middle / 255)
    (a, b), (c, d) = ((matrix.float().to(device), offset.float().to(device)) for matrix, offset in (there, back))
    return basis, tables, (a, b), (c, d)
