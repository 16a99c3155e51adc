"""SAM's own image encoder (arXiv 2304.02643), as timm has it: the teacher of HRSAM and the baseline beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from hrsam._compat import import_timm_sam

PATCH = 16


@dataclass(frozen=True)
class SamVitConfig:
    """Architecture.  ``global_at``: blocks whose attention sees the whole picture, the others see ``window``² tokens.

    ``image_size`` pixels: the only side the encoder takes, because its positions are tied to it.
    """

    width: int
    depth: int
    heads: int
    global_at: tuple[int, ...]
    window: int = 14
    image_size: int = 1024


class SamVit(nn.Module):
    """Normalised pixels -> feature map.  Needs timm; ``ValueError`` without it."""

    def __init__(self, config: SamVitConfig):
        super().__init__()
        self.config = config
        self.vit = import_timm_sam().VisionTransformerSAM(
            img_size=config.image_size,
            patch_size=PATCH,
            embed_dim=config.width,
            depth=config.depth,
            num_heads=config.heads,
            global_attn_indexes=config.global_at,
            window_size=config.window,
            use_rel_pos=True,
            num_classes=0,
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """``pixels`` (B, 3, S, S) normalised, S the configured ``image_size`` -> (B, 256, S / 16, S / 16).

        Raises ``ValueError`` for another shape: timm would resize the positions, which is not what SAM was trained for.
        """
        side = self.config.image_size
        if pixels.ndim != 4 or pixels.shape[1:] != (3, side, side):
            raise ValueError(
                f"this SAM encoder takes (B, 3, {side}, {side}); got {tuple(pixels.shape)}: "
                f"resize the longest side to {side} and pad at the bottom and right (a session with side={side} does)"
            )
        return self.vit.forward_features(pixels)

    def encode(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Each (3, S, S), as in :meth:`forward` -> (256, S / 16, S / 16) each."""
        if not images:
            raise ValueError("got no images to encode; give at least one (3, H, W) tensor")
        return [self(image.unsqueeze(0))[0] for image in images]
