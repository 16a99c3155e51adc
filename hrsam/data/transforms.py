"""Training canvases made on the device: warp a photo, paste objects of others over it, recolour, choose two targets.

Everything is computed for the whole batch with few large operations; nothing waits for the device.  Points are (x, y)
in pixels, pixel i covering [i, i + 1], on photos and on canvases alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import AfterValidator, Field, PositiveFloat
from torch import Tensor

from hrsam.config import Settings
from hrsam.data.bank import PhotoBank
from hrsam.data.jpeg import LUMA, jpeg_artefacts, mix_colours

MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)

_LEVELS = 4  # a photo at full, half, quarter and eighth size
_SMOOTHING = 0.7  # of masks; without it enlarged outlines are stairs, at 0.75 lines one photo pixel wide vanish


def _ordered(values: tuple[float, float]) -> tuple[float, float]:
    if values[0] > values[1]:
        raise ValueError("give the smaller number first")
    return values


Chance = Annotated[float, Field(ge=0, le=1)]
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
    """

    whole_photo: Chance = 0.35
    whole_photo_scale: Factor = (0.9, 1.1)
    scale: Factor = (0.8, 2.6)
    max_scale: float = 3.0
    object_size: Factor = (0.1, 1.6)
    object_place: Range = (0.15, 0.85)
    aspect: float = 0.15
    mirror: Chance = 0.5
    rotate: Chance = 0.3
    rotation: float = 0.25
    top_left: Chance = 0.5
    copy_paste: Chance = 0.5
    paste_second: Chance = 0.4
    paste_size: Factor = (0.12, 0.75)
    paste_rotation: float = 0.5
    colour: Chance = 0.65
    brightness: float = 0.12
    contrast: Factor = (0.65, 1.35)
    saturation: Range = (0.4, 1.6)
    hue: float = 0.35
    gamma: Factor = (0.7, 1.35)
    grey: Chance = 0.06
    blur: Chance = 0.25
    blur_strength: float = Field(default=1.5, ge=0, le=2)
    noise: Chance = 0.3
    noise_strength: float = 0.05
    jpeg: Chance = 0.3
    jpeg_quality: Factor = (30, 95)
    target_weights: tuple[float, float, float, float] = (1.0, 0.6, 0.6, 0.6)
    target_area: Range = (0.0015, 0.95)


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
        values = torch.rand((self.batch, *shape), device=self.generator.device, generator=self.generator)
        return values * (high - low) + low

    def log_uniform(self, low: float, high: float) -> Tensor:
        return self.uniform(math.log(low), math.log(high)).exp()

    def chance(self, probability: float) -> Tensor:
        return self.uniform() < probability

    def sometimes(self, probability: float, value: Tensor, otherwise: float) -> Tensor:
        return torch.where(self.chance(probability), value, otherwise)

    def below(self, count: Tensor) -> Tensor:
        """Whole numbers in [0, count); 0 where ``count`` is 0."""
        return (self.uniform() * count).long().minimum((count - 1).clamp(min=0))


