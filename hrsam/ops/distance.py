"""Exact squared Euclidean distance of every True pixel to the nearest False pixel.

Outside the picture everything is False, so a pixel at the border has distance 1.  Two separable passes (Felzenszwalb &
Huttenlocher 2012, "Distance transforms of sampled functions", §2.2): along columns the plain distance ``g`` by running
maxima, then along rows the minimum over x' of ``(x − x')² + g(x')²``.  The second pass is a brute-force minimum: for
the reduced pictures of training that is one broadcast sum and one reduction, which suits a GPU better than an envelope
of parabolas.  All in integers, so nothing is rounded.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hrsam.kernels import resolve_impl

# Elements of one block of (rows, cols, W + 2) sums: 256 MiB on a GPU (two blocks may be alive), about a cache on a CPU.
BAND_CUDA, BAND_CPU = 1 << 26, 1 << 18


def torch_squared_distance(mask: Tensor) -> Tensor:
    height, width = mask.shape[-2:]
    y = torch.arange(height, dtype=torch.int32, device=mask.device).unsqueeze(1)
    above = torch.where(mask, -1, y).cummax(-2).values
    below = torch.where(mask, height, y).flip(-2).cummin(-2).values.flip(-2)
    g = F.pad(torch.minimum(y - above, below - y), (1, 1))  # the frame's columns are False: distance 0
    lines = g.square().view(-1, 1, width + 2)
    x = torch.arange(-1, width + 1, dtype=torch.int32, device=mask.device)
    steps = (x[1:-1, None] - x).square()
    limit = BAND_CUDA if mask.is_cuda else BAND_CPU
    cols = min(width, max(1, limit // (width + 2)))
    rows = max(1, limit // (cols * (width + 2)))
    out = torch.empty(len(lines), width, dtype=torch.int32, device=mask.device)
    for line, target in zip(lines.split(rows), out.split(rows)):
        for step, part in zip(steps.split(cols), target.split(cols, dim=1)):
            part.copy_((step + line).amin(-1))
    return out.view(mask.shape)


def triton_squared_distance(mask: Tensor) -> Tensor:
    from hrsam.kernels.distance import squared_distance

    return squared_distance(mask.flatten(0, -3)).view(mask.shape)


def naive_squared_distance(mask: Tensor) -> Tensor:
    """The definition: for each True pixel the minimum over all False pixels of picture and frame."""
    out = torch.zeros(mask.shape, dtype=torch.int32, device=mask.device)
    for picture, squared in zip(mask.flatten(0, -3), out.view(-1, *mask.shape[-2:])):
        outside = torch.nonzero(~F.pad(picture, (1, 1, 1, 1))) - 1
        for pixel in torch.nonzero(picture):
            squared[tuple(pixel)] = (outside - pixel).square().sum(1).min()
    return out


def squared_distance(mask: Tensor, *, impl: str = "auto") -> Tensor:
    """Squared distance to the nearest False pixel, the outside of the picture counting as False.

    ``mask`` (..., H, W) bool -> (..., H, W) int32 in pixels², exact for sides up to 32,766; False pixels get 0.
    Work of ``torch`` is O(H · W²) a picture, meant for pictures of a few hundred pixels, with bounded working memory; of
    ``triton`` O(H · W · greatest distance), for any.  No gradient.
    ``impl``: ``"naive"`` (definition), ``"torch"``, ``"triton"``, or ``"auto"``, see :func:`hrsam.kernels.resolve_impl`.
    Raises ``ValueError`` for a mask that is not bool or has fewer than two dimensions, or an unknown implementation.
    """
    if mask.dtype != torch.bool or mask.ndim < 2:
        raise ValueError(f"the mask must be bool (..., H, W); got {mask.dtype} {tuple(mask.shape)}")
    functions = {"naive": naive_squared_distance, "torch": torch_squared_distance, "triton": triton_squared_distance}
    return functions[resolve_impl(impl, mask)](mask.unsqueeze(0)).squeeze(0)
