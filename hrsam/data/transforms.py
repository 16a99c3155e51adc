"""Training canvases made on the device: warp a photo, paste objects of others over it, recolour, choose two targets.

Everything is computed for the whole batch with few large operations; nothing waits for the device.  What a canvas does not
draw is computed all the same, but for what the settings leave out.  The order of the draws is part of a run's result.
Points are (x, y) in pixels, pixel i covering [i, i + 1], on photos and on canvases alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import AfterValidator, Field, PositiveFloat
from torch import Tensor

from hrsam.config import Settings
from hrsam.data.bank import PhotoBank
from hrsam.data.jpeg import LUMA, jpeg_artefacts, mix_colours
from hrsam.data.warp import Placement, constant, linear, times, warp

MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)

_PASTED = 2  # objects of other photos


def _ordered(values: tuple[float, float]) -> tuple[float, float]:
    if values[0] > values[1]:
        raise ValueError("give the smaller number first")
    return values


Chance = Annotated[float, Field(ge=0, le=1)]
Most = Annotated[float, Field(ge=0)]
Range = Annotated[tuple[float, float], AfterValidator(_ordered)]
Factor = Annotated[tuple[PositiveFloat, PositiveFloat], AfterValidator(_ordered)]


class CanvasSettings(Settings):
    """How canvases are made.  A chance or a strength of 0 leaves that step out.

    S is the side of the canvas in pixels, P that of the photo bank's squares.

    Place of the photo: ``whole_photo`` chance that it is fitted to the canvas, times a factor within
    ``whole_photo_scale``; otherwise S/P times a factor drawn log-uniformly within ``scale``, changed so that the
    object's long side lies within ``object_size`` · S, but at most ``max_scale`` · S/P.  ``aspect``: largest |log| of
    the change of width to height.  ``rotate``: chance of a turn by at most ``rotation`` radians.  ``object_place``:
    where the object's middle is put, as a fraction of S, before the photo is moved to avoid an empty margin.
    ``top_left``: chance that a photo smaller than the canvas lies in its corner.

    Pasted objects: ``copy_paste`` chance of one, ``paste_second`` of another one then; long side within
    ``paste_size`` · S; turned by at most ``paste_rotation``.

    Colour: ``colour`` chance of each of brightness (added, pixels in [0, 1]), contrast and saturation (factors), hue
    (largest turn about the grey axis in radians) and gamma (exponent); ``grey`` chance of no colour at all.
    ``blur``: chance of a loss of detail with a strength up to ``blur_strength`` (1: half resolution, 2: quarter).
    ``noise``: chance of Gaussian noise with a deviation up to ``noise_strength``; ``jpeg``: of compression with
    ``jpeg_quality``.

    Targets: ``target_weights`` of the object, another object of the photo, and the pasted ones; those that cover a part
    of the canvas within ``target_area`` take part.

    ``mosaic``: share of a batch's canvases that are four of half the side, next to one another, with targets in two of them.
    Small photos then are enlarged half as much, and objects are small beside others.
    """

    whole_photo: Chance = 0.35
    whole_photo_scale: Factor = (0.9, 1.1)
    scale: Factor = (0.8, 2.6)
    max_scale: float = 3.0
    object_size: Factor = (0.1, 1.6)
    object_place: Range = (0.15, 0.85)
    aspect: Most = 0.15
    mirror: Chance = 0.5
    rotate: Chance = 0.3
    rotation: Most = 0.25
    top_left: Chance = 0.5
    copy_paste: Chance = 0.5
    paste_second: Chance = 0.4
    paste_size: Factor = (0.12, 0.75)
    paste_rotation: Most = 0.5
    colour: Chance = 0.65
    brightness: Most = 0.12
    contrast: Factor = (0.65, 1.35)
    saturation: Range = (0.4, 1.6)
    hue: Most = 0.35
    gamma: Factor = (0.7, 1.35)
    grey: Chance = 0.06
    blur: Chance = 0.25
    blur_strength: float = Field(default=1.5, ge=0, le=2)
    noise: Chance = 0.3
    noise_strength: Most = 0.05
    jpeg: Chance = 0.3
    jpeg_quality: Factor = (30, 95)
    target_weights: tuple[float, float, float, float] = (1.0, 0.6, 0.6, 0.6)
    target_area: Range = (0.0015, 0.95)
    mosaic: Chance = 0.0


@dataclass(frozen=True, eq=False)
class Batch:
    """B canvases of side S.

    ``pixels`` (B, 3, S, S) float32 RGB, (value - MEAN) / STD of 0…255, exactly 0 where there is no photo; ``truth``
    (B, 2, S, S) bool, two targets a canvas, none empty, the same one twice when a canvas has only one; ``valid``
    (B, 1, S, S) bool, where there is a photo.
    """

    pixels: Tensor
    truth: Tensor
    valid: Tensor


class Dice:
    """Random numbers, one for each canvas, on the generator's device."""

    def __init__(self, generator: torch.Generator, batch: int):
        self.generator, self.batch = generator, batch

    def uniform(self, low: float = 0.0, high: float = 1.0, *shape: int) -> Tensor:
        values = torch.empty((self.batch, *shape), device=self.generator.device)
        return values.uniform_(low, high, generator=self.generator)

    def log_uniform(self, low: float, high: float) -> Tensor:
        return self.uniform(math.log(low), math.log(high)).exp()

    def chance(self, probability: float) -> Tensor:
        return self.uniform() < probability

    def sometimes(self, probability: float, value: Tensor, otherwise: float) -> Tensor:
        return torch.where(self.chance(probability), value, otherwise)

    def below(self, count: Tensor) -> Tensor:
        """Whole numbers in [0, count); 0 where ``count`` is 0."""
        return (self.uniform() * count).long().minimum((count - 1).clamp(min=0))


