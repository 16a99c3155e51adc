"""Rounds of simulated clicks with a loss: what one training step computes.

A step encodes a batch of canvases, or a pack of pictures of different sizes, once and plays a few rounds with all their objects
together: predict, let the simulated user place the next click on the largest error, predict again with the earlier logits
fed back.  The loss of a round is normalized focal plus Dice at the picture's resolution; the first round also trains
SAM's three guesses (only the best one is pulled) and every round trains the predicted IoU.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrsam.clicks import Draws, random_clicks, simulate_clicks
from hrsam.config import Settings
from hrsam.losses import dice_loss, iou_target, normalized_focal_loss, weighted_sum
from hrsam.models.encoder import Encoder
from hrsam.models.model import HRSAM, Embedding, within

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
class _Game:
    """What stays the same in all rounds for N objects of pictures on maps of one size, (h, w) cells.

    ``truth`` (N, 16h, 16w) and ``small`` (N, 4h, 4w) bool, the object in pixels and in stride-4 cells; ``valid`` and ``real``:
    where these two are no padding, None for everywhere; ``draws``: chance of the N.
    """

    embedding: Embedding
    truth: Tensor
    small: Tensor
    valid: Tensor | None
    real: Tensor | None
    draws: Draws

    @classmethod
    def of(cls, embedding: Embedding, truth: Tensor, valid: Tensor | None, draws: Draws) -> _Game:
        small = F.max_pool2d(truth.unsqueeze(1).float(), STRIDE).squeeze(1) > 0
        inner = F.avg_pool2d(truth.unsqueeze(1).float(), STRIDE).squeeze(1) > 0.5
        small = torch.where(inner.flatten(1).any(1).view(-1, 1, 1), inner, small)
        real = None if valid is None else F.max_pool2d(valid.unsqueeze(1).float(), STRIDE).squeeze(1) > 0
        return cls(embedding, truth, small, valid, real, draws)


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
        positions = self.model.prompt_encoder.dense_positions((features.shape[2], features.shape[3]))
        draws = Draws((generator,), (len(truth),))
        losses, ious = self._play(_Game.of(Embedding(features, positions), truth, None, draws), course)
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
        Both are exact: the encoder sees all pictures as one packed sequence; the decoder takes them as one batch, padded to the
        largest grid; padding is neither read nor clicked nor counted, and what a picture draws does not depend on what is
        beside it.  So packs add up to the loss of the step, however it is cut.  The rounds never wait for the device.  Raises
        ``ValueError`` for lists of different lengths and truths that do not fit.
        """
        _check_pack(pictures, truths, weights, generators)
        encoder = self.model.encoder
        if not isinstance(encoder, Encoder):
            raise ValueError("SAM's encoder takes squares of one size only; train it on canvases")
        encoder.anchor_side = encoder.config.anchor_side
        whole = [_padded(p, -(-p.shape[1] // PATCH) * PATCH, -(-p.shape[2] // PATCH) * PATCH) for p in pictures]
        maps = encoder.forward_packed(whole, generators)
        losses, ious = self._play(self._side_by_side(maps, truths, generators), _Course.drawn(self.rounds, plan))
        counted = [weight for weight, truth in zip(weights, truths) for _ in truth]
        return weighted_sum(losses.mean(0), _there(counted, losses.dtype, losses.device)), ious.mean(1)

    def _side_by_side(
        self, maps: Sequence[Tensor], truths: Sequence[Tensor], generators: Sequence[torch.Generator]
    ) -> _Game:
        """All pictures of a pack in one game: ``maps`` (C, hi, wi), ``truths`` (Ki, Hi, Wi)."""
        counts, device = [len(truth) for truth in truths], truths[0].device
        grids = [(m.shape[1], m.shape[2]) for m in maps]
        rows, cols = (max(sides) for sides in zip(*grids))
        height, width = PATCH * rows, PATCH * cols
        features = torch.cat([_padded(m, rows, cols).expand(n, -1, -1, -1) for m, n in zip(maps, counts)])
        truth = torch.cat([_padded(t, height, width) for t in truths])
        sides = [(*grid, *t.shape[1:]) for grid, t in zip(grids, truths) for _ in t]
        table = _there(sides, torch.int64, device)
        codes = {grid: self.model.prompt_encoder.dense_positions(grid) for grid in dict.fromkeys(grids)}
        if len(codes) == 1:
            embedding = Embedding(features, codes[rows, cols])
        else:
            positions = [_padded(codes[grid], rows, cols).expand(n, -1, -1, -1) for grid, n in zip(grids, counts)]
            embedding = Embedding(features, torch.cat(positions), table[:, :2])
        whole = all(t.shape[1:] == (height, width) for t in truths)
        valid = None if whole else within(table[:, 2:], height, width)
        return _Game.of(embedding, truth, valid, Draws(generators, counts))

    def set_side(self, side: int) -> None:
        halve_anchor(self.model.encoder, side)

    def _play(self, game: _Game, course: _Course) -> tuple[Tensor, Tensor]:
        """Loss and IoU, (rounds with a loss, N)."""
        points, labels, box = self._start(game, course.start)
        previous: Tensor | None = None
        losses, ious = [], []
        for index, trained in enumerate(course.trained):
            masks = (0, 1, 2, 3) if index == 0 else (0,)
            with torch.set_grad_enabled(trained):
                out = self.model.decode(game.embedding, points, labels, box, previous, masks=masks)
                if trained:
                    loss, iou = _mask_loss(
                        out.logits, out.iou, game.truth, game.small, game.valid, game.real, game.embedding.grids,
                        self.rounds.guess_weight, self.rounds.iou_weight,
                    )  # fmt: skip
                    losses.append(loss)
                    ious.append(iou)
            previous = out.logits[:, :1].detach()
            if index + 1 < len(course.trained):
                new_points, new_labels = self._next(game, previous[:, 0] > 0, self.rounds.spread)
                points = torch.cat((points, new_points), dim=1)
                labels = torch.cat((labels, new_labels), dim=1)
        return torch.stack(losses), torch.stack(ious)

    def _start(self, game: _Game, start: str | int):
        """First prompt: one click, or several random ones at once, or a box."""
        small, draws = game.small, game.draws
        if start == "box":
            points = torch.zeros(len(small), 0, 2, device=small.device)
            labels = torch.zeros(len(small), 0, dtype=torch.int64, device=small.device)
            return points, labels, _loose_box(small, game.real, self.rounds.box_jitter, draws)
        if isinstance(start, int):
            points, positive = random_clicks(small, start, draws, real=game.real)
            return _model_pixels(points), positive.long(), None
        spread = torch.where(draws.uniform() < 0.5, 1.0, self.rounds.spread)
        points, labels = self._next(game, torch.zeros_like(small), spread)
        return points, labels, None

    def _next(self, game: _Game, mask: Tensor, spread: float | Tensor):
        with torch.no_grad():
            points, positive, _ = simulate_clicks(game.small, mask, game.draws, spread=spread, real=game.real)
        return _model_pixels(points).unsqueeze(1), positive.long().unsqueeze(1)


def halve_anchor(encoder: nn.Module, side: int) -> None:
    """In training on squares of ``side`` pixels the anchor map is half of them, as 512 is of 1024."""
    if isinstance(encoder, Encoder) and encoder.anchor_side is not None:
        encoder.anchor_side = side // 2


def _padded(maps: Tensor, rows: int, cols: int) -> Tensor:
    """(..., h, w) -> (..., rows, cols), with 0 at the bottom and right."""
    return F.pad(maps, (0, cols - maps.shape[-1], 0, rows - maps.shape[-2]))


def _there(values: Sequence[object], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers on a device, by a copy that nobody waits for."""
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


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


def _loose_box(small: Tensor, real: Tensor | None, jitter: float, draws: Draws) -> Tensor:
    """Boxes (B, 4) in canvas pixels around stride-4 objects (B, h, w), each side moved by a fraction of the box's size.

    ``real`` (B, h, w) bool: where the pictures are, None for everywhere; no box reaches beyond, and a picture without object
    has one around all of it.
    """
    first, last, ends = [], [], []
    for axis in (1, 2):
        hit = small.any(axis)  # (B, w), then (B, h)
        length = hit.shape[1]
        end = torch.full_like(hit[:, 0], length, dtype=torch.int64) if real is None else real.any(axis).sum(1)
        beyond = length - hit.int().flip(1).argmax(1)
        first.append(hit.int().argmax(1))
        last.append(torch.minimum(beyond, end))
        ends.append(end)
    box = torch.stack((*first, *last), dim=1).float() * STRIDE - 0.5
    size = box[:, 2:] - box[:, :2]
    limit = torch.stack(ends * 2, dim=1) * STRIDE - 1.0
    return (box + jitter * size.repeat(1, 2) * draws.normal(4)).clamp(min=0).minimum(limit)


def _mask_loss(
    logits: Tensor,
    iou: Tensor,
    truth: Tensor,
    small: Tensor,
    valid: Tensor | None,
    real: Tensor | None,
    grids: Tensor | None,
    guess_weight: float,
    iou_weight: float,
) -> tuple[Tensor, Tensor]:
    """Loss of one round and IoU of token 0, both (N,).

    ``logits`` (N, M, h, w), M = 1 or 4; ``iou`` (N, M) predicted; ``truth`` (N, 4h, 4w); ``small`` (N, h, w); ``valid`` and
    ``real``: where ``truth`` and ``small`` are no padding, None for everywhere; ``grids``: see :class:`Embedding`.
    """
    work = torch.promote_types(logits.dtype, torch.float32)
    cells = None if grids is None else grids * (PATCH // STRIDE)
    full = _enlarge(logits[:, 0].to(work), truth.shape[-2], truth.shape[-1], cells)
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


def _enlarge(logits: Tensor, height: int, width: int, cells: Tensor | None) -> Tensor:
    """Bilinear (N, h, w) -> (N, height, width) as two matrix products, whose gradient needs no scattered additions.

    ``cells`` (N, 2): rows and columns of each that are read, as if there were no others; None for all.
    """
    ends = (None, None) if cells is None else cells.unbind(1)
    rows, cols = (_interpolation(*lengths, logits) for lengths in zip(logits.shape[-2:], (height, width), ends))
    with torch.autocast(logits.device.type, enabled=False):
        return rows @ logits @ cols.mT


def _interpolation(small: int, large: int, end: Tensor | None, like: Tensor) -> Tensor:
    """(large, small), or (N, large, small) where only the first ``end`` (N,) cells are read."""
    cells = torch.arange(small, device=like.device, dtype=like.dtype)
    place = ((torch.arange(large, device=like.device, dtype=like.dtype) + 0.5) * (small / large) - 0.5).clamp(min=0)
    place = place.clamp(max=small - 1) if end is None else torch.minimum(place, (end - 1).to(place).unsqueeze(1))
    return (1 - (place.unsqueeze(-1) - cells).abs()).clamp(min=0)


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

        def decode(self, image, image_pe, sparse, dense, masks=(0,), real=None, inside=None):
            torch._dynamo.mark_dynamic(sparse, 1)
            return whole(self, image, image_pe, sparse, dense, masks, real, inside)

        MaskDecoder.forward = decode
