"""Rounds of simulated clicks with a loss: what one training step computes.

A step encodes a batch of canvases once and plays a few rounds with two objects of each: predict, let the simulated user place
the next click on the largest error, predict again with the earlier logits fed back.  The loss of a round is normalized focal
plus Dice at the canvas' resolution; the first round also trains SAM's three guesses (only the best one is pulled) and every
round trains the predicted IoU.
"""

from __future__ import annotations

import random
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrsam.clicks import random_clicks, simulate_clicks
from hrsam.config import Settings
from hrsam.losses import dice_loss, iou_target, normalized_focal_loss
from hrsam.models.encoder import Encoder
from hrsam.models.model import HRSAM, Embedding

STRIDE = 4  # mask logits, and the clicks of the simulated user in training, live at a quarter of the canvas


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


class ClickRollout(nn.Module):
    """Encode once, then rounds of prediction and simulated clicks; returns the loss and what to log."""

    def __init__(self, model: HRSAM, rounds: Rounds):
        super().__init__()
        self.model = model
        self.rounds = rounds

    def forward(self, pixels: Tensor, truth: Tensor, generator: torch.Generator, plan: random.Random):
        """``pixels`` (B, 3, S, S) normalised, ``truth`` (B, K, S, S) bool.  ``plan`` draws the course of the rounds."""
        objects, rounds = truth.shape[1], self.rounds
        self.set_side(pixels.shape[-1])
        features = self.model.encoder(pixels).repeat_interleave(objects, dim=0)
        embedding = Embedding(features, self.model.prompt_encoder.dense_positions(tuple(features.shape[-2:])))
        truth = truth.flatten(0, 1)
        small = F.max_pool2d(truth.unsqueeze(1).float(), STRIDE).squeeze(1) > 0
        inner = F.avg_pool2d(truth.unsqueeze(1).float(), STRIDE).squeeze(1) > 0.5
        small = torch.where(inner.flatten(1).any(1).view(-1, 1, 1), inner, small)

        points, labels, box = self._start(small, generator, plan)
        silent = 0
        while silent < rounds.most_silent and plan.random() < rounds.another:
            silent += 1
        course = [True] * rounds.trained + [False] * silent + [True]
        previous: Tensor | None = None
        losses, ious = [], []
        for index, trained in enumerate(course):
            first = index == 0
            with torch.set_grad_enabled(trained):
                out = self.model.decode(embedding, points, labels, box, previous, masks=(0, 1, 2, 3) if first else (0,))
                if trained:
                    loss, iou = _mask_loss(out.logits, out.iou, truth, small, rounds.guess_weight, rounds.iou_weight)
                    losses.append(loss)
                    ious.append(iou)
            previous = out.logits[:, :1].detach()
            if index + 1 < len(course):
                new_points, new_labels = self._next(small, previous[:, 0] > 0, generator, rounds.spread)
                points = torch.cat((points, new_points), dim=1)
                labels = torch.cat((labels, new_labels), dim=1)
        return torch.stack(losses).mean(), torch.stack(ious)

    def set_side(self, side: int) -> None:
        """In training the anchor map is half the canvas, as 512 is of 1024."""
        encoder = self.model.encoder
        if isinstance(encoder, Encoder) and encoder.anchor_side is not None:
            encoder.anchor_side = side // 2

    def _start(self, small: Tensor, generator: torch.Generator, plan: random.Random):
        """First prompt: one click, or several random ones at once, or a box."""
        rounds = self.rounds
        kind = plan.random()
        batch = small.shape[0]
        if kind < rounds.start_box:
            points = torch.zeros(batch, 0, 2, device=small.device)
            labels = torch.zeros(batch, 0, dtype=torch.int64, device=small.device)
            return points, labels, _loose_box(small, rounds.box_jitter, generator)
        if kind < rounds.start_box + rounds.start_random:
            points, positive = random_clicks(small, plan.randint(1, rounds.most_random), generator)
            return _model_pixels(points), positive.long(), None
        spread = torch.where(torch.rand(batch, device=small.device, generator=generator) < 0.5, 1.0, rounds.spread)
        points, labels = self._next(small, torch.zeros_like(small), generator, spread)
        return points, labels, None

    def _next(self, truth: Tensor, mask: Tensor, generator: torch.Generator, spread: float | Tensor):
        with torch.no_grad():
            points, positive, _ = simulate_clicks(truth, mask, generator, spread=spread)
        return _model_pixels(points).unsqueeze(1), positive.long().unsqueeze(1)


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


def _mask_loss(logits: Tensor, iou: Tensor, truth: Tensor, small: Tensor, guess_weight: float, iou_weight: float):
    """Loss of one round and mean IoU of token 0.

    ``logits`` (B, M, s, s), M = 1 or 4; ``iou`` (B, M) predicted; ``truth`` (B, S, S); ``small`` (B, s, s).
    """
    full = _enlarge(logits[:, 0].float(), truth.shape[-1])
    loss = (normalized_focal_loss(full, truth) + dice_loss(full, truth)).mean()
    reached = iou_target(logits.detach(), small.unsqueeze(1).expand_as(logits))
    loss = loss + iou_weight * (iou.float() - reached).square().mean()
    if logits.shape[1] > 1:
        guesses = logits[:, 1:].float()
        target = small.unsqueeze(1).expand_as(guesses)
        each = normalized_focal_loss(guesses, target) + dice_loss(guesses, target)
        loss = loss + guess_weight * each.min(dim=1).values.mean()
    return loss, reached[:, 0].mean()


def _enlarge(logits: Tensor, side: int) -> Tensor:
    """Bilinear (B, s, s) -> (B, side, side) as two matrix products, whose gradient needs no scattered additions."""
    eye = torch.eye(logits.shape[-1], device=logits.device, dtype=logits.dtype)
    matrix = F.interpolate(eye.unsqueeze(0), side, mode="linear", align_corners=False)[0].t()  # (side, s)
    with torch.autocast(logits.device.type, enabled=False):
        return matrix @ logits @ matrix.t()


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