def make_batch(
    bank: PhotoBank,
    batch: int,
    side: int,
    generator: torch.Generator,
    settings: CanvasSettings | None = None,
    photos: Tensor | None = None,
) -> Batch:
    """Draw ``batch`` canvases of ``side`` pixels (a multiple of 8) on the bank's device.

    ``photos`` (batch,) int64: whose canvases they are; None: drawn, so that a photo may come twice.  Quarters of a mosaic
    take them in turn.
    All random numbers come from ``generator``, which must live on that device: equal states give equal batches.
    A canvas shows a photo with one of its masks; up to two objects of other photos lie over it and cut the masks below.
    Masks are smoothed over 3 × 3 photo pixels, resized bilinearly and cut at one half.
    """
    settings = settings or CanvasSettings()
    mosaics = round(settings.mosaic * batch)
    unit = 16 if mosaics else 8
    if batch < 1 or side < unit or side % unit:
        raise ValueError(f"got batch={batch}, side={side}; give at least 1 and a positive multiple of {unit}")
    if generator.device.type != bank.device.type:
        raise ValueError(f"the generator is on {generator.device}, the photos on {bank.device}; give both one device")
    with torch.autocast(bank.device.type, enabled=False):  # pixels stay float32 in a training that is not
        parts = []
        if mosaics < batch:
            own = None if photos is None else photos[: batch - mosaics]
            parts.append(_compose(bank, batch - mosaics, side, Dice(generator, batch - mosaics), settings, own))
        if mosaics:
            own = None if photos is None else photos.roll(mosaics).repeat(4)[: 4 * mosaics]
            parts.append(_mosaic(bank, mosaics, side, generator, settings, own))
        if len(parts) == 1:
            return parts[0]
        return Batch(*(torch.cat([getattr(part, name) for part in parts]) for name in ("pixels", "truth", "valid")))


