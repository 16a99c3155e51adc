"""Supervised training with simulated clicks: :mod:`hrsam.rollout` in the loop of :mod:`hrsam.loop`.

The same command serves one device or many.
"""

from __future__ import annotations

import hashlib
import math
import random
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from hrsam.clicks import Click
from hrsam.config import Settings
from hrsam.data.bank import PhotoBank
from hrsam.data.packing import Reduction, loss_total, loss_weights
from hrsam.data.shot import Photo
from hrsam.data.stream import CanvasBatch, Canvases, Packed, PackedBatch, Source, Stream, StreamSettings, patches
from hrsam.data.transforms import MEAN, STD, CanvasSettings, Chance, make_batch
from hrsam.feed import Feed, own_parts
from hrsam.loop import Loop, Outcome, Part, accelerator, recompute, seed_of
from hrsam.models.block import Block, CycleScan
from hrsam.models.cost import encode_cost
from hrsam.models.encoder import Encoder, EncoderConfig
from hrsam.models.model import HRSAM, Decoded
from hrsam.models.presets import build
from hrsam.models.sam_vit import PATCH
from hrsam.optim import Phase
from hrsam.overlay import overlay
from hrsam.rollout import STRIDE, ClickRollout, Rounds, compile_parts
from hrsam.run import RunSettings
from hrsam.tables import holding
from hrsam.weights import load


class PackedPictures(Settings):
    """Whole pictures in packs instead of canvases: a long side drawn from ``smallest`` · side to the phase's side, mirrored and
    recoloured by chance, packs of at most ``tokens`` tokens.  ``reduction``: whether every image, object, token or pixel of a
    step counts the same in its loss."""

    smallest: float = Field(default=0.3125, gt=0, le=1)
    tokens: PositiveInt = 16384
    mirror: Chance = 0.5
    colour: Chance = 0.5
    reduction: Reduction = "image"


class TrainSettings(RunSettings):
    """One run; see ``configs/hrsam_pp_t_starter.yaml``, and :class:`hrsam.run.RunSettings` for what is not said here.

    ``data``: folders of photographs in the ``pairs`` layout, decoded once and kept in memory at a long side of at most 448
    pixels; every ``hold_out``-th photograph is left out (0: none).  Or ``sets``: data sets of any kind and size, read during
    the training at the phase's side, ``objects`` of a picture at most; ``on_error`` as in
    :class:`hrsam.data.stream.StreamSettings`.

    A phase's ``batch`` is canvases of its ``side`` (``canvas``), or with ``packed`` pictures in packs.  ``noc``: data sets on
    which the command measures clicks at the end.  ``compile`` and ``graphs`` change speed only, on CUDA: ``"all"`` compiles the
    decoder too, which takes minutes.
    """

    FREE: ClassVar[frozenset[str]] = RunSettings.FREE | {"noc", "compile", "graphs"}

    data: tuple[str, ...] = ()
    hold_out: int = 0
    sets: tuple[Source, ...] = ()
    objects: PositiveInt = 2
    on_error: Literal["stop", "skip"] = "stop"
    canvas: CanvasSettings = CanvasSettings()
    packed: PackedPictures | None = None
    rounds: Rounds = Rounds()
    noc: tuple[Source, ...] = ()
    compile: Literal["none", "encoder", "all"] = "encoder"
    graphs: bool = True

    @model_validator(mode="after")
    def _one_source(self) -> TrainSettings:
        if bool(self.data) == bool(self.sets):
            raise ValueError("give either data, folders kept in memory, or sets, read during the training")
        if self.sets and self.hold_out:
            raise ValueError("hold_out is for data; leave pictures of sets out by another folder or annotation file")
        return self

    @model_validator(mode="after")
    def _fast_paths_that_exist(self) -> TrainSettings:
        if self.recompute and self.graphs:
            raise ValueError(
                "recompute=true changes the backward pass that graphs would record; set graphs=false with it"
            )
        if self.packed and not self.sets:
            raise ValueError("packed pictures are read during the training; name them in sets instead of data")
        if self.packed and (self.graphs or self.compile != "none"):
            raise ValueError("packs have new shapes in every step; set graphs=false and compile=none with packed")
        return self

    def stream(self, phase: Phase, parts: int) -> StreamSettings:
        """What a phase reads from ``sets``, for all ``parts`` of a step together."""
        packed, canvases = None, Canvases(sides=(phase.side,), photo_side=phase.side)
        if self.packed is not None:
            sides = (max(PATCH, round(self.packed.smallest * phase.side)), phase.side)
            canvases, packed = None, Packed(sides=sides, **self.packed.model_dump(exclude={"smallest", "reduction"}))
        same = self.model_dump(include={"objects", "seed", "on_error", "workers", "prefetch", "patience"})
        return StreamSettings(data=self.sets, batch=phase.batch * parts, packed=packed, canvases=canvases, **same)


