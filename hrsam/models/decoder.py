"""Mask decoder: image embedding and prompt tokens -> mask logits and predicted IoU (SAM, arXiv 2304.02643, appendix A).

Parameter names are those of Meta's ``mask_decoder``.  Everything runs on channel-last tokens; the two 2×2 transposed
convolutions of the mask head are written as matrix products, which is exact and needs no transposed copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrsam.models.prompt import ChannelNorm
from hrsam.ops.cross import cross_attention


class ProjectedAttention(nn.Module):
    """Attention with its own projections, optionally at a smaller inner width."""

    def __init__(self, width: int, heads: int, downsample: int = 1):
        super().__init__()
        self.heads = heads
        self.split = False  # few queries to many keys: in parts side by side, for inference
        inner = width // downsample
        self.q_proj = nn.Linear(width, inner)
        self.k_proj = nn.Linear(width, inner)
        self.v_proj = nn.Linear(width, inner)
        self.out_proj = nn.Linear(inner, width)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, Tq, C), (B, Tk, C), (B, Tk, C) -> (B, Tq, C); ``mask`` (B, 1, 1, Tk), True for keys that may be read."""
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project, x in ((self.q_proj, q), (self.k_proj, k), (self.v_proj, v))
        )
        if self.split and mask is None:
            out = cross_attention(q, k, v)
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class ReluMlp(nn.Module):
    def __init__(self, sizes: Sequence[int]):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class TokenMlp(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.lin1 = nn.Linear(width, hidden)
        self.lin2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin2(F.relu(self.lin1(x)))


class TwoWayLayer(nn.Module):
    """Tokens attend to themselves, then to the image; an MLP; then the image attends to the tokens."""

    def __init__(self, width: int, heads: int, hidden: int, first: bool):
        super().__init__()
        self.first = first
        self.self_attn = ProjectedAttention(width, heads)
        self.norm1 = nn.LayerNorm(width)
        self.cross_attn_token_to_image = ProjectedAttention(width, heads, downsample=2)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = TokenMlp(width, hidden)
        self.norm3 = nn.LayerNorm(width)
        self.norm4 = nn.LayerNorm(width)
        self.cross_attn_image_to_token = ProjectedAttention(width, heads, downsample=2)

    def forward(
        self,
        tokens: Tensor,
        image: Tensor,
        token_pe: Tensor,
        image_pe: Tensor,
        mask: Tensor | None,
        cells: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        if self.first:  # replaces the tokens: no residual, no positions
            tokens = self.self_attn(tokens, tokens, tokens, mask)
        else:
            q = tokens + token_pe
            tokens = tokens + self.self_attn(q, q, tokens, mask)
        tokens = self.norm1(tokens)
        image_keys = image + image_pe
        tokens = self.norm2(tokens + self.cross_attn_token_to_image(tokens + token_pe, image_keys, image, cells))
        tokens = self.norm3(tokens + self.mlp(tokens))
        image = self.update_image(image, self.cross_attn_image_to_token(image_keys, tokens + token_pe, tokens, mask))
        return tokens, image

    def update_image(self, image: Tensor, update: Tensor) -> Tensor:
        return self.norm4(image + update)


class TwoWayTransformer(nn.Module):
    def __init__(self, width: int = 256, heads: int = 8, hidden: int = 2048, depth: int = 2):
        super().__init__()
        self.layers = nn.ModuleList(TwoWayLayer(width, heads, hidden, first=i == 0) for i in range(depth))
        self.final_attn_token_to_image = ProjectedAttention(width, heads, downsample=2)
        self.norm_final_attn = nn.LayerNorm(width)

    def forward(
        self, tokens: Tensor, image: Tensor, image_pe: Tensor, mask: Tensor | None = None, cells: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``mask`` (B, 1, 1, P) and ``cells`` (B, 1, 1, h·w): tokens and cells that may be read, None for all.

        Cells meet each other only through the tokens, so one that is not read changes no other.
        """
        token_pe = tokens
        for layer in self.layers:
            tokens, image = layer(tokens, image, token_pe, image_pe, mask, cells)
        out = self.final_attn_token_to_image(tokens + token_pe, image + image_pe, image, cells)
        return self.norm_final_attn(tokens + out), image


class MaskDecoder(nn.Module):
    """Four masks a prompt: token 0 is the answer to several clicks, tokens 1–3 are SAM's three guesses for an ambiguous one."""

    num_masks = 4

    def __init__(self, width: int = 256):
        super().__init__()
        self.transformer = TwoWayTransformer(width)
        self.iou_token = nn.Embedding(1, width)
        self.mask_tokens = nn.Embedding(self.num_masks, width)
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose2d(width, width // 4, 2, 2),
            ChannelNorm(width // 4),
            nn.GELU(),
            nn.ConvTranspose2d(width // 4, width // 8, 2, 2),
            nn.GELU(),
        )
        self.output_hypernetworks_mlps = nn.ModuleList(
            ReluMlp((width, width, width, width // 8)) for _ in range(self.num_masks)
        )
        self.iou_prediction_head = ReluMlp((width, width, width, self.num_masks))

    def forward(
        self, image: Tensor, image_pe: Tensor, sparse: Tensor, dense: Tensor, masks: Sequence[int] = (0,),
        real: Tensor | None = None, inside: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """One prompt for each image of the batch.

        ``image`` (B, C, h, w); ``image_pe`` (1 or B, C, h, w); ``sparse`` (B, P, C) prompt tokens; ``dense`` (B, C, h, w);
        ``masks``: which of the four to compute; ``real`` (B, P) bool: False for prompt tokens that must not be read;
        ``inside`` (B, h, w) bool: False for cells that are padding: what is answered for the others is that of a map
        without them -> logits (B, masks, 4h, 4w) and predicted IoU (B, masks).
        """
        batch, _, rows, cols = image.shape
        output = torch.cat((self.iou_token.weight, self.mask_tokens.weight))
        tokens = torch.cat((output.expand(batch, -1, -1).to(sparse.dtype), sparse), dim=1)
        source = (image + dense).flatten(2).transpose(1, 2)
        mask = None if real is None else F.pad(real, (output.shape[0], 0), value=True).view(batch, 1, 1, -1)
        cells = None if inside is None else inside.view(batch, 1, 1, -1)
        tokens, source = self.transformer(tokens, source, image_pe.flatten(2).transpose(1, 2), mask, cells)
        hyper = torch.stack([self.output_hypernetworks_mlps[m](tokens[:, 1 + m]) for m in masks], dim=1)
        logits = self.mask_logits(source, hyper, rows, cols)
        iou = self.iou_prediction_head(tokens[:, 0])
        return logits, torch.stack([iou[:, m] for m in masks], dim=1)

    def mask_logits(self, source: Tensor, hyper: Tensor, rows: int, cols: int) -> Tensor:
        """``source`` (B, h·w, C) and ``hyper`` (B, masks, C / 8) -> (B, masks, 4h, 4w)."""
        logits = torch.einsum("bmc,bpuvc->bmpuv", hyper, self._upscale(source))
        # (…, h·w cells, 4 children, 4 grandchildren) -> rows (h, first, second), columns likewise
        logits = logits.unflatten(2, (rows, cols)).unflatten(4, (2, 2)).unflatten(6, (2, 2))
        return logits.permute(0, 1, 2, 4, 6, 3, 5, 7).reshape(*logits.shape[:2], 4 * rows, 4 * cols)

    def _upscale(self, source: Tensor) -> Tensor:
        """(B, h·w, C) -> (B, h·w, 4, 4, C / 8): each cell's 2×2 children and their 2×2 children, row-major."""
        first, norm, _, second, _ = self.output_upscaling
        assert isinstance(first, nn.ConvTranspose2d)
        assert isinstance(norm, ChannelNorm)
        assert isinstance(second, nn.ConvTranspose2d)
        x = _transposed_2x2(source, first)
        x = F.gelu(F.layer_norm(x, norm.weight.shape, norm.weight, norm.bias, norm.eps))
        return F.gelu(_transposed_2x2(x, second))


def _transposed_2x2(x: Tensor, conv: nn.ConvTranspose2d) -> Tensor:
    """A 2×2, stride-2 transposed convolution of channel-last cells: (..., Cin) -> (..., 4, Cout)."""
    weight, bias = conv.weight, conv.bias  # (Cin, Cout, 2, 2)
    assert bias is not None
    matrix = weight.permute(2, 3, 1, 0).reshape(4 * weight.shape[1], weight.shape[0])
    return F.linear(x, matrix, bias.repeat(4)).unflatten(-1, (4, weight.shape[1]))