def _mosaic(
    bank: PhotoBank,
    batch: int,
    side: int,
    generator: torch.Generator,
    settings: CanvasSettings,
    photos: Tensor | None,
) -> Batch:
    """Canvases of four quarters each; ``photos`` (4 · batch,)."""
    smallest, largest = settings.target_area
    limits = {"target_area": (min(4 * smallest, largest), largest)}  # as much of a canvas as of one photo's
    quarters = _compose(
        bank, 4 * batch, side // 2, Dice(generator, 4 * batch), settings.model_copy(update=limits), photos
    )
    dice = Dice(generator, batch)
    places = torch.arange(4, device=bank.device)
    first = dice.below(torch.full((batch,), 4, device=bank.device))
    second = (first + 1 + dice.below(torch.full((batch,), 3, device=bank.device))) % 4
    chosen = torch.stack((first, second), 1).unsqueeze(1) == places.view(4, 1)  # (batch, 4, 2)
    return Batch(
        _joined(quarters.pixels),
        _joined(quarters.truth[:, :1] & chosen.view(-1, 2, 1, 1)),
        _joined(quarters.valid),
    )


def _joined(quarters: Tensor) -> Tensor:
    """(4B, C, h, w) -> (B, C, 2h, 2w), row by row."""
    return quarters.unflatten(0, (-1, 2, 2)).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def _compose(
    bank: PhotoBank, batch: int, side: int, dice: Dice, settings: CanvasSettings, photos: Tensor | None
) -> Batch:
    every = torch.full((batch,), len(bank), device=bank.device)
    photo = dice.below(every) if photos is None else photos.to(bank.device)
    count = bank.count[photo]
    chosen = dice.below(count)
    mask = bank.first[photo] + chosen
    other = bank.first[photo] + (chosen + 1 + dice.below(count - 1)) % count

    placement = _place_photo(bank, photo, mask, side, dice, settings)
    present, draws = [dice.chance(settings.copy_paste)], []
    for _ in range(_PASTED):
        foreign = (photo + 1 + dice.below(every - 1)) % every
        pasted = bank.first[foreign] + dice.below(bank.count[foreign])
        draws.append((present[-1], foreign, pasted, *_draw_object(dice, settings), *_draw_colour(dice, settings)))
        present.append(present[-1] & dice.chance(settings.paste_second))
    recoloured = colour_change(bank.colours[photo], dice, settings)
    gamma = dice.sometimes(settings.colour, dice.uniform(*settings.gamma), 1.0)

    colours, soft, valid = warp(bank, photo, torch.stack((mask, other), 1), placement, side)
    visible = torch.zeros(batch, 2 + _PASTED, side, side, dtype=torch.bool, device=bank.device)
    torch.logical_and(soft > 0.5, valid, out=visible[:, :2])
    visible[:, 1] &= (count > 1).view(-1, 1, 1)
    if settings.copy_paste > 0:
        low, high = placement.bounds(bank.sizes[photo])
        objects = _pasted(bank, draws, (low.clamp(min=0), high.clamp(max=side)), side, settings)
        for number, (paint, alpha) in enumerate(objects, start=2):
            alpha *= valid
            colours = torch.lerp(colours, paint, alpha)
            torch.gt(alpha[:, 0], 0.5, out=visible[:, number])
            visible[:, :number] &= ~visible[:, number : number + 1]

    colours = mix_colours(colours, *recoloured).clamp_(0, 1).pow_(gamma.view(-1, 1, 1, 1))
    colours = _degrade(colours, dice, settings)
    mean, std = (constant(values, bank.device).view(3, 1, 1) / 255 for values in (MEAN, STD))
    pixels = torch.where(valid, torch.addcmul(-mean / std, colours, 1 / std), 0.0)
    return Batch(pixels, _choose_targets(visible, valid, dice, settings), valid)


