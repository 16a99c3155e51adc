"""Teachers of a distillation: a frozen model whose embeddings a student learns to give.

A teacher is a weight file: SAM's ViT-B, -L or -H, HQ-SAM's encoder (the same ViT, ``hrsam convert --from sam
--encoder-only``), or any model of ours.  It is never the student: what is missing is an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hrsam.data.transforms import MEAN, STD
from hrsam.frame import Frame
from hrsam.losses import logit_divergence
from hrsam.models.model import HRSAM, Embedding, ModelConfig
from hrsam.models.sam_vit import PATCH, SamVitConfig
from hrsam.weightfile import WeightsError, config_from_json, read_metadata, sha256
from hrsam.weights import load, locate

TRANSFORM = 1
"""Version of the way from a picture's file to what a teacher sees (:func:`hrsam.images.read_image`, :func:`prepare`).

To be raised with every change of it that changes an embedding: cached targets of another version are not used.
"""

PRECISIONS = (torch.float32, torch.bfloat16, torch.float16)
SAM_CHANNELS = 256  # of the embedding of SAM's encoders, whatever their width


@dataclass(frozen=True, eq=False)
class Teacher:
    """Made by :func:`load_teacher`.  ``path``, ``sha256``: its weight file; ``precision``: of matrix products and results."""

    model: HRSAM
    path: Path
    sha256: str
    precision: torch.dtype

    def targets(self, pictures: Sequence[np.ndarray], side: int) -> list[Tensor]:
        """Embeddings of pictures (H, W, 3) uint8 RGB: (C, g, g) each, g = ⌈side / stride⌉, padding included.

        In ``precision``, on the model's device, without gradient.  The result of a picture does not depend on the others.
        Raises ``ValueError`` for a side that this teacher does not take.
        """
        check_side(self.model.config, side)
        ready = [prepare(picture, side, self.model.config, self.model.device) for picture in pictures]
        with self._autocast():
            return [e.features[0].to(self.precision) for e in self.model.encode_normalised(ready)]

    @torch.no_grad()
    def on_canvases(self, pixels: Tensor, valid: Tensor) -> Tensor:
        """Embeddings of training canvases, :class:`hrsam.data.transforms.Batch`, in this teacher's own normalisation.

        ``pixels`` (B, 3, S, S), ``valid`` (B, 1, S, S) bool, on the model's device -> (B, C, S/16, S/16) in ``precision``.
        """
        config = self.model.config
        check_side(config, pixels.shape[-1])
        if (config.mean, config.std, config.bgr) != (MEAN, STD, False):
            mean, std, own_mean, own_std = (
                torch.tensor(values, device=pixels.device).view(3, 1, 1)
                for values in (MEAN, STD, config.mean, config.std)
            )
            colours = pixels * std + mean
            colours = colours.flip(1) if config.bgr else colours
            pixels = torch.where(valid, (colours - own_mean) / own_std, 0.0)
        with self._autocast():
            return self.model.encoder(pixels).to(self.precision)

    def logits(self, features: Tensor, points: Tensor, labels: Tensor, box: Tensor | None = None) -> Tensor:
        """This teacher's decoder on anybody's ``features`` (B, C, h, w) -> (B, 4, 4h, 4w): the answer and three guesses.

        Prompts as in :meth:`hrsam.models.model.HRSAM.decode`, in pixels of the model's input.  The gradient flows into
        ``features`` only.  Raises ``ValueError`` for a teacher without a decoder.
        """
        if not self.model.config.decoder:
            raise ValueError(f"the teacher {self.path.name} has no mask decoder; learn from its embeddings alone")
        embedding = Embedding(features.float(), self.model.dense_positions((features.shape[2], features.shape[3])))
        with self._autocast():
            return self.model.decode(embedding, points, labels, box, masks=(0, 1, 2, 3)).logits

    def decoder_loss(
        self,
        student: Tensor,
        target: Tensor,
        points: Tensor,
        labels: Tensor,
        box: Tensor | None = None,
        real: Tensor | None = None,
    ) -> Tensor:
        """How far this teacher's decoder is led astray by the student's features: (B,), mean over its four masks.

        ``student``, ``target`` (B, C, h, w); ``real`` (B, h, w) bool, as in :func:`hrsam.losses.embedding_mse`; the masks'
        pixels in other cells do not count.  Loss: :func:`hrsam.losses.logit_divergence`.
        """
        with torch.no_grad():
            wanted = self.logits(target, points, labels, box)
        found = self.logits(student, points, labels, box)
        if real is not None:
            real = real.repeat_interleave(4, 1).repeat_interleave(4, 2).unsqueeze(1).expand_as(found)
        return logit_divergence(found, wanted, real).mean(1)

    def _autocast(self) -> torch.autocast:
        enabled = self.precision != torch.float32
        return torch.autocast(self.model.device.type, self.precision if enabled else torch.bfloat16, enabled=enabled)


def load_teacher(
    name: str | Path, device: str | torch.device = "cpu", precision: torch.dtype = torch.float32
) -> Teacher:
    """A teacher by tag or ``.safetensors`` file, in eval mode, without gradients.

    Raises ``ValueError`` for an unknown name, a bad file (:class:`hrsam.weightfile.WeightsError`) and a ``precision`` other
    than float32, bfloat16 and float16.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"got precision {precision}; a teacher computes in {', '.join(map(str, PRECISIONS))}")
    path = locate(name)
    return Teacher(load(path, device).requires_grad_(False), path, sha256(path), precision)


