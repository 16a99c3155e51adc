"""HRSAM and HRSAM++ image encoder (arXiv 2407.02109): one class, the anchor map is an option.

Sizes for one 1024-pixel picture and HRSAM++: the picture and a 512-pixel copy of it (the anchor map) go through the same
16×16 patch embedding, giving grids of 64×64 and 32×32 tokens that are packed into one sequence of 5,120.  Twelve window
attention blocks follow; at four of them a cycle scan carries information along each grid (before the block) and from one
grid to the other (after it).  These four stages are joined into a map of 256 channels at 1/16 of the picture's size.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrsam.layout import Layout, token_images
from hrsam.models.block import Attention, Block, CycleScan, Mlp


@dataclass(frozen=True)
class EncoderConfig:
    """Architecture.  ``mixers`` is tiled over the depth; ``anchor_side`` pixels, or ``None`` for HRSAM without "++"."""

    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    patch: int = 16
    pretrained_grid: int = 14
    mixers: tuple[tuple[str, dict], ...] = field(
        default=(("window", {"window": 16, "shift": 0}), ("window", {"window": 16, "shift": 8}))
    )
    scan_at: tuple[int, ...] = (2, 5, 8, 11)
    state: int = 32
    cycles: int = 3
    anchor_side: int | None = None
    out_channels: int = 256
    drop_path: float = 0.0


class Encoder(nn.Module):
    """Normalised pixels -> feature map.  See :meth:`forward`, :meth:`forward_packed` and :meth:`encode`."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        width, stages = config.width, len(config.scan_at)
        self.anchor_side = config.anchor_side
        self.frozen_positions: dict[tuple[int, int], Tensor] = {}
        self.frozen_resize: dict[tuple[int, int], Tensor] = {}
        self.frozen_dtype: torch.dtype | None = None
        self.patch_embed = nn.Conv2d(3, width, config.patch, config.patch)
        # One class slot in front, as in the MAE weights it starts from; it is never used.
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.pretrained_grid**2, width))
        self.blocks = nn.ModuleList(
            Block(width, config.heads, config.mlp_ratio, *config.mixers[i % len(config.mixers)])
            for i in range(config.depth)
        )
        self.scans = nn.ModuleList(CycleScan(width, config.state, config.cycles) for _ in range(stages))
        lateral_in = width
        if config.anchor_side is not None:
            self.scans_across = nn.ModuleList(CycleScan(width, config.state, config.cycles) for _ in range(stages))
            self.fusion_norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(stages))
            lateral_in = 2 * width
        self.laterals = nn.ModuleList(
            nn.Sequential(nn.Linear(lateral_in, config.out_channels, bias=False), nn.LayerNorm(config.out_channels))
            for _ in range(stages)
        )
        self.out_conv = nn.Conv2d(
            config.out_channels, config.out_channels, 3, padding=1, groups=config.out_channels, bias=False
        )
        self.out_norm = nn.LayerNorm(config.out_channels)
        self.apply(_init_linear)
        for module in self.modules():
            if isinstance(module, CycleScan):
                module.reset_steps()
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    @torch.no_grad()
    def frozen(self, dtype: torch.dtype) -> Encoder:
        """A copy for inference with matrices in ``dtype``, to be run under autocast to it.

        Tokens stay in ``dtype`` from block to block; norms, scans and what autocast leaves alone compute in float32.  What
        depends on weights alone is computed once: keys and values of padding tokens, and the position embedding of each
        grid and the enlargement of the anchor map that :meth:`remember` was called with.
        """
        copy = deepcopy(self).eval().requires_grad_(False)
        copy.frozen_positions, copy.frozen_resize = {}, {}
        copy.frozen_dtype = dtype
        for module in copy.modules():
            if isinstance(module, Attention):
                key, value = module.pad_kv()
                module.frozen_pad = key.to(dtype), value.to(dtype)
        for module in copy.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.to(dtype)
            elif isinstance(module, Mlp):
                module.fused = dtype != torch.float32 and self.pos_embed.is_cuda
        return copy

    @torch.no_grad()
    def remember(self, grids: Sequence[tuple[int, int]]) -> None:
        """Compute what depends on an image's token grids alone; for a frozen encoder."""
        for grid in grids:
            if grid not in self.frozen_positions:
                self.frozen_positions[grid] = self._positions(grid).to(self.frozen_dtype)
        for small, large in zip(grids[-1], grids[0]):
            if (small, large) not in self.frozen_resize:
                one = torch.eye(small, device=self.pos_embed.device).unsqueeze(0)
                table = F.interpolate(one, large, mode="linear", align_corners=False)[0].t()
                self.frozen_resize[small, large] = table.contiguous().to(self.frozen_dtype)

    def forward(self, pixels: Tensor) -> Tensor:
        """``pixels`` (B, 3, H, W) normalised, H and W multiples of the patch -> (B, out_channels, H/16, W/16).

        Raises ``ValueError`` for another shape.
        """
        self.check(pixels)
        tokens, layout = self._embed(pixels)
        return self._stages(tokens, layout)[0]

    def forward_packed(
        self, images: Sequence[Tensor], generators: Sequence[torch.Generator] | None = None
    ) -> list[Tensor]:
        """:meth:`forward` of pictures of any sizes in one call, with gradient: each (3, Hi, Wi) -> (out_channels, hi, wi) each.

        Equal to :meth:`forward` of each alone up to the order of summation, and nothing passes from one to another.  Pictures
        of one size are computed as a batch is, on a CPU to the bit.
        ``generators``: one for each picture, which draws its stochastic depth wherever it is packed; None: torch's own.
        Raises ``ValueError`` as :meth:`encode`, and when there is not one generator a picture.
        """
        if generators is not None and len(generators) != len(images):
            raise ValueError(f"got {len(generators)} generators for {len(images)} pictures; give one for each")
        tokens, layout = self._pack(images, merge=True)
        draws = None
        if generators is not None and self.training and self.config.drop_path > 0:
            shape = (self.config.depth, 2)
            draws = torch.stack([torch.rand(shape, device=g.device, generator=g) for g in generators], dim=2)
        maps = self._stages(tokens, layout, draws=draws, varied=True)
        return [picture for run in maps for picture in run.unbind()]

    def encode(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Pictures of any sizes in one packed call: each (3, Hi, Wi), as in :meth:`forward` -> (out_channels, hi, wi) each.

        The result of an image is the same to the bit whatever else is in the call, and equal to :meth:`forward` of it alone
        (tested on CPUs; on a GPU it rests on every window being computed alike whatever else is in the call).
        """
        maps = self._stages(*self._pack(images, merge=False), exact=True, varied=True)
        return [m[0] for m in maps]

    def _pack(self, images: Sequence[Tensor], merge: bool) -> tuple[Tensor, Layout]:
        """Packed tokens of pictures of any sizes; with ``merge`` neighbours of equal size are embedded together."""
        if not images:
            raise ValueError("got no images to encode; give at least one (3, H, W) tensor")
        runs = (
            [list(run) for _, run in groupby(images, key=lambda image: image.shape)] if merge else [[i] for i in images]
        )
        parts, grids, owners = [], [], []
        for run in runs:
            self.check(run[0].unsqueeze(0))
            tokens, layout = self._embed(torch.stack(run))
            parts.append(tokens)
            first = owners[-1] + 1 if owners else 0
            grids += layout.grids
            owners += [first + image for image in layout.images]
        return torch.cat(parts), Layout(tuple(grids), tuple(owners))

    def check(self, pixels: Tensor) -> None:
        """``ValueError`` for what :meth:`forward` does not take."""
        patch = self.config.patch
        if (
            pixels.ndim != 4
            or pixels.shape[1] != 3
            or pixels.shape[2] % patch
            or pixels.shape[3] % patch
            or 0 in pixels.shape
        ):
            raise ValueError(
                f"the encoder takes (B, 3, H, W) with H and W multiples of {patch}; got {tuple(pixels.shape)}: "
                "pad the picture at the bottom and right with zeros after normalising it"
            )

    def grids(self, height: int, width: int) -> list[tuple[int, int]]:
        """Token grids of one picture of this size."""
        sides = [(height, width)] + ([(self.anchor_side,) * 2] if self.anchor_side is not None else [])
        return [(rows // self.config.patch, cols // self.config.patch) for rows, cols in sides]

    def _embed(self, pixels: Tensor) -> tuple[Tensor, Layout]:
        """Patches and positions of a batch of equal size -> packed tokens and their layout."""
        count, _, height, width = pixels.shape
        scales = [pixels]
        if self.anchor_side is not None:
            size = (self.anchor_side, self.anchor_side)
            scales.append(
                pixels if (height, width) == size else F.interpolate(pixels, size, mode="bilinear", align_corners=False)
            )
        grids = [(scale.shape[2] // self.config.patch, scale.shape[3] // self.config.patch) for scale in scales]
        tokens = [
            patch_tokens(scale, self.patch_embed) + self._positions(grid) for scale, grid in zip(scales, grids)
        ]  # fmt: skip
        owners = tuple(image for image in range(count) for _ in grids)
        return torch.cat(tokens, dim=1).flatten(0, 1), Layout(tuple(grids) * count, owners)

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        """Position embedding (h·w, C) of a token grid: the pretrained grid enlarged bilinearly."""
        if grid in self.frozen_positions:
            return self.frozen_positions[grid]
        side = self.config.pretrained_grid
        table = self.pos_embed[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        if grid != (side, side):
            table = F.interpolate(table, grid, mode="bilinear", align_corners=False)
        return table.flatten(2).transpose(1, 2)[0]

    def _keep(
        self, index: int, layout: Layout, like: Tensor, draws: Tensor | None = None
    ) -> tuple[Tensor, Tensor] | None:
        """Stochastic depth of block ``index``: whole images are dropped, never single tokens.

        ``draws`` (depth, 2, images) uniform in [0, 1), or torch's own generator draws.
        """
        rate = self.config.drop_path * index / max(1, self.config.depth - 1)
        if not self.training or rate == 0.0:
            return None
        images = token_images(layout, like.device)
        draw = torch.rand(2, layout.num_images, device=like.device) if draws is None else draws[index].to(like.device)
        first, second = ((draw >= rate) / (1.0 - rate)).to(like.dtype).unsqueeze(2)[:, images]
        return first, second

    def _stages(
        self, x: Tensor, layout: Layout, exact: bool = False, draws: Tensor | None = None, varied: bool = False
    ) -> list[Tensor]:
        """Blocks and scans over packed tokens; one (n, out_channels, h, w) map for each run of equal images.

        ``exact``: nothing is computed for two images together that could change an image's bits, and a run is one image.
        ``varied``: images may have any sizes in every call, so nothing may be prepared for a size.
        """
        fused: list[Tensor] | None = None
        for index, block in enumerate(self.blocks):
            stage = self.config.scan_at.index(index) if index in self.config.scan_at else None
            if stage is not None:
                x = self.scans[stage](x, layout, across=False, exact=exact)
            x = block(x, layout, None if exact else self._keep(index, layout, x, draws), exact)
            if stage is not None:
                if self.anchor_side is not None:
                    x = self.scans_across[stage](x, layout, across=True, exact=exact)
                parts = self._lateral(stage, x, layout, merge=not exact)
                fused = parts if fused is None else [a + b for a, b in zip(fused, parts)]
        assert fused is not None
        out = []
        for part in fused:
            part = part.permute(0, 3, 1, 2)
            if (
                varied and part.is_cuda
            ):  # channels last go to cuDNN, which compiles for each new size, for a second and more
                part = part.contiguous()
            part = self.out_conv(part)
            out.append(self.out_norm(part.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        return out

    def _lateral(self, stage: int, x: Tensor, layout: Layout, merge: bool) -> list[Tensor]:
        """One stage's contribution, (n, h, w, out_channels) for each run of equal images."""
        maps = []
        for start, count, grids in layout.runs(merge):
            length = sum(rows * cols for rows, cols in grids)
            tokens = x[start : start + count * length].view(count, length, -1)
            rows, cols = grids[0]
            full = tokens[:, : rows * cols].unflatten(1, (rows, cols))
            if self.anchor_side is not None:
                anchor, norm = tokens[:, rows * cols :].unflatten(1, grids[1]), self.fusion_norms[stage]
                if self.frozen_dtype is not None:
                    maps.append(self._frozen_lateral(stage, norm(full), norm(self._enlarged(anchor, rows, cols))))
                    continue
                anchor = anchor.permute(0, 3, 1, 2)
                anchor = F.interpolate(anchor, (rows, cols), mode="bilinear", align_corners=False).permute(0, 2, 3, 1)
                full = torch.cat((norm(full), norm(anchor)), dim=-1)
            maps.append(self.laterals[stage](full))
        return maps

    def _enlarged(self, x: Tensor, rows: int, cols: int) -> Tensor:
        """Bilinear enlargement of (n, h, w, C) as two matrix products: an interpolation kernel reads channel-last badly."""
        tall = torch.einsum("ij,njkc->nikc", self.frozen_resize[x.shape[1], rows], x)
        return torch.einsum("ij,nkjc->nkic", self.frozen_resize[x.shape[2], cols], tall)

    def _frozen_lateral(self, stage: int, full: Tensor, anchor: Tensor) -> Tensor:
        """The lateral of both maps side by side, without putting them there."""
        lateral = self.laterals[stage]
        assert isinstance(lateral, nn.Sequential)
        linear, norm = lateral
        assert isinstance(linear, nn.Linear)
        first, second = linear.weight.split(full.shape[-1], dim=1)
        return norm(F.linear(full, first) + F.linear(anchor, second))


def patch_tokens(pixels: Tensor, conv: nn.Conv2d) -> Tensor:
    """``conv``'s patches of (B, 3, H, W) as tokens (B, h·w, C).

    On a GPU as one matrix product: the library's kernel for 16-bit convolutions with such strides takes ten times as long.
    """
    if not pixels.is_cuda:
        return conv(pixels).flatten(2).transpose(1, 2)
    patch = conv.weight.shape[-1]
    cells = pixels.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # (B, 3, h, p, w, p)
    cells = cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    return F.linear(cells, conv.weight.flatten(1), conv.bias)


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