def _pasted(
    bank: PhotoBank, draws: list[tuple[Tensor, ...]], room: tuple[Tensor, Tensor], side: int, settings: CanvasSettings
) -> list[tuple[Tensor, Tensor]]:
    """Colours (B, 3, S, S), and how far they cover what is below (B, 1, S, S), for each of the ``draws``; all in one go."""
    present, foreign, pasted, size, angle, mirror, place, *change = map(torch.cat, zip(*draws))
    room = room[0].repeat(len(draws), 1), room[1].repeat(len(draws), 1)
    placement = _place_object(bank, pasted, room, side, size, angle, mirror, place, settings)
    paint, soft, inside = warp(bank, foreign, pasted.unsqueeze(1), placement, side)
    paint = mix_colours(paint, *_colour_matrix(bank.colours[foreign], *change))
    sharpen = placement.scale.clamp(min=1) * present  # an edge one canvas pixel wide, however enlarged
    sharpen, middle = sharpen.view(-1, 1, 1, 1), (present / 2 - sharpen / 2).view(-1, 1, 1, 1)
    alpha = torch.addcmul(middle, soft, sharpen).clamp_(0, 1).mul_(inside)
    return list(zip(paint.chunk(len(draws)), alpha.chunk(len(draws))))


def _place_photo(
    bank: PhotoBank, photo: Tensor, mask: Tensor, side: int, dice: Dice, settings: CanvasSettings
) -> Placement:
    sizes, unit = bank.sizes[photo], side / bank.side
    length = _long_side(bank.boxes[mask])
    fitted = side / sizes.amax(1) * dice.uniform(*settings.whole_photo_scale)
    zoomed = dice.log_uniform(*settings.scale) * unit
    smallest, largest = (share * side / length for share in settings.object_size)
    zoomed = zoomed.clamp(smallest, largest).clamp(max=settings.max_scale * unit)
    scale = torch.where(dice.chance(settings.whole_photo), fitted, zoomed)
    angle = dice.sometimes(settings.rotate, dice.uniform(-settings.rotation, settings.rotation), 0.0)
    aspect = dice.uniform(-settings.aspect, settings.aspect) / 2
    matrix = linear(scale * aspect.exp(), scale * (-aspect).exp(), dice.chance(settings.mirror), angle)
    target = dice.uniform(*settings.object_place, 2) * side
    placement = Placement(matrix, bank.anchors[mask], target)
    low, high = placement.bounds(sizes)
    cover = (-low).clamp(max=0) + (side - high).clamp(min=0)
    keep_inside = (-low).clamp(min=0) + (side - high).clamp(max=0)
    keep_inside = torch.where(dice.chance(settings.top_left).unsqueeze(1), -low, keep_inside)
    shift = torch.where(high - low < side, keep_inside, cover)
    return Placement(matrix, placement.source, target + shift)


def _draw_object(dice: Dice, settings: CanvasSettings) -> tuple[Tensor, ...]:
    """Long side as a fraction of S, turn, mirrored or not, and place in the room (B, 2) of a pasted object."""
    size = dice.log_uniform(*settings.paste_size)
    angle = dice.uniform(-settings.paste_rotation, settings.paste_rotation)
    return size, angle, dice.chance(settings.mirror), dice.uniform(0.1, 0.9, 2)


def _place_object(
    bank: PhotoBank,
    mask: Tensor,
    room: tuple[Tensor, Tensor],
    side: int,
    size: Tensor,
    angle: Tensor,
    mirror: Tensor,
    place: Tensor,
    settings: CanvasSettings,
) -> Placement:
    """The middle of the object's box anywhere in the inner 80 % of ``room``, the photo's bounds on the canvas."""
    box = bank.boxes[mask]
    scale = (size * side / _long_side(box)).clamp(max=settings.max_scale * side / bank.side)
    return Placement(linear(scale, scale, mirror, angle), (box[:, :2] + box[:, 2:]) / 2, torch.lerp(*room, place))


def _long_side(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).amax(1)


def colour_change(mean: Tensor, dice: Dice, settings: CanvasSettings) -> tuple[Tensor, Tensor]:
    """Hue, saturation, contrast about ``mean`` (B, 3) and brightness as one matrix (B, 3, 3) and offset (B, 3)."""
    return _colour_matrix(mean, *_draw_colour(dice, settings))