def train(
    settings: TrainSettings, *, stop_after: float = math.inf, bank: PhotoBank | None = None, live: bool = False
) -> Path:
    """Run (or go on with) a training and return the path of its last checkpoint.

    Writes into ``settings.out``: ``checkpoints/`` (weights, averaged weights, optimiser, step), ``log.jsonl`` with one line
    every ``log_every`` steps, ``tensorboard/``.  A run that has a checkpoint is continued from it, exactly.
    ``stop_after``: seconds after which the state is saved and the call returns.  ``bank``: photos loaded already, instead of
    ``settings.data``.  ``live``: a bar on stderr.

    Raises ``ValueError`` for what the settings ask in vain and for the folder of another run, and
    :class:`hrsam.run.RunFailed` for a run that cannot go on.
    """
    began = time.monotonic()
    machine = accelerator()
    model = start_model(settings).to(machine.device).train()
    if settings.sets:
        feed, content = open_feed(settings, model, machine.process_index, machine.num_processes)
        task = PackedTask(model, feed, settings) if settings.packed else ClickTask(model, feed, settings)
    else:
        bank = load_bank(settings) if bank is None else bank
        task, content = ClickTask(model, bank.to(machine.device), settings), fingerprint(bank)
    with closing(task):
        loop = Loop(settings, model, task, machine, content=content, began=began, stop_after=stop_after, live=live)
        return loop.run()


def start_model(settings: RunSettings) -> HRSAM:
    """The model that a run begins with, on the CPU: random or ``start``, with the run's stochastic depth.

    Raises ``ValueError`` for weights of another architecture, and for stochastic depth in SAM's encoder.
    """
    torch.manual_seed(settings.seed)
    model = build(settings.preset)
    if settings.start is not None:
        started_from = load(settings.start)
        if started_from.config != model.config:
            raise ValueError(f"{settings.start} is not a {settings.preset}; start from weights of that architecture")
        model.load_state_dict(started_from.state_dict())
    if settings.drop_path > 0:
        if not isinstance(model.config.encoder, EncoderConfig):
            raise ValueError(f"{settings.preset} has no stochastic depth; set drop_path=0")
        state, config = model.state_dict(), replace(model.config.encoder, drop_path=settings.drop_path)
        model = HRSAM(replace(model.config, encoder=config))
        model.load_state_dict(state)
    return model


def open_feed(settings: TrainSettings, model: HRSAM, process: int, processes: int) -> tuple[Feed[Any], str]:
    """What this process reads from ``settings.sets``, and what they hold in 16 letters."""
    config, parts = model.config.encoder, processes * settings.accumulate
    measure = patches
    if settings.packed:
        if not isinstance(config, EncoderConfig):
            raise ValueError(f"{settings.preset} takes squares of one size only; train it on canvases, without packed")
        measure = partial(encode_cost, config)
    first = Stream(settings.stream(settings.phases[0], parts), world=parts, measure=measure)

    def stream(phase: Phase) -> Stream:
        pin = model.device.type == "cuda"
        return Stream(settings.stream(phase, parts), world=parts, measure=measure, pictures=first.pictures, pin=pin)

    for phase in settings.phases:
        stream(phase)  # what cannot be shared is refused now and not after hours
    return Feed(stream, own_parts(process, settings.accumulate)), first.content


def load_bank(settings: TrainSettings) -> PhotoBank:
    """All training photos on the CPU, without the held-out ones."""
    bank = PhotoBank.load([Path(folder) for folder in settings.data])
    return bank.split(every=settings.hold_out)[0] if settings.hold_out else bank


