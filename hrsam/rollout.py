"""Rounds of simulated clicks with a loss: what one training step computes.

A step encodes a batch of canvases, or a pack of pictures of different sizes, once and plays a few rounds with the objects of
each: predict, let the simulated user place the next click on the largest error, predict again with the earlier logits fed
back.  The loss of a round is normalized focal plus Dice at the picture's resolution; the first round also trains SAM's three
guesses (only the best one is pulled) and every round trains the predicted IoU.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrsam.clicks import random_clicks, simulate_clicks
from hrsam.config import Settings
from hrsam.losses import dice_loss, iou_target, normalized_focal_loss, weighted_sum
from hrsam.models.encoder import Encoder
from hrsam.models.model import HRSAM, Embedding

STRIDE = 4  # mask logits, and the clicks of the simulated user in training, live at a quarter of the canvas
PATCH = 16  # pixels of a cell of the encoder's map


class Rounds(Settings):
    """How the simulated user plays.  Probabilities are per step, the same on every device.

    ``trained`` rounds with a loss, then up to ``most_silent`` without one, each with probability ``another``, and a last one
    with a loss.  A step begins with a loose box (``start_box``; sides moved by ``box_jitter`` of the box's size), with up to
    ``most_random`` random clicks at once (``start_random``), or with one click.  ``spread``: how far from the deepest pixel
    clicks may fall, see :func:`hrsam.clicks.simulate_clicks`; half of the first ones are exact.  ``guess_weight`` and
    ``iou_weight``: of the losses of SAM's three guesses and of the predicted IoU.
    """

    trained: int = 3
    another: float = 0.6
    most_silent: int = 6
    start_random: float = 0.3
    most_random: int = 7
    start_box: float = 0.15
    box_jitter: float = 0.06
    spread: float = 1.7
    guess_weight: float = 0.5
    iou_weight: float = 0.5


@dataclass(frozen=True)
class _Course:
    """What is the same for all pictures of a step on all devices.

    ``start``: "box", "click", or the number of random clicks at once; ``trained``: for each round whether it has a loss.
    """

    start: str | int
    trained: tuple[bool, ...]

    @classmethod
    def drawn(cls, rounds: Rounds, plan: random.Random) -> _Course:
        kind = plan.random()
        start: str | int = "click"
        if kind < rounds.start_box:
            start = "box"
        elif kind < rounds.start_box + rounds.start_random:
            start = plan.randint(1, rounds.most_random)
        silent = 0
        while silent < rounds.most_silent and plan.random() < rounds.another:
            silent += 1
        return cls(start, (True,) * rounds.trained + (False,) * silent + (True,))


@dataclass(frozen=True, eq=False)
class _Part:
    """Rows of a batch whose clicks are drawn by one ``generator``, in a top left window of (``rows``, ``cols``) stride-4 cells:
    the objects of one picture without its padding, or all of a batch of canvases."""

    count: int
    rows: int
    cols: int
    generator: torch.Generator


class ClickRollout(nn.Module):
    """Encode once, then rounds of prediction and simulated clicks; returns the loss and what to log."""

    def __init__(self, model: HRSAM, rounds: Rounds):
        super().__init__()
        self.model = model
        self.rounds = rounds

    def forward(self, pixels: Tensor, truth: Tensor, generator: torch.Generator, plan: random.Random):
        """Canvases.  ``pixels`` (B, 3, S, S) normalised, ``truth`` (B, K, S, S) bool; ``plan`` draws the course of the rounds.

        Returns the mean loss of rounds and objects, and the mean IoU of each round with a loss.
        """
        self.set_side(pixels.shape[-1])
        features = self.model.encoder(pixels).repeat_interleave(truth.shape[1], dim=0)
        truth = truth.flatten(0, 1)
        course = _Course.drawn(self.rounds, plan)
        losses, ious = self._play(features, truth, None, [_part(truth, generator)], course)
        return losses.mean(), ious.mean(1)

    def packed(
        self,
        pictures: Sequence[Tensor],
        truths: Sequence[Tensor],
        weights: Sequence[float],
        generators: Sequence[torch.Generator],
        plan: random.Random,
    ):
        """A pack of pictures of any sizes, each with its own objects.

        ``pictures`` (3, Hi, Wi) normalised, padded here to whole patches with 0; ``truths`` (Ki, Hi, Wi) bool, Ki at least 1;
        ``weights``: what each object of a picture counts, from the whole step (:func:`hrsam.data.packing.loss_weights`);
        ``generators``: one for each picture, for its clicks and its stochastic depth; ``plan`` as in :meth:`forward`, in the
        same state for all packs of a step.  The anchor map has the side it has when the model is used.

        Returns the weighted sum, over objects, of the loss averaged over rounds, and the mean IoU of each round with a loss.
        Both are exact: the encoder sees all pictures as one packed sequence, the decoder those of one grid together, padding
        is neither clicked nor counted, and what a picture draws does not depend on what is beside it.  So packs add up to the
        loss of the step, however it is cut.  Raises ``ValueError`` for lists of different lengths and truths that do not fit.
        """
        _check_pack(pictures, truths, weights, generators)
        encoder = self.model.encoder
        if not isinstance(encoder, Encoder):
            raise ValueError("SAM's encoder takes squares of one size only; train it on canvases")
        encoder.anchor_side = encoder.config.anchor_side
        padded = [F.pad(picture, (0, -picture.shape[2] % PATCH, 0, -picture.shape[1] % PATCH)) for picture in pictures]
        features = encoder.forward_packed(padded, generators)
        course = _Course.drawn(self.rounds, plan)
        alike: dict[tuple[int, ...], list[int]] = {}
        for index, picture in enumerate(padded):
            alike.setdefault(tuple(picture.shape[1:]), []).append(index)
        losses, reached, counted = [], [], []
        for (height, width), indices in alike.items():
            truth = torch.cat([_padded(truths[i], height, width) for i in indices])
            valid = None
            if any(truths[i].shape[1:] != (height, width) for i in indices):
                valid = torch.cat([_padded(torch.ones_like(truths[i]), height, width) for i in indices])
            counts = [len(truths[i]) for i in indices]
            each = torch.cat([features[i].expand(n, -1, -1, -1) for i, n in zip(indices, counts)])
            parts = [_part(truths[i], generators[i]) for i in indices]
            loss, iou = self._play(each, truth, valid, parts, course)
            losses.append(loss.mean(0))
            reached.append(iou)
            counted += [weights[i] for i, n in zip(indices, counts) for _ in range(n)]
        return weighted_sum(torch.cat(losses), counted), torch.cat(reached, dim=1).mean(1)

    def set_side(self, side: int) -> None:
        halve_anchor(self.model.encoder, side)

    def _play(
        self, features: Tensor, truth: Tensor, valid: Tensor | None, parts: Sequence[_Part], course: _Course
    ) -> tuple[Tensor, Tensor]:
        """Rounds for objects of one grid: ``features`` (N, C, h, w), ``truth`` and ``valid`` (N, 16h, 16w), ``parts`` of the N.

        Returns loss and IoU, (rounds with a loss, N).
        """
        embedding = Embedding(
            features, self.model.prompt_encoder.dense_positions((features.shape[2], features.shape[3]))
        )
        small = F.max_pool2d(truth.unsqueeze(1).float(), STRIDE).squeeze(1) > 0
        inner = F.avg_pool2d(truth.unsqueeze(1).float(), STRIDE).squeeze(1) > 0.5
        small = torch.where(inner.flatten(1).any(1).view(-1, 1, 1), inner, small)
        real = None if valid is None else F.max_pool2d(valid.unsqueeze(1).float(), STRIDE).squeeze(1) > 0

        points, labels, box = self._start(small, parts, course.start)
        previous: Tensor | None = None
        losses, ious = [], []
        for index, trained in enumerate(course.trained):
            first = index == 0
            with torch.set_grad_enabled(trained):
                out = self.model.decode(embedding, points, labels, box, previous, masks=(0, 1, 2, 3) if first else (0,))
                if trained:
                    loss, iou = _mask_loss(
                        out.logits, out.iou, truth, small, valid, real, self.rounds.guess_weight, self.rounds.iou_weight
                    )
                    losses.append(loss)
                    ious.append(iou)
            previous = out.logits[:, :1].detach()
            if index + 1 < len(course.trained):
                new_points, new_labels = self._next(small, previous[:, 0] > 0, parts, self.rounds.spread)
                points = torch.cat((points, new_points), dim=1)
                labels = torch.cat((labels, new_labels), dim=1)
        return torch.stack(losses), torch.stack(ious)

    def _start(self, small: Tensor, parts: Sequence[_Part], start: str | int):
        """First prompt: one click, or several random ones at once, or a box."""
        batch, windows = small.shape[0], _windows(small, parts)
        if start == "box":
            points = torch.zeros(batch, 0, 2, device=small.device)
            labels = torch.zeros(batch, 0, dtype=torch.int64, device=small.device)
            boxes = [_loose_box(w, self.rounds.box_jitter, p.generator) for w, p in zip(windows, parts)]
            return points, labels, torch.cat(boxes)
        if isinstance(start, int):
            drawn = [random_clicks(w, start, p.generator) for w, p in zip(windows, parts)]
            points, positive = (torch.cat(each) for each in zip(*drawn))
            return _model_pixels(points), positive.long(), None
        exact = [torch.rand(p.count, device=small.device, generator=p.generator) < 0.5 for p in parts]
        spread = torch.where(torch.cat(exact), 1.0, self.rounds.spread)
        points, labels = self._next(small, torch.zeros_like(small), parts, spread)
        return points, labels, None

    def _next(self, truth: Tensor, mask: Tensor, parts: Sequence[_Part], spread: float | Tensor):
        spreads = spread.split([p.count for p in parts]) if isinstance(spread, Tensor) else [spread] * len(parts)
        with torch.no_grad():
            clicked = [
                simulate_clicks(t, m, p.generator, spread=s)[:2]
                for t, m, p, s in zip(_windows(truth, parts), _windows(mask, parts), parts, spreads)
            ]
        points, positive = (torch.cat(each) for each in zip(*clicked))
        return _model_pixels(points).unsqueeze(1), positive.long().unsqueeze(1)


def halve_anchor(encoder: nn.Module, side: int) -> None:
    """In training on squares of ``side`` pixels the anchor map is half of them, as 512 is of 1024."""
    if isinstance(encoder, Encoder) and encoder.anchor_side is not None:
        encoder.anchor_side = side // 2


def _part(truth: Tensor, generator: torch.Generator) -> _Part:
    count, height, width = truth.shape
    return _Part(count, -(-height // STRIDE), -(-width // STRIDE), generator)


def _windows(cells: Tensor, parts: Sequence[_Part]) -> list[Tensor]:
    """The rows (N, h, w) of each part, without its padding."""
    split = cells.split([part.count for part in parts])
    return [rows[:, : part.rows, : part.cols] for rows, part in zip(split, parts)]


def _padded(mask: Tensor, height: int, width: int) -> Tensor:
    return F.pad(mask, (0, width - mask.shape[2], 0, height - mask.shape[1]))


def _check_pack(
    pictures: Sequence[Tensor],
    truths: Sequence[Tensor],
    weights: Sequence[float],
    generators: Sequence[torch.Generator],
) -> None:
    if not pictures or not len(pictures) == len(truths) == len(weights) == len(generators):
        raise ValueError(
            f"got {len(pictures)} pictures, {len(truths)} truths, {len(weights)} weights and {len(generators)} generators; "
            "give at least one picture, and one of each for every picture"
        )
    for picture, truth in zip(pictures, truths):
        if truth.dtype != torch.bool or truth.ndim != 3 or not len(truth) or truth.shape[1:] != picture.shape[1:]:
            raise ValueError(
                f"the truth of a picture {tuple(picture.shape)} is bool (K, {picture.shape[1]}, {picture.shape[2]}) with at "
                f"least one object; got {truth.dtype} {tuple(truth.shape)}"
            )


def _model_pixels(cells: Tensor) -> Tensor:
    """Centres of stride-4 cells in pixels of the canvas, (0, 0) the centre of the first pixel."""
    return (cells + 0.5) * STRIDE - 0.5


def _loose_box(small: Tensor, jitter: float, generator: torch.Generator) -> Tensor:
    """Boxes (B, 4) in canvas pixels around stride-4 objects (B, h, w), each side moved by a fraction of the box's size."""
    edges = []
    for axis in (1, 2):
        hit = small.any(axis).int()  # (B, w), then (B, h)
        length = hit.shape[1]
        edges.append((hit.argmax(1).float(), (length - hit.flip(1).argmax(1)).float()))
    (x0, x1), (y0, y1) = edges
    box = torch.stack((x0, y0, x1, y1), dim=1) * STRIDE - 0.5
    size = torch.stack((x1 - x0, y1 - y0, x1 - x0, y1 - y0), dim=1) * STRIDE
    noise = torch.randn(box.shape, device=box.device, generator=generator)
    limit = torch.tensor([small.shape[2], small.shape[1]] * 2, device=box.device) * STRIDE - 1.0
    return (box + jitter * size * noise).clamp(min=0).minimum(limit)


def _mask_loss(
    logits: Tensor,
    iou: Tensor,
    truth: Tensor,
    small: Tensor,
    valid: Tensor | None,
    real: Tensor | None,
    guess_weight: float,
    iou_weight: float,
) -> tuple[Tensor, Tensor]:
    """Loss of one round and IoU of token 0, both (N,).

    ``logits`` (N, M, h, w), M = 1 or 4; ``iou`` (N, M) predicted; ``truth`` (N, 4h, 4w); ``small`` (N, h, w); ``valid`` and
    ``real``: where ``truth`` and ``small`` are no padding, None for everywhere.
    """
    work = torch.promote_types(logits.dtype, torch.float32)
    full = _enlarge(logits[:, 0].to(work), truth.shape[-2], truth.shape[-1])
    loss = normalized_focal_loss(full, truth, valid) + dice_loss(full, truth, valid)
    target = small.unsqueeze(1).expand_as(logits)
    inside = None if real is None else real.unsqueeze(1).expand_as(logits)
    seen = logits.detach() if inside is None else logits.detach().masked_fill(~inside, -1)  # padding is no object
    reached = iou_target(seen, target)
    loss = loss + iou_weight * (iou.to(work) - reached).square().mean(1)
    if logits.shape[1] > 1:
        guesses, target = logits[:, 1:].to(work), target[:, 1:]
        inside = None if inside is None else inside[:, 1:]
        each = normalized_focal_loss(guesses, target, inside) + dice_loss(guesses, target, inside)
        loss = loss + guess_weight * each.min(dim=1).values
    return loss, reached[:, 0]


def _enlarge(logits: Tensor, height: int, width: int) -> Tensor:
    """Bilinear (N, h, w) -> (N, height, width) as two matrix products, whose gradient needs no scattered additions."""
    rows, cols = (_interpolation(a, b, logits) for a, b in zip(logits.shape[-2:], (height, width)))
    with torch.autocast(logits.device.type, enabled=False):
        return rows @ logits @ cols.t()


def _interpolation(small: int, large: int, like: Tensor) -> Tensor:
    """(large, small)"""
    eye = torch.eye(small, device=like.device, dtype=like.dtype)
    return F.interpolate(eye.unsqueeze(0), large, mode="linear", align_corners=False)[0].t()


@cache
def compile_parts(decoder: bool) -> None:
    """Compile the encoder's parts, the loss and the clicks, and with ``decoder`` the mask decoder, for the rest of the process.

    Everything is specialised to its shapes but the number of prompt tokens; all blocks of a kind share one compilation.
    The decoder takes minutes to compile, so it pays in long runs only.
    """
    import torch._dynamo

    from hrsam import clicks
    from hrsam.models.block import Block, CycleScan
    from hrsam.models.decoder import MaskDecoder
    from hrsam.ops import window

    torch._dynamo.config.automatic_dynamic_shapes = False
    torch._dynamo.config.recompile_limit = 64
    Block.before, Block.after = torch.compile(Block.before), torch.compile(Block.after)
    CycleScan.before, CycleScan.after = torch.compile(CycleScan.before), torch.compile(CycleScan.after)
    window.attend_windows = torch.compile(window.attend_windows)
    clicks.squared_distance = torch.compile(clicks.squared_distance)
    globals()["_mask_loss"] = torch.compile(_mask_loss)
    if decoder:
        whole = torch.compile(MaskDecoder.forward)

        def decode(self, image, image_pe, sparse, dense, masks=(0,), real=None):
            torch._dynamo.mark_dynamic(sparse, 1)
            return whole(self, image, image_pe, sparse, dense, masks, real)

        MaskDecoder.forward = decode
