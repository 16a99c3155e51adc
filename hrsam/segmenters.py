"""What plays the simulated user's game: a *segmenter* is given a picture, then all clicks so far, and answers with a mask.

A model can also play several samples at once, :class:`BatchSegmenter`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from hrsam.clicks import Click, check_clicks
from hrsam.frame import Frame
from hrsam.models.model import HRSAM, Embedding


class Segmenter(Protocol):
    """:class:`ModelSegmenter`, or one of :mod:`hrsam.baselines`."""

    def start(self, pixels: np.ndarray) -> None:
        """A new picture (H, W, 3) uint8 RGB; everything before is forgotten."""
        ...

    def click(self, clicks: Sequence[Click]) -> Any:
        """The mask (H, W) bool after ``clicks``, all of this picture so far, the newest last.

        A NumPy array, or a tensor on the device that ``device`` names, where user and metric then work too.
        """
        ...


@runtime_checkable
class BatchSegmenter(Protocol):
    """A segmenter of several pictures."""

    def start_all(self, pixels: Sequence[np.ndarray]) -> None:
        """:meth:`Segmenter.start` for pictures of any sizes."""
        ...

    def click_all(self, clicks: Sequence[Sequence[Click] | None]) -> list[Any]:
        """:meth:`Segmenter.click` for each of the pictures; where clicks are None nothing is asked and the answer is None."""
        ...


def together(segmenter: Segmenter, count: int) -> BatchSegmenter:
    """``segmenter`` for ``count`` pictures; ``ValueError`` when there are several and it takes one at a time."""
    if count == 1:
        return _Alone(segmenter)
    if isinstance(segmenter, BatchSegmenter):
        return segmenter
    raise ValueError(f"{type(segmenter).__name__} takes one picture at a time; got {count}: use a batch of 1")


@dataclass(frozen=True)
class _Alone:
    """A batch of one picture."""

    segmenter: Segmenter

    def start_all(self, pixels: Sequence[np.ndarray]) -> None:
        self.segmenter.start(pixels[0])

    def click_all(self, clicks: Sequence[Sequence[Click] | None]) -> list[Any]:
        return [None if made is None else self.segmenter.click(made) for made in clicks]


@dataclass
class _Place:
    """One picture of a :class:`ModelSegmenter`; ``previous`` (4h, 4w): its logits of the round before."""

    frame: Frame
    embedding: Embedding
    previous: Tensor | None = None


class ModelSegmenter:
    """A model at input ``side``; its logits of the round before are fed back.

    ``on_device``: masks are enlarged where the model is and stay there; None: if that is a GPU.
    """

    def __init__(self, model: HRSAM, side: int = 1024, threshold: float = 0.5, on_device: bool | None = None):
        self.model, self.side, self.above = model, side, math.log(threshold / (1 - threshold))
        on_device = model.device.type == "cuda" if on_device is None else on_device
        self.device = model.device if on_device else None
        self._places: list[_Place] = []
        self._joined: tuple[list[int], Embedding] | None = None  # the embeddings decoded last, in one tensor

    def start(self, pixels: np.ndarray) -> None:
        self.start_all([pixels])

    def click(self, clicks: Sequence[Click]) -> np.ndarray | Tensor:
        return self.click_all([clicks])[0]

    def start_all(self, pixels: Sequence[np.ndarray]) -> None:
        self._places, self._joined = [], None
        model, config = self.model, self.model.config
        frames = [Frame(picture.shape[0], picture.shape[1], self.side) for picture in pixels]
        embeddings = model.encode_normalised(
            [
                frame.prepare(picture, config.mean, config.std, bgr=config.bgr, device=model.device)
                for frame, picture in zip(frames, pixels)
            ]
        )
        self._places = [_Place(frame, embedding) for frame, embedding in zip(frames, embeddings)]

    @torch.no_grad()
    def click_all(self, clicks: Sequence[Sequence[Click] | None]) -> list[Any]:
        if not self._places or len(clicks) != len(self._places):
            raise ValueError(f"got clicks for {len(clicks)} pictures, {len(self._places)} are set; call start first")
        alike: dict[Any, list[int]] = {}  # what one decode can answer
        for index, (place, made) in enumerate(zip(self._places, clicks)):
            if made is not None:
                check_clicks(made, place.frame.height, place.frame.width)
                alike.setdefault((place.embedding.grid, len(made), place.previous is None), []).append(index)
        for indices in alike.values():
            self._decode(indices, [clicks[index] or () for index in indices])
        return [None if made is None else self._mask(place) for place, made in zip(self._places, clicks)]

    def _decode(self, indices: list[int], clicks: Sequence[Sequence[Click]]) -> None:
        """New logits for these places, which have equal grids and numbers of clicks, in one decode."""
        places, device = [self._places[index] for index in indices], self.model.device
        if self._joined is None or self._joined[0] != indices:
            features = torch.cat([place.embedding.features for place in places])
            self._joined = indices, Embedding(features, places[0].embedding.positions)
        points = torch.stack(
            [
                place.frame.to_model(torch.tensor([[c.x, c.y] for c in made], dtype=torch.float64).view(-1, 2))
                for place, made in zip(places, clicks)
            ]
        )
        labels = torch.tensor([[int(c.positive) for c in made] for made in clicks], dtype=torch.int64)
        earlier = [place.previous for place in places if place.previous is not None]
        out = self.model.decode(
            self._joined[1],
            points.float().to(device, non_blocking=True),
            labels.to(device, non_blocking=True),
            previous=torch.stack(earlier).unsqueeze(1) if earlier else None,
        )
        for place, logits in zip(places, out.logits[:, 0].float()):
            place.previous = logits

    def _mask(self, place: _Place) -> np.ndarray | Tensor:
        assert place.previous is not None
        enlarge = place.frame.mask_to_original if self.device is None else place.frame.mask_on_device
        return enlarge(place.previous, self.above)