def fingerprint(bank: PhotoBank) -> str:
    """16 letters that change with the names, sizes, colours and masks of the photos."""
    digest = hashlib.sha256("\n".join(bank.names).encode())
    for values in (bank.sizes, bank.colours, bank.count, bank.boxes, bank.anchors):
        digest.update(values.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


class ClickTask:
    """Simulated clicks on canvases, as the loop asks for them.  ``photos``: on the model's device, any of which may come at any
    time, or what gives each part its own."""

    def __init__(self, model: HRSAM, photos: PhotoBank | Feed[CanvasBatch], settings: TrainSettings):
        self.model, self.photos, self.settings = model, photos, settings
        self.rollout = ClickRollout(model, settings.rounds)
        self.witness = Witness(model)
        self.canvas: tuple[Tensor, Tensor] | None = None
        make_fast(model, settings)

    @property
    def waited(self) -> float:
        return self.photos.waited if isinstance(self.photos, Feed) else 0.0

    def enter(self, phase: Phase) -> None:
        if self.settings.graphs and self.model.device.type == "cuda":
            self.rollout.set_side(phase.side)
            graph_encoder(self.model, phase)

    def part(self, part: Part) -> Outcome:
        side, count = part.phase.side, part.phase.batch
        bank, which = self.photos, None
        if isinstance(bank, Feed):
            bank = bank.step(part.phase, part.step)[part.index - bank.ranks[0]].bank.to(self.model.device)
            which = torch.arange(count) % len(bank)
        batch = make_batch(bank, count, side, part.generator, self.settings.canvas, which)
        self.canvas = batch.pixels[0].clone(), batch.truth[0, 0].clone()
        self.witness.answers = 0
        loss, ious = self.rollout(batch.pixels, batch.truth, part.generator, part.plan)
        ious = ious.detach()
        counts = {"images": count, "clicks": self.witness.answers, "tokens": count * encoder_tokens(self.model, side)}
        return Outcome(loss, {"iou_first": ious[0], "iou_last": ious[-1]}, counts)

    def picture(self) -> np.ndarray | None:
        return None if self.canvas is None else self.witness.picture(*self.canvas)

    def close(self) -> None:
        if isinstance(self.photos, Feed):
            self.photos.close()


class PackedTask:
    """Simulated clicks on pictures of any sizes in packs.  Each pack goes backward by itself; what its objects count is taken
    from the whole step, so that neither packs nor processes nor parts change the step's loss."""

    def __init__(self, model: HRSAM, feed: Feed[PackedBatch], settings: TrainSettings):
        self.model, self.feed, self.settings = model, feed, settings
        self.rollout = ClickRollout(model, settings.rounds)
        self.witness = Witness(model)
        self.seen: tuple[Tensor, Tensor] | None = None
        self.mean, self.std = (torch.tensor(v, device=model.device) for v in (model.config.mean, model.config.std))
        self._totals = -1, 0.0, 0.0  # step, denominator of the loss, objects
        make_fast(model, settings)

    @property
    def waited(self) -> float:
        return self.feed.waited

    def enter(self, phase: Phase) -> None:
        """Nothing: a phase's stream begins with its first step."""

    def part(self, part: Part) -> Outcome:
        assert self.settings.packed is not None
        reduction, batches = self.settings.packed.reduction, self.feed.step(part.phase, part.step)
        if self._totals[0] != part.step:
            self._totals = part.step, *self._step_totals(batches, reduction)
        _, total, objects = self._totals
        curves = {name: torch.zeros((), device=self.model.device) for name in ("loss", "iou_first", "iou_last")}
        counts = {"images": 0, "clicks": 0, "tokens": 0}
        for pack in batches[part.index - self.feed.ranks[0]].packs:
            shapes = [photo.counts for photo in pack]
            pictures, truths = self._tensors(pack)
            generators = [torch.Generator(self.model.device).manual_seed(seed_of(photo.seed)) for photo in pack]
            plan = random.Random()
            plan.setstate(part.plan.getstate())
            self.witness.answers = 0
            weights = loss_weights(reduction, shapes, total, ranks=part.count)
            loss, ious = self.rollout.packed(pictures, truths, weights, generators, plan)
            self.seen = pictures[0], truths[0][0]
            part.backward(loss)
            share = part.count * sum(shape.objects for shape in shapes) / objects
            for name, value in (("loss", loss), ("iou_first", share * ious[0]), ("iou_last", share * ious[-1])):
                curves[name] += value.detach()
            counts["images"] += len(pack)
            counts["clicks"] += self.witness.answers
            counts["tokens"] += sum(self._tokens(photo) for photo in pack)
        return Outcome(curves.pop("loss"), curves, counts)

    def _step_totals(self, batches: list[PackedBatch], reduction: Reduction) -> tuple[float, float]:
        shapes = [photo.counts for batch in batches for pack in batch.packs for photo in pack]
        own = loss_total(reduction, shapes), float(sum(shape.objects for shape in shapes))
        if not torch.distributed.is_initialized():
            return own
        both = torch.tensor(own, dtype=torch.float64, device=self.model.device)
        torch.distributed.all_reduce(both)
        total, objects = both.tolist()
        return total, objects

    def _tensors(self, pack: Sequence[Photo]) -> tuple[list[Tensor], list[Tensor]]:
        """Of each picture the normalised pixels (3, h, w) and the truths (K, h, w) bool on the model's device."""
        bgr, device = self.model.config.bgr, self.model.device
        pixels = uploaded([photo.pixels[..., ::-1] if bgr else photo.pixels for photo in pack], device)
        pictures = [((p - self.mean) / self.std).permute(2, 0, 1).contiguous() for p in pixels]
        return pictures, uploaded([photo.masks for photo in pack], device)

    def _tokens(self, photo: Photo) -> int:
        assert isinstance(self.model.config.encoder, EncoderConfig)
        return encode_cost(self.model.config.encoder, *photo.pixels.shape[:2]).tokens

    def picture(self) -> np.ndarray | None:
        return None if self.seen is None else self.witness.picture(*self.seen)

    def close(self) -> None:
        self.feed.close()


def uploaded(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Arrays of one type on ``device``, brought there by one copy that nobody waits for."""
    flat = torch.from_numpy(np.concatenate([array.reshape(-1) for array in arrays]))
    if device.type == "cuda":
        flat = flat.pin_memory()
    parts = flat.to(device, non_blocking=True).split([array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays)]


def make_fast(model: HRSAM, settings: TrainSettings) -> None:
    """What the settings ask for in speed and memory."""
    if settings.recompute:
        recompute(m for m in model.encoder.modules() if isinstance(m, (Block, CycleScan)))
    if model.device.type == "cuda":
        # cuDNN's attention prepares a plan for each new length, and the number of clicks changes all the time
        torch.backends.cuda.enable_cudnn_sdp(False)
        if settings.compile != "none":
            compile_parts(decoder=settings.compile == "all")


class Witness:
    """Stands before a model's ``decode``: counts the prompts it answers and remembers the first object of the last call."""

    def __init__(self, model: HRSAM):
        self.decode, self.answers = model.decode, 0
        self.last: tuple[Tensor, Tensor, Tensor] | None = None
        vars(model)["decode"] = self

    def __call__(self, embedding: Any, points: Tensor, labels: Tensor, *rest: Any, **options: Any) -> Decoded:
        out = self.decode(embedding, points, labels, *rest, **options)
        self.answers += len(points)
        self.last = points[0], labels[0], out.logits[0, 0].detach()
        return out

    def last_seen(self, height: int, width: int) -> tuple[np.ndarray, list[Click]]:
        """Mask (height, width) bool, without padding, and clicks in its pixels."""
        assert self.last is not None
        points, labels, logits = self.last
        rows, cols = (-(-side // PATCH) * PATCH // STRIDE for side in (height, width))
        own = logits[None, None, :rows, :cols].float()
        full = F.interpolate(own, scale_factor=STRIDE, mode="bilinear", align_corners=False)
        clicks = [Click(x, y, label == 1) for (x, y), label in zip(points.tolist(), labels.tolist())]
        return (full[0, 0, :height, :width] > 0).cpu().numpy(), clicks

    def picture(self, pixels: Tensor, truth: Tensor) -> np.ndarray:
        """(H, 2W, 3) uint8 RGB: the object on its picture, ``truth`` (H, W) and ``pixels`` (3, H, W), and the last answer."""
        mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (MEAN, STD))
        picture = (pixels * std + mean).clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()
        mask, clicks = self.last_seen(*truth.shape)
        return np.concatenate((overlay(picture, truth.cpu().numpy()), overlay(picture, mask, clicks)), axis=1)


def encoder_tokens(model: HRSAM, side: int) -> int:
    """Tokens of a canvas in the encoder, the anchor map's included."""
    encoder = model.encoder
    grids = encoder.grids(side, side) if isinstance(encoder, Encoder) else [(side // PATCH, side // PATCH)]
    return sum(rows * cols for rows, cols in grids)


def graph_encoder(model: HRSAM, phase: Phase) -> None:
    """Replace the encoder's forward and backward in training mode by CUDA graphs for the canvases of ``phase``."""
    encoder = model.encoder
    encoder.__dict__.pop("forward", None)  # an earlier phase's graphs
    pixels = torch.randn(phase.batch, 3, phase.side, phase.side, device=model.device)
    with holding() as tables, torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=False):
        torch.cuda.make_graphed_callables(encoder, (pixels,), allow_unused_input=True)
    vars(encoder)["graphed_tables"] = tables
