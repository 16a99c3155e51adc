"""Distillation: a student encoder learns to give a teacher's embeddings, in the loop of :mod:`hrsam.loop`.

The first stage of HRSAM's training (arXiv 2407.02109); :mod:`hrsam.train` is the second.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from hrsam.data.resize import resize, resized
from hrsam.data.shot import recolour
from hrsam.data.steps import Epochs, load_steps
from hrsam.data.stream import Source
from hrsam.data.transforms import MEAN, STD, Chance
from hrsam.feed import Feed, own_parts
from hrsam.frame import Frame
from hrsam.images import read_image
from hrsam.loop import Loop, Outcome, Part, accelerator, recompute
from hrsam.losses import embedding_cosine, embedding_mse
from hrsam.models.block import Block, CycleScan
from hrsam.models.model import HRSAM
from hrsam.optim import Phase
from hrsam.rollout import compile_parts, halve_anchor
from hrsam.run import RunSettings
from hrsam.targets import Targets, build_targets, find_pictures, kind_of
from hrsam.teachers import PATCH, Teacher, check_pair, load_teacher, real_cells
from hrsam.train import encoder_tokens, start_model

Stored = Literal["float32", "bfloat16", "float16"]


class DistillSettings(RunSettings):
    """One run; see ``configs/distill_hrsam_pp_b.yaml``, and :class:`hrsam.run.RunSettings` for what is not said here.

    Only the student's encoder is trained; without ``start`` the rest of it is the teacher's.  ``teacher``: a tag or weight
    file.  ``data``: folders of pictures, without masks.

    ``targets``: folder of cached embeddings, which are computed first where they are missing; None: the teacher runs in every
    step.  Cached ones were made of the pictures as they are, so nothing may move the picture (``mirror`` must be 0), and its
    colours are changed for the student alone; without a cache teacher and student see the same changed picture.
    ``precision`` of the teacher; ``stored``: dtype of cached embeddings.

    ``loss``: of the embeddings, with weight 1.  ``padding``: whether cells without picture count.  ``decoder_weight``: of the
    divergence between the masks that the teacher's decoder makes of both embeddings, for ``prompts`` random clicks a picture.
    ``colour``: chance of each of a changed brightness, contrast, saturation and hue; ``mirror``: of a mirrored picture.
    A phase's ``batch`` is pictures, fitted into the top left of squares of its ``side``.  ``noc``: as in
    :class:`hrsam.train.TrainSettings`.  ``compile``: changes speed only.
    """

    FREE: ClassVar[frozenset[str]] = RunSettings.FREE | {"noc", "compile"}

    teacher: str
    data: tuple[str, ...]
    targets: str | None = None
    precision: Stored = "float32"
    stored: Stored = "bfloat16"
    loss: Literal["mse", "cosine"] = "mse"
    padding: Literal["ignored", "counted"] = "ignored"
    decoder_weight: float = Field(default=0.0, ge=0)
    prompts: PositiveInt = 4
    colour: Chance = 0.5
    mirror: Chance = 0.0
    warmup: int = 1500
    decay: float = 1.0
    final_lr: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    noc: tuple[Source, ...] = ()
    compile: Literal["none", "encoder"] = "encoder"

    @model_validator(mode="after")
    def _cached_targets_stay_in_place(self) -> DistillSettings:
        if self.targets is not None and self.mirror > 0:
            raise ValueError(
                "cached targets are of unmirrored pictures; set mirror to 0, or leave targets out so that the teacher runs in "
                "every step"
            )
        return self


def distill(
    settings: DistillSettings, *, stop_after: float = math.inf, targets_only: bool = False, live: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Path | None:  # fmt: skip
    """Run (or go on with) a distillation and return the path of its last checkpoint, as :func:`hrsam.train.train` does.

    ``targets_only``: compute what is missing in ``settings.targets``, a share in each process, and return None.  ``say`` gets
    lines for the user.

    Raises ``ValueError`` for what the settings ask in vain, a picture that cannot be read, a target that is missing and the
    folder of another run, and :class:`hrsam.run.RunFailed` for a run that cannot go on.
    """
    began = time.monotonic()
    if targets_only and settings.targets is None:
        raise ValueError("there is no folder for the targets; give one, for instance targets=out/targets")
    machine = accelerator()
    pictures = find_pictures(settings.data)
    student = start_model(settings)
    teacher = load_teacher(settings.teacher, machine.device, getattr(torch, settings.precision))
    sides = dict.fromkeys(phase.side for phase in settings.phases)
    for side in sides:
        check_pair(teacher.model.config, student.config, side)
    if settings.decoder_weight > 0 and not teacher.model.config.decoder:
        raise ValueError(f"the teacher {teacher.path.name} has no mask decoder; set decoder_weight=0")
    known: dict[int, Targets] = {}
    if settings.targets is not None:
        say = say if machine.is_main_process else lambda line: None
        for side in sides:
            build_targets(
                pictures, teacher, settings.targets, side=side, stored=settings.stored,
                threads=torch.get_num_threads(), progress=live, say=say,
            )  # fmt: skip
        machine.wait_for_everyone()
        known = {side: Targets(settings.targets, kind_of(teacher, side, settings.stored)) for side in sides}
    if targets_only:
        return None
    prepare_student(student, teacher.model, lend=settings.start is None)
    if known and settings.decoder_weight == 0:
        teacher.model.to("cpu")  # its work is done
    parts = machine.num_processes * settings.accumulate

    def looks(phase: Phase) -> Looks:
        return Looks(settings, phase, pictures, known.get(phase.side), parts)

    student = student.to(machine.device)
    task = EmbeddingTask(student, teacher, Feed(looks, own_parts(machine.process_index, settings.accumulate)), settings)
    content = hashlib.sha256("\n".join(f"{p.name} {p.stat().st_size}" for p in pictures).encode()).hexdigest()[:16]
    content = f"{content} of {teacher.sha256[:16]}"
    with closing(task):
        loop = Loop(settings, student, task, machine, content=content, began=began, stop_after=stop_after, live=live)
        return loop.run()


def prepare_student(student: HRSAM, teacher: HRSAM, lend: bool) -> None:
    """In training mode, all but the encoder frozen; ``lend``: that part is the teacher's, where it has a decoder."""
    if lend and teacher.config.decoder:
        lent = {name: value for name, value in teacher.state_dict().items() if not name.startswith("encoder.")}
        student.load_state_dict(lent, strict=False)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name.startswith("encoder."))
    student.train()


