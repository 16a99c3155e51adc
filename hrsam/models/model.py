"""The whole model: encode a picture once, decode once a click."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrsam.models.decoder import MaskDecoder
from hrsam.models.encoder import Encoder, EncoderConfig
from hrsam.models.fast import FastDecoder, optimized
from hrsam.models.prompt import BOX_FIRST, BOX_SECOND, NOT_A_POINT, PromptEncoder
from hrsam.models.sam_vit import SamVit, SamVitConfig

RGB_MEAN = (123.675, 116.28, 103.53)
RGB_STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class ModelConfig:
    """Architecture and how pixels are to be prepared.

    ``mean`` and ``std`` on the 0–255 scale, for channel 0, 1, 2 as the encoder sees them; ``bgr``: the encoder's channel 0
    is blue (the authors' released weights); ``decoder``: False for a file that holds an encoder only.
    """

    preset: str
    encoder: EncoderConfig | SamVitConfig
    mean: tuple[float, float, float] = RGB_MEAN
    std: tuple[float, float, float] = RGB_STD
    bgr: bool = False
    decoder: bool = True


@dataclass(frozen=True, eq=False)
class Embedding:
    """What the model remembers of a picture, or of each in a batch.

    ``features`` and ``positions``: (1, 256, h, w) or (B, 256, h, w).  ``grids`` (B, 2) whole numbers on their device: rows
    and columns of each picture of a batch, the rest of its map is padding at the bottom and right; None: nothing is.
    """

    features: Tensor
    positions: Tensor
    grids: Tensor | None = None

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the feature map."""
        return self.features.shape[2], self.features.shape[3]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the model's input in pixels."""
        return 16 * self.features.shape[2], 16 * self.features.shape[3]


@dataclass(frozen=True, eq=False)
class Decoded:
    """``logits`` (B, M, 4h, 4w), a pixel belongs to the object where they are above 0; ``iou`` (B, M) predicted IoU."""

    logits: Tensor
    iou: Tensor


def within(sizes: Tensor, rows: int, cols: int) -> Tensor:
    """Where maps are no padding: ``sizes`` (B, 2), rows and columns of each at the top left -> (B, rows, cols) bool."""
    y, x = (torch.arange(length, device=sizes.device) for length in (rows, cols))
    return (y < sizes[:, :1]).unsqueeze(2) & (x < sizes[:, 1:]).unsqueeze(1)


class HRSAM(nn.Module):
    """Encoder, prompt encoder and mask decoder.  Made by :func:`hrsam.build` or :func:`hrsam.load`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.encoder = SamVit(config.encoder) if isinstance(config.encoder, SamVitConfig) else Encoder(config.encoder)
        if config.decoder:
            self.prompt_encoder = PromptEncoder()
            self.mask_decoder = MaskDecoder()

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def normalise(self, image: Tensor) -> Tensor:
        """(3, H, W) RGB in [0, 1] -> what the encoder takes, before padding: (3, H, W)."""
        if image.ndim != 3 or image.shape[0] != 3:
            raise ValueError(f"an image is (3, H, W) RGB in [0, 1]; got {tuple(image.shape)}")
        image = image.to(self.device, torch.float32)
        if self.config.bgr:
            image = image.flip(0)
        mean, std = (torch.tensor(v, device=image.device).view(3, 1, 1) for v in (self.config.mean, self.config.std))
        return (image * 255 - mean) / std

    @torch.no_grad()
    def encode(self, images: Sequence[Tensor]) -> list[Embedding]:
        """Pictures of any sizes, each (3, H, W) float RGB in [0, 1] -> one :class:`Embedding` each, h = ⌈H / 16⌉.

        Each is padded at the bottom and right to a multiple of 16 with the mean colour.  All go through the encoder in one
        packed call; the result of one is the same whatever else is in the call.
        """
        ready = []
        for image in images:
            image = self.normalise(image)
            ready.append(F.pad(image, (0, -image.shape[2] % 16, 0, -image.shape[1] % 16)))
        return self.encode_normalised(ready)

    @torch.no_grad()
    def encode_normalised(self, images: Sequence[Tensor]) -> list[Embedding]:
        """As :meth:`encode` for pictures that are already normalised and padded (:meth:`hrsam.frame.Frame.prepare`)."""
        features = self.encoder.encode([image.to(self.device) for image in images])
        grids = {(f.shape[1], f.shape[2]) for f in features}
        positions = {grid: torch.empty(0, device=self.device) for grid in grids}
        if self.config.decoder:
            positions = {grid: self.dense_positions(grid) for grid in grids}
        return [Embedding(f.unsqueeze(0), positions[f.shape[1], f.shape[2]]) for f in features]

    def decode(
        self,
        embedding: Embedding,
        points: Tensor,
        labels: Tensor,
        box: Tensor | None = None,
        previous: Tensor | None = None,
        masks: Sequence[int] = (0,),
    ) -> Decoded:
        """Masks for prompts on one embedding, or one prompt for each image of a batched embedding.

        A picture padded in a batch is answered as alone, and what is answered for its padding means nothing.
        Coordinates are (x, y) in pixels of the model's input, (0, 0) the centre of the first pixel.  ``points`` (B, P, 2),
        ``labels`` (B, P): 1 positive, 0 negative, −1 SAM's "not a point"; ``box`` (B, 4): x0, y0, x1, y1;
        ``previous`` (B, 1, 4h, 4w): logits of the round before.  ``masks``: 0 is the single answer, 1–3 SAM's three guesses.
        Raises ``ValueError`` for an empty prompt, shapes that do not fit, a model without a decoder, or padded pictures in an
        optimized copy.
        """
        if not self.config.decoder:
            raise ValueError(
                "this model was converted with --encoder-only and has no prompt encoder and mask decoder; "
                "convert a file that holds them, or use model.encoder for features"
            )
        if points.ndim != 3 or points.shape[2] != 2 or labels.shape != points.shape[:2]:
            raise ValueError(
                f"points are (B, P, 2), labels (B, P); got {tuple(points.shape)} and {tuple(labels.shape)}"
            )
        if points.shape[1] == 0 and box is None and previous is None:
            raise ValueError("an empty prompt has no answer; give at least one click, a box or an earlier mask")
        batch, padding = points.shape[0], {}
        if embedding.grids is not None:
            if isinstance(self.decode_prompts, FastDecoder):
                raise ValueError(
                    "an optimized model takes no pictures padded to one grid; decode each embedding by itself"
                )
            if embedding.grids.shape != (batch, 2) or embedding.features.shape[0] != batch:
                raise ValueError(
                    f"pictures padded to one grid have a prompt each; got {len(embedding.features)} pictures, grids "
                    f"{tuple(embedding.grids.shape)} and {batch} prompts"
                )
            padding["grids"] = embedding.grids
        if box is None:
            points = torch.cat((points, points.new_zeros(batch, 1, 2)), dim=1)
            labels = torch.cat((labels, labels.new_full((batch, 1), NOT_A_POINT)), dim=1)
        else:
            points = torch.cat((points, box.view(batch, 2, 2).to(points.dtype)), dim=1)
            # filled there: a table made here would be copied, and waited for
            corners = [labels.new_full((batch, 1), corner) for corner in (BOX_FIRST, BOX_SECOND)]
            labels = torch.cat((labels, *corners), dim=1)
        features = embedding.features
        if features.shape[0] != batch:
            features = features.expand(batch, -1, -1, -1)
        logits, iou = self.decode_prompts(
            features, embedding.positions, points, labels, previous, masks=tuple(masks), **padding
        )
        return Decoded(logits, iou)

    def dense_positions(self, grid: tuple[int, int]) -> Tensor:
        """Position code of every embedding cell, (1, C, h, w)."""
        return self.prompt_encoder.dense_positions(grid)

    def decode_prompts(self, features, positions, points, labels, previous, masks, grids=None):
        """Tensors in, logits and predicted IoU out; what :meth:`decode` prepares and :meth:`optimize` replaces."""
        batch, _, rows, cols = features.shape
        size, inside = (16 * rows, 16 * cols), None
        if grids is not None:
            size, inside = 16 * grids, within(grids, rows, cols)
        sparse = self.prompt_encoder.sparse(points, labels, size)
        dense = self.prompt_encoder.dense(previous, batch, (rows, cols))
        return self.mask_decoder(features, positions, sparse, dense, masks, inside=inside)

    def optimize(self, *, dtype: torch.dtype = torch.bfloat16, compile: bool = True, graphs: bool = True) -> HRSAM:
        """A copy for inference: ``encode`` and ``decode`` as before, several times faster on a GPU.

        ``dtype``: precision of matrix products, float32, float16 or bfloat16; results differ from this model's by its
        rounding.  ``compile``: by ``torch.compile``, about 20 seconds for each new picture size.  ``graphs``: CUDA graphs,
        one for each size of picture and a few lengths of prompt, the least recently used are dropped; ignored on a CPU.
        Weights are copied: later changes of this model do not reach the copy.  The copy stays on this model's device, so
        move the model first.  Raises ``ValueError`` for another ``dtype``, or a SAM ViT.
        """
        return optimized(self, dtype, compile, graphs)