def teacher_config(name: str | Path) -> ModelConfig:
    """Architecture of a teacher, whose weights are not read; errors as in :func:`load_teacher`."""
    path = locate(name)
    try:
        return config_from_json(read_metadata(path).get("config", ""))
    except WeightsError:
        raise
    except ValueError as err:
        raise WeightsError(f"{path}: {err}") from None


def embedding_shape(config: ModelConfig) -> tuple[int, int]:
    """Channels of a model's embedding, and pixels of a cell's side."""
    encoder = config.encoder
    return (SAM_CHANNELS, PATCH) if isinstance(encoder, SamVitConfig) else (encoder.out_channels, encoder.patch)


def check_side(config: ModelConfig, side: int) -> None:
    """``ValueError`` when the model does not take pictures of this side."""
    encoder = config.encoder
    if isinstance(encoder, SamVitConfig) and side != encoder.image_size:
        raise ValueError(f"{config.preset} takes a side of {encoder.image_size} pixels only; got {side}")


def check_pair(teacher: ModelConfig, student: ModelConfig, side: int) -> None:
    """``ValueError`` when the student cannot learn this teacher's embeddings at ``side`` pixels."""
    theirs, own = embedding_shape(teacher), embedding_shape(student)
    if theirs != own:
        raise ValueError(
            f"the teacher {teacher.preset} gives {theirs[0]} channels for every {theirs[1]} pixels and the student "
            f"{student.preset} {own[0]} for every {own[1]}; choose a teacher and a student of one shape"
        )
    check_side(teacher, side)
    check_side(student, side)


def prepare(
    picture: np.ndarray, side: int, config: ModelConfig, device: torch.device | str = "cpu", *, square: bool = True
) -> Tensor:
    """What a model sees of ``picture`` (H, W, 3) uint8 RGB: (3, PH, PW), the same for teacher and student but for mean,
    deviation and channel order.  See :meth:`hrsam.frame.Frame.prepare`; ``square`` as in :class:`hrsam.frame.Frame`."""
    frame = Frame(picture.shape[0], picture.shape[1], side, square)
    return frame.prepare(picture, config.mean, config.std, bgr=config.bgr, device=device)


def real_cells(frames: Sequence[Frame], stride: int = PATCH) -> Tensor:
    """Cells of square embeddings that show a part of their picture: (B, g, g) bool; they lie top left.

    ``frames`` of one side.  A student that sees a picture without the padding of the square (``square=False``) has real
    cells only, and is held against ``target[:, :rows, :columns]``.
    """
    grid = -(-frames[0].side // stride)
    real = torch.zeros(len(frames), grid, grid, dtype=torch.bool)
    for one, frame in zip(real, frames):
        height, width = frame.resized
        one[: -(-height // stride), : -(-width // stride)] = True
    return real
