"""Two-dimensional rotary positions.

The first half of a head's channels is rotated by the token's row, the second half by its column.  Within a half, channels
(2i, 2i+1) share the angle ``position · scale · base^(−4i/D)`` and are rotated by **minus** that angle:
``x'₂ᵢ = x₂ᵢ cos φ + x₂ᵢ₊₁ sin φ``, ``x'₂ᵢ₊₁ = x₂ᵢ₊₁ cos φ − x₂ᵢ sin φ``.
Source: HRSAM (arXiv 2407.02109); the sign is the opposite of EVA-02's, so weights trained with one sign need that sign.

Products of rotated queries and keys depend on differences of positions only, so attention that stays inside a window may
use window-local positions: one small table serves every window.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hrsam.tables import cached


@dataclass(frozen=True)
class Rope:
    """``base`` and ``scale`` of the angles; HRSAM scales positions by 7/14 (pretraining over finetuning grid)."""

    base: float = 10000.0
    scale: float = 0.5


def angles(rope: Rope, positions: Tensor, head_dim: int) -> Tensor:
    """Angles of each channel pair.  ``positions`` (..., 2) rows and columns -> (..., head_dim / 2) float64."""
    if head_dim % 4:
        raise ValueError(f"rotary positions need a head size divisible by 4; got {head_dim}")
    count = head_dim // 4
    exponents = torch.arange(count, dtype=torch.float64, device=positions.device) / count
    frequencies = rope.base**-exponents
    scaled = positions.double() * rope.scale
    return (scaled.unsqueeze(-1) * frequencies).flatten(-2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channel pairs of ``x`` (..., D) by minus the angles; ``cos``, ``sin`` broadcast to (..., D / 2)."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos + odd * sin, odd * cos - even * sin), dim=-1).flatten(-2).to(x.dtype)


def turns(cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
    """``cos`` and ``sin`` (places, D / 2) as the kernels read them for rows of ``dtype``: (places, D), in pairs.

    Half precision for 16-bit rows: 2⁻¹² of a cosine is well below what rounding the rotated row costs.
    """
    kept = torch.float32 if dtype == torch.float32 else torch.float16
    return torch.stack((cos, sin), dim=-1).flatten(-2).to(kept).contiguous()


@cached(64)
def position_turns(rope: Rope, rows: int, cols: int, head_dim: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """:func:`turns` for all positions of a grid in row-major order."""
    return turns(*position_table(rope, rows, cols, head_dim, device, torch.float32), dtype)


@cached(64)
def position_table(rope: Rope, rows: int, cols: int, head_dim: int, device: torch.device, dtype: torch.dtype):
    """``cos`` and ``sin`` (rows · cols, head_dim / 2) for all positions of a grid in row-major order."""
    axes = torch.arange(rows, device=device), torch.arange(cols, device=device)
    positions = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 2)
    phi = angles(rope, positions, head_dim)
    return phi.cos().to(dtype), phi.sin().to(dtype)