@dataclass(frozen=True, eq=False)
class _Placement:
    """canvas = ``matrix`` (B, 2, 2) · (photo - ``source``) + ``target``, both (B, 2)."""

    matrix: Tensor
    source: Tensor
    target: Tensor

    @property
    def scale(self) -> Tensor:
        m = self.matrix
        return (m[:, 0, 0] * m[:, 1, 1] - m[:, 0, 1] * m[:, 1, 0]).abs().sqrt()

    def bounds(self, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest canvas coordinates (B, 2) of photos with ``sizes`` (B, 2)."""
        middle = _times(self.matrix, sizes / 2 - self.source) + self.target
        half = _times(self.matrix.abs(), sizes / 2)
        return middle - half, middle + half

    def photo_points(self, side: int) -> tuple[Tensor, Tensor]:
        """Photo x and y, each (B, S, S), under every canvas pixel's centre."""
        a, b, c, d = self.matrix.view(-1, 4, 1, 1).unbind(1)
        centres = torch.arange(side, device=self.matrix.device) + 0.5
        x = (centres - self.target[:, :1]).unsqueeze(1)
        y = (centres - self.target[:, 1:]).unsqueeze(2)
        determinant = a * d - b * c
        u = (d * x - b * y) / determinant + self.source[:, 0].view(-1, 1, 1)
        v = (a * y - c * x) / determinant + self.source[:, 1].view(-1, 1, 1)
        return u, v


def make_batch(
    bank: PhotoBank,
    batch: int,
    side: int,
    generator: torch.Generator,
    settings: CanvasSettings | None = None,
    photos: Tensor | None = None,
) -> Batch:
    """Draw ``batch`` canvases of ``side`` pixels (a multiple of 8) on the bank's device.

    ``photos`` (batch,) int64: whose canvases they are; None: drawn, so that a photo may come twice.
    All random numbers come from ``generator``, which must live on that device: equal states give equal batches.
    A canvas shows a photo with one of its masks; up to two objects of other photos lie over it and cut the masks below.
    Masks are smoothed over 3 × 3 photo pixels, resized bilinearly and cut at one half.
    """
    settings = settings or CanvasSettings()
    if batch < 1 or side < 8 or side % 8:
        raise ValueError(f"got batch={batch}, side={side}; give at least 1 and a positive multiple of 8")
    if generator.device.type != bank.device.type:
        raise ValueError(f"the generator is on {generator.device}, the photos on {bank.device}; give both one device")
    with torch.autocast(bank.device.type, enabled=False):  # pixels stay float32 in a training that is not
        return _compose(bank, batch, side, Dice(generator, batch), settings, photos)


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
    colours, soft, valid = _warp(bank, photo, torch.stack((mask, other), 1), placement, side)
    visible = list(((soft > 0.5) & valid).unbind(1))
    visible[1] = visible[1] & (count > 1).view(-1, 1, 1)
    low, high = placement.bounds(bank.sizes[photo])
    room = low.clamp(min=0), high.clamp(max=side)

    present = dice.chance(settings.copy_paste)
    for _ in range(2):
        foreign = (photo + 1 + dice.below(every - 1)) % every
        pasted = bank.first[foreign] + dice.below(bank.count[foreign])
        placement = _place_object(bank, pasted, room, side, dice, settings)
        paint, soft, inside = _warp(bank, foreign, pasted.unsqueeze(1), placement, side)
        paint = mix_colours(paint, *colour_change(bank.colours[foreign], dice, settings))
        sharpen = placement.scale.clamp(min=1).view(-1, 1, 1, 1)  # an edge one canvas pixel wide, however enlarged
        alpha = ((soft - 0.5) * sharpen + 0.5).clamp(0, 1) * (inside & valid & present.view(-1, 1, 1, 1))
        colours = torch.lerp(colours, paint, alpha)
        above = alpha[:, 0] > 0.5
        visible = [below & ~above for below in visible] + [above]
        present = present & dice.chance(settings.paste_second)

    colours = mix_colours(colours, *colour_change(bank.colours[photo], dice, settings)).clamp(0, 1)
    gamma = dice.sometimes(settings.colour, dice.uniform(*settings.gamma), 1.0)
    colours = _degrade(colours.pow(gamma.view(-1, 1, 1, 1)), dice, settings)
    mean, std = (_constant(values, bank.device).view(3, 1, 1) / 255 for values in (MEAN, STD))
    pixels = torch.where(valid, (colours - mean) / std, 0.0)
    return Batch(pixels, _choose_targets(torch.stack(visible, 1), valid, dice, settings), valid)


def _place_photo(
    bank: PhotoBank, photo: Tensor, mask: Tensor, side: int, dice: Dice, settings: CanvasSettings
) -> _Placement:
    sizes, unit = bank.sizes[photo], side / bank.side
    length = _long_side(bank.boxes[mask])
    fitted = side / sizes.amax(1) * dice.uniform(*settings.whole_photo_scale)
    zoomed = dice.log_uniform(*settings.scale) * unit
    smallest, largest = (share * side / length for share in settings.object_size)
    zoomed = zoomed.clamp(smallest, largest).clamp(max=settings.max_scale * unit)
    scale = torch.where(dice.chance(settings.whole_photo), fitted, zoomed)
    angle = dice.sometimes(settings.rotate, dice.uniform(-settings.rotation, settings.rotation), 0.0)
    matrix = _linear(scale, dice.uniform(-settings.aspect, settings.aspect), dice.chance(settings.mirror), angle)
    target = dice.uniform(*settings.object_place, 2) * side
    placement = _Placement(matrix, bank.anchors[mask], target)
    low, high = placement.bounds(sizes)
    cover = (-low).clamp(max=0) + (side - high).clamp(min=0)
    keep_inside = (-low).clamp(min=0) + (side - high).clamp(max=0)
    keep_inside = torch.where(dice.chance(settings.top_left).unsqueeze(1), -low, keep_inside)
    shift = torch.where(high - low < side, keep_inside, cover)
    return _Placement(matrix, placement.source, target + shift)


def _place_object(
    bank: PhotoBank, mask: Tensor, room: tuple[Tensor, Tensor], side: int, dice: Dice, settings: CanvasSettings
) -> _Placement:
    """The middle of the object's box anywhere in the inner 80 % of ``room``, the photo's bounds on the canvas."""
    box = bank.boxes[mask]
    scale = dice.log_uniform(*settings.paste_size) * side / _long_side(box)
    scale = scale.clamp(max=settings.max_scale * side / bank.side)
    angle = dice.uniform(-settings.paste_rotation, settings.paste_rotation)
    matrix = _linear(scale, torch.zeros_like(scale), dice.chance(settings.mirror), angle)
    target = torch.lerp(*room, dice.uniform(0.1, 0.9, 2))
    return _Placement(matrix, (box[:, :2] + box[:, 2:]) / 2, target)


def _linear(scale: Tensor, aspect: Tensor, mirror: Tensor, angle: Tensor) -> Tensor:
    """(B, 2, 2): scale x and y, mirror x, then turn."""
    across = scale * (aspect / 2).exp() * torch.where(mirror, -1.0, 1.0)
    down = scale * (-aspect / 2).exp()
    cos, sin = angle.cos(), angle.sin()
    return torch.stack((cos * across, -sin * down, sin * across, cos * down), 1).view(-1, 2, 2)


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    """Matrix times vector for each canvas, outside of matmul, where TF32 would move points by half a pixel."""
    return (matrix * vector.unsqueeze(1)).sum(2)


def _long_side(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).amax(1)


def _warp(bank: PhotoBank, photo: Tensor, masks: Tensor, placement: _Placement, side: int):
    """Photos and their ``masks`` (B, M) seen through ``placement``.

    Returns colours (B, 3, S, S) in [0, 1], which repeat the photo's edge beyond it, masks (B, M, S, S) in [0, 1], and
    where the photo is, (B, 1, S, S) bool.  A photo that shrinks is read from an averaged copy of the size that is
    nearest above, so at most 1.6 photo pixels are skipped.
    """
    level = (0.3 - placement.scale.log2()).floor().clamp(0, _LEVELS - 1)
    shrink = torch.exp2(-level).view(-1, 1, 1)
    sheet = _sheet(bank.photos[photo], bank.masks[masks])
    height, width = sheet.shape[-2:]
    left = torch.where(level > 0, float(height), 0.0).view(-1, 1, 1)
    top = torch.where(level.view(-1, 1, 1) > 0, height * (1 - 2 * shrink), 0.0)
    inside, axes = torch.ones((), dtype=torch.bool, device=bank.device), []
    for axis, (points, start, length) in enumerate(zip(placement.photo_points(side), (left, top), (width, height))):
        extent = bank.sizes[photo, axis].view(-1, 1, 1)
        inside = inside & (points >= 0) & (points <= extent)
        on_sheet = (points * shrink).minimum(extent * shrink - 0.5).clamp(min=0.5) + start
        axes.append(on_sheet * (2 / length) - 1)
    grid = torch.stack(axes, dim=3)
    seen = F.grid_sample(sheet, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return seen[:, :3], seen[:, 3:], inside.unsqueeze(1)


def _sheet(photos: Tensor, masks: Tensor) -> Tensor:
    """uint8 (B, 3, P, P) and (B, M, P, P) → float32 (B, 3 + M, P, 3P/2) in [0, 1] with smaller copies to read from.

    Right of the full size stands the half, below that the quarter, then the eighth.  Masks are smoothed.
    """
    batch, side = photos.shape[0], photos.shape[-1]
    shape = (batch, 3 + masks.shape[1], side, side + side // 2)
    sheet = torch.zeros(shape, device=photos.device)  # not empty: a neighbour that is NaN counts even with weight 0
    full = sheet[..., :side]
    torch.div(photos, 255, out=full[:, :3])
    smooth = masks / 255
    smooth = torch.lerp(smooth, F.avg_pool2d(smooth, 3, stride=1, padding=1, count_include_pad=False), _SMOOTHING)
    full[:, 3:] = smooth
    top = 0
    for level in range(1, _LEVELS):
        full, part = F.avg_pool2d(full, 2), side >> level
        sheet[..., top : top + part, side : side + part] = full
        top += part
    return sheet


def colour_change(mean: Tensor, dice: Dice, settings: CanvasSettings) -> tuple[Tensor, Tensor]:
    """Hue, saturation, contrast about ``mean`` (B, 3) and brightness as one matrix (B, 3, 3) and offset (B, 3)."""
    often = settings.colour
    hue = dice.sometimes(often, dice.uniform(-settings.hue, settings.hue), 0.0).view(-1, 1, 1)
    saturation = dice.sometimes(often, dice.uniform(*settings.saturation), 1.0)
    saturation = torch.where(dice.chance(settings.grey), 0.0, saturation).view(-1, 1, 1)
    contrast = dice.sometimes(often, dice.uniform(*settings.contrast), 1.0).view(-1, 1, 1)
    brightness = dice.sometimes(often, dice.uniform(-settings.brightness, settings.brightness), 0.0)
    one = torch.eye(3, device=mean.device)
    third = torch.full((3, 3), 1 / 3, device=mean.device)
    around_grey = (one.roll(-1, 0) - one.roll(1, 0)) / math.sqrt(3)
    turn = hue.cos() * one + (1 - hue.cos()) * third + hue.sin() * around_grey
    luma = _constant(LUMA, mean.device)
    turned_luma = (luma.view(1, 3, 1) * turn).sum(1, keepdim=True)
    matrix = saturation * turn + (1 - saturation) * turned_luma
    offset = (1 - contrast.squeeze(2)) * _times(matrix, mean) + brightness.unsqueeze(1)
    return contrast * matrix, offset


def _degrade(colours: Tensor, dice: Dice, settings: CanvasSettings) -> Tensor:
    """Blur, noise and compression of pixels in [0, 1]."""
    strength = dice.sometimes(settings.blur, dice.uniform(0.0, settings.blur_strength), 0.0).view(-1, 1, 1, 1)
    half, quarter = (
        F.interpolate(F.avg_pool2d(colours, step), scale_factor=step, mode="bilinear", align_corners=False)
        for step in (2, 4)
    )
    colours = torch.lerp(colours, half, strength.clamp(max=1))
    colours = torch.lerp(colours, quarter, (strength - 1).clamp(min=0))
    deviation = dice.sometimes(settings.noise, dice.uniform(0.0, settings.noise_strength), 0.0).view(-1, 1, 1, 1)
    noise = torch.randn(colours.shape, device=colours.device, generator=dice.generator)
    colours = (colours + deviation * noise).clamp(0, 1)
    compressed = jpeg_artefacts(colours, dice.uniform(*settings.jpeg_quality))
    return torch.where(dice.chance(settings.jpeg).view(-1, 1, 1, 1), compressed, colours)


@lru_cache(maxsize=64)
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device)


def _choose_targets(visible: Tensor, valid: Tensor, dice: Dice, settings: CanvasSettings) -> Tensor:
    """Two of the ``visible`` masks (B, 4, S, S), drawn by weight without repetition.

    Where one mask fits the area limits it is taken twice, where none does the largest, and where nothing at all is
    visible (an object thinner than a canvas pixel) the photo itself.
    """
    area = visible.flatten(2).float().mean(2)
    smallest, largest = settings.target_area
    fits = (area >= smallest) & (area <= largest) & (area > 0)
    gumbel = -(-dice.uniform(0.0, 1.0, visible.shape[1]).log()).log()
    key = _constant(settings.target_weights, visible.device).log() + gumbel
    key, order = torch.where(fits, key, -math.inf).topk(2, dim=1)
    found = key > -math.inf
    first = torch.where(found[:, 0], order[:, 0], area.argmax(1))
    second = torch.where(found[:, 1], order[:, 1], first)
    index = torch.stack((first, second), 1).view(-1, 2, 1, 1).expand(-1, -1, *visible.shape[2:])
    truth = visible.gather(1, index)
    return torch.where(truth.flatten(2).any(2).view(-1, 2, 1, 1), truth, valid)