def _draw_colour(dice: Dice, settings: CanvasSettings) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hue, saturation, contrast and brightness, each (B,)."""
    often = settings.colour
    hue = dice.sometimes(often, dice.uniform(-settings.hue, settings.hue), 0.0)
    saturation = dice.sometimes(often, dice.uniform(*settings.saturation), 1.0)
    saturation = torch.where(dice.chance(settings.grey), 0.0, saturation)
    contrast = dice.sometimes(often, dice.uniform(*settings.contrast), 1.0)
    brightness = dice.sometimes(often, dice.uniform(-settings.brightness, settings.brightness), 0.0)
    return hue, saturation, contrast, brightness


def _colour_matrix(
    mean: Tensor, hue: Tensor, saturation: Tensor, contrast: Tensor, brightness: Tensor
) -> tuple[Tensor, Tensor]:
    hue, saturation, contrast = (x.view(-1, 1, 1) for x in (hue, saturation, contrast))
    one, around_grey = (constant(values, mean.device).view(3, 3) for values in (_ONE, _AROUND_GREY))
    cos = hue.cos()
    turn = cos * one + (1 - cos) / 3 + hue.sin() * around_grey
    luma = constant(LUMA, mean.device)
    turned_luma = (luma.view(1, 3, 1) * turn).sum(1, keepdim=True)
    matrix = torch.lerp(turned_luma, turn, saturation)
    offset = (1 - contrast.squeeze(2)) * times(matrix, mean) + brightness.unsqueeze(1)
    return contrast * matrix, offset


_ONE = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
_AROUND_GREY = tuple(turn / math.sqrt(3) for turn in (0, 1, -1, -1, 0, 1, 1, -1, 0))


def _degrade(colours: Tensor, dice: Dice, settings: CanvasSettings) -> Tensor:
    """Blur, noise and compression of pixels in [0, 1]."""
    strength = dice.sometimes(settings.blur, dice.uniform(0.0, settings.blur_strength), 0.0).view(-1, 1, 1, 1)
    if settings.blur > 0:
        pooled = F.avg_pool2d(colours, 2)
        half = F.interpolate(pooled, scale_factor=2, mode="bilinear", align_corners=False)
        quarter = F.interpolate(F.avg_pool2d(pooled, 2), scale_factor=4, mode="bilinear", align_corners=False)
        colours = torch.lerp(colours, half, strength.clamp(max=1))
        colours = torch.lerp(colours, quarter, (strength - 1).clamp(min=0))
    deviation = dice.sometimes(settings.noise, dice.uniform(0.0, settings.noise_strength), 0.0).view(-1, 1, 1, 1)
    noise = torch.randn(colours.shape, device=colours.device, generator=dice.generator)
    if settings.noise > 0:
        colours = torch.addcmul(colours, deviation, noise).clamp_(0, 1)
    quality, often = dice.uniform(*settings.jpeg_quality), dice.chance(settings.jpeg)
    if settings.jpeg == 0:
        return colours
    return torch.where(often.view(-1, 1, 1, 1), jpeg_artefacts(colours, quality), colours)


def _choose_targets(visible: Tensor, valid: Tensor, dice: Dice, settings: CanvasSettings) -> Tensor:
    """Two of the ``visible`` masks (B, 4, S, S), drawn by weight without repetition.

    Where one mask fits the area limits it is taken twice, where none does the largest, and where nothing at all is
    visible (an object thinner than a canvas pixel) the photo itself.
    """
    area = visible.flatten(2).sum(2) / visible[0, 0].numel()
    smallest, largest = settings.target_area
    fits = (area >= smallest) & (area <= largest) & (area > 0)
    gumbel = -(-dice.uniform(0.0, 1.0, visible.shape[1]).log()).log()
    key = constant(settings.target_weights, visible.device).log() + gumbel
    key, order = torch.where(fits, key, -math.inf).topk(2, dim=1)
    found = key > -math.inf
    first = torch.where(found[:, 0], order[:, 0], area.argmax(1))
    second = torch.where(found[:, 1], order[:, 1], first)
    index = torch.stack((first, second), 1).view(-1, 2, 1, 1).expand(-1, -1, *visible.shape[2:])
    truth = visible.gather(1, index)
    return torch.where(truth.flatten(2).any(2).view(-1, 2, 1, 1), truth, valid)