# ---------------------------------------------------------------- pictures


@dataclass(frozen=True)
class Look:
    """One picture of a step, and all that its bytes depend on; ``seed`` of everything that is drawn."""

    picture: Path
    side: int
    mirror: float
    colour: float
    seed: int


@dataclass(frozen=True, eq=False)
class Seen:
    """``pixels`` (h, w, 3) uint8 RGB with the long side ``side``; ``target``: bytes of the cached embedding, if any."""

    pixels: np.ndarray
    target: np.ndarray | None


@dataclass(frozen=True)
class Reader:
    """Reads looks, in any process; ``targets`` to read beside them."""

    targets: Targets | None

    def __call__(self, look: Look) -> Seen:
        data = look.picture.read_bytes()
        try:
            pixels = read_image(data).pixels
        except ValueError as err:
            raise ValueError(f"{look.picture}: {str(err).removeprefix('picture: ')}") from None
        height, width = pixels.shape[:2]
        pixels = resize(pixels, resized(height, width, look.side, enlarge=True))
        if np.random.default_rng(look.seed).random() < look.mirror:
            pixels = np.ascontiguousarray(pixels[:, ::-1])
        if look.colour > 0:
            pixels = recolour(pixels, look.colour, look.seed)
        if self.targets is None:
            return Seen(pixels, None)
        return Seen(pixels, self.targets.get(data).contiguous().view(torch.uint8).numpy())


@dataclass(frozen=True)
class Looks:
    """The pictures of a phase's steps, for the feed of the loop's ``parts``."""

    settings: DistillSettings
    phase: Phase
    pictures: Sequence[Path]
    targets: Targets | None
    parts: int

    def batches(self, first: int, ranks: Sequence[int]) -> Generator[list[Seen], None, None]:
        settings, batch = self.settings, self.phase.batch
        epochs = Epochs(len(self.pictures), settings.seed)

        def looks(step: int, rank: int) -> list[Look]:
            return [self._look(epochs, (step * self.parts + rank) * batch + number) for number in range(batch)]

        steps = load_steps(
            Reader(self.targets), looks, ranks, first, workers=settings.workers,
            most=settings.prefetch * batch * len(ranks), patience=settings.patience, name=lambda look: str(look.picture),
        )  # fmt: skip
        with closing(steps):
            for _, _, seen in steps:
                yield seen

    def _look(self, epochs: Epochs, position: int) -> Look:
        """``position``: number of pictures of all parts before this one."""
        seed = int(np.random.default_rng([1, self.settings.seed, position]).integers(2**63))
        picture = self.pictures[epochs.at(position)]
        return Look(picture, self.phase.side, self.settings.mirror, self.settings.colour, seed)


# ---------------------------------------------------------------- a step


