"""Prompt encoder: clicks, boxes and earlier logits -> tokens and a dense map (SAM, arXiv 2304.02643, appendix A).

Parameter names are those of Meta's ``prompt_encoder``.  Points are (x, y) in pixels of the model's input, where (0, 0) is
the centre of the first pixel; the input's size is 16 times the embedding grid.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NOT_A_POINT, NEGATIVE, POSITIVE, BOX_FIRST, BOX_SECOND = -1, 0, 1, 2, 3
NOBODY = -2  # fills a prompt up to a length; the decoder must be told not to read it
NOMINAL_GRID = 64  # the grid SAM was trained at: the dense position code is made there and resized


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of (B, C, H, W)."""

    def __init__(self, channels: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.movedim(1, -1), self.weight.shape, self.weight, self.bias, self.eps).movedim(-1, 1)


class FourierPositions(nn.Module):
    """Random Fourier features of positions in [0, 1]²: sin and cos of 2π (2p − 1) G."""

    def __init__(self, features: int = 128):
        super().__init__()
        self.positional_encoding_gaussian_matrix: Tensor
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(2, features))

    def forward(self, positions: Tensor) -> Tensor:
        """``positions`` (..., 2) x and y in [0, 1] -> (..., 2 · features)."""
        matrix = self.positional_encoding_gaussian_matrix
        centred = (2 * positions.to(matrix.dtype) - 1).unsqueeze(-1)
        # a sum, not a matrix product: autocast would round the phase to 16 bits
        phase = 2 * torch.pi * (centred * matrix).sum(-2)
        return torch.cat((phase.sin(), phase.cos()), dim=-1)


class PromptEncoder(nn.Module):
    def __init__(self, channels: int = 256, mask_channels: int = 16):
        super().__init__()
        self.pe_layer = FourierPositions(channels // 2)
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, channels) for _ in range(4))  # 0, 1, box corners
        self.not_a_point_embed = nn.Embedding(1, channels)
        self.no_mask_embed = nn.Embedding(1, channels)
        self.mask_downscaling = nn.Sequential(
            nn.Conv2d(1, mask_channels // 4, 2, 2),
            ChannelNorm(mask_channels // 4),
            nn.GELU(),
            nn.Conv2d(mask_channels // 4, mask_channels, 2, 2),
            ChannelNorm(mask_channels),
            nn.GELU(),
            nn.Conv2d(mask_channels, channels, 1),
        )

    def dense_positions(self, grid: tuple[int, int]) -> Tensor:
        """Position code of every embedding cell, (1, C, h, w): evaluated on the nominal 64×64 grid, then resized.

        HRSAM's choice; evaluating it at the target grid gives other values (hence other masks) away from 64×64.
        """
        axis = (torch.arange(NOMINAL_GRID, device=self.no_mask_embed.weight.device) + 0.5) / NOMINAL_GRID
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        code = self.pe_layer(torch.stack((x, y), dim=-1)).permute(2, 0, 1).unsqueeze(0)
        if grid != (NOMINAL_GRID, NOMINAL_GRID):
            code = F.interpolate(code, grid, mode="bilinear", align_corners=False)
        return code

    def sparse(self, points: Tensor, labels: Tensor, size: tuple[int, int] | Tensor) -> Tensor:
        """Prompt tokens.

        ``points`` (B, P, 2) x, y; ``labels`` (B, P) int: 1 positive, 0 negative, 2 and 3 the corners of a box, −1 no
        point, −2 nobody; ``size``: height and width of the model's input in pixels, or (B, 2) those of each -> (B, P, C).
        """
        height, width = size.unsqueeze(-1).unbind(1) if isinstance(size, Tensor) else size
        x, y = (points.float() + 0.5).unbind(-1)
        code = self.pe_layer(torch.stack((x / width, y / height), dim=-1))
        embeddings = [self.not_a_point_embed, *self.point_embeddings]
        table = torch.cat([e.get_parameter("weight") for e in embeddings])
        return code * (labels != NOT_A_POINT).unsqueeze(-1) + table[(labels.long() + 1).clamp(min=0)]

    def dense(self, logits: Tensor | None, batch: int, grid: tuple[int, int]) -> Tensor:
        """Dense prompt (B, C, h, w): earlier logits (B, 1, 4h, 4w) as they are, or the "no mask" vector."""
        if logits is None:
            return self.no_mask_embed.weight.view(1, -1, 1, 1).expand(batch, -1, *grid)
        dense = self.mask_downscaling(logits)
        if dense.shape[-2:] != grid:
            dense = F.interpolate(dense, grid, mode="bilinear", align_corners=False)
        return dense