class EmbeddingTask:
    """Embeddings of pictures, as the loop asks for them."""

    def __init__(self, student: HRSAM, teacher: Teacher, feed: Feed[list[Seen]], settings: DistillSettings):
        self.student, self.teacher, self.feed, self.settings = student, teacher, feed, settings
        self.loss = {"mse": embedding_mse, "cosine": embedding_cosine}[settings.loss]
        self.stored = getattr(torch, settings.stored)
        self.last: tuple[np.ndarray, Tensor, Tensor] | None = None
        if settings.recompute:
            recompute(m for m in student.encoder.modules() if isinstance(m, (Block, CycleScan)))
        if student.device.type == "cuda" and settings.compile != "none":
            compile_parts(decoder=False)

    @property
    def waited(self) -> float:
        return self.feed.waited

    def enter(self, phase: Phase) -> None:
        halve_anchor(self.student.encoder, phase.side)

    def part(self, part: Part) -> Outcome:
        seen = self.feed.step(part.phase, part.step)[part.index - self.feed.ranks[0]]
        side, device = part.phase.side, self.student.device
        frames = [Frame(one.pixels.shape[0], one.pixels.shape[1], side) for one in seen]
        config = self.student.config
        pixels = torch.stack([
            frame.prepare(one.pixels, config.mean, config.std, bgr=config.bgr, device=device)
            for frame, one in zip(frames, seen)
        ])  # fmt: skip
        real = real_cells(frames).to(device)
        target = self._targets(seen, frames)
        found = self.student.encoder(pixels)
        counted = None if self.settings.padding == "counted" else real
        loss = self.loss(found, target, counted).mean()
        with torch.no_grad():
            curves = {"embedding": loss.detach(), "cosine": 1 - embedding_cosine(found, target, real).mean()}
        if self.settings.decoder_weight > 0:
            led = self._led_astray(found, target, frames, real, part.generator)
            curves["decoder"] = led.detach()
            loss = loss + self.settings.decoder_weight * led
        self.last = seen[0].pixels, target[0], found[0].detach()
        counts = {"images": len(seen), "tokens": len(seen) * encoder_tokens(self.student, side)}
        return Outcome(loss, curves, counts)

    def _targets(self, seen: Sequence[Seen], frames: Sequence[Frame]) -> Tensor:
        """(B, C, g, g) float32, cached or computed of the pictures that the student sees."""
        device = self.student.device
        if seen[0].target is not None:
            kept = [torch.from_numpy(one.target).view(self.stored) for one in seen if one.target is not None]
            return torch.stack(kept).to(device).float()
        pixels = torch.stack([f.prepare(one.pixels, MEAN, STD, device=device) for f, one in zip(frames, seen)])
        valid = torch.zeros(len(seen), 1, *frames[0].padded, dtype=torch.bool, device=device)
        for inside, frame in zip(valid, frames):
            height, width = frame.resized
            inside[:, :height, :width] = True
        return self.teacher.on_canvases(pixels, valid).float()

    def _led_astray(
        self, found: Tensor, target: Tensor, frames: Sequence[Frame], real: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Mean divergence of the teacher's masks, for clicks anywhere on the pictures."""
        count = self.settings.prompts
        sizes = torch.tensor([frame.resized[::-1] for frame in frames], device=found.device)
        places = torch.rand(len(frames), count, 2, device=found.device, generator=generator)
        points = (places * sizes.unsqueeze(1) - 0.5).view(-1, 1, 2)
        labels = torch.ones(points.shape[:2], dtype=torch.int64, device=found.device)
        found, target, real = (x.repeat_interleave(count, 0) for x in (found, target, real))
        return self.teacher.decoder_loss(found, target, points, labels, real=real).mean()

    def picture(self) -> np.ndarray | None:
        """The last part's first picture, the teacher's embedding and the student's, in the colours of :func:`false_colours`."""
        if self.last is None:
            return None
        pixels, target, found = self.last
        height, width = pixels.shape[:2]
        maps = [c.repeat(PATCH, 0).repeat(PATCH, 1)[:height, :width] for c in false_colours(target, found)]
        return np.concatenate((pixels, *maps), axis=1)

    def close(self) -> None:
        self.feed.close()


def false_colours(target: Tensor, found: Tensor) -> list[np.ndarray]:
    """Two feature maps (C, h, w) as (h, w, 3) uint8: the three directions in which ``target`` varies most, red the first."""
    flat = [x.double().flatten(1).cpu() for x in (target, found)]
    middle = flat[0].mean(1, keepdim=True)
    spread = (flat[0] - middle) @ (flat[0] - middle).t()
    directions = torch.linalg.eigh(spread).eigenvectors[:, -3:].flip(1).t()
    seen = [directions @ (x - middle) for x in flat]
    scale = 2 * seen[0].std(1, keepdim=True).clamp(min=1e-9)
    shape = 3, *target.shape[1:]
    levels = [(127.5 + 127.5 * (x / scale).clamp(-1, 1)).byte().view(shape) for x in seen]
    return [x.permute(1, 2, 0).contiguous().numpy() for x in levels]
