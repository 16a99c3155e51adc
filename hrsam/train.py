"""Supervised training with simulated clicks: :mod:`hrsam.rollout` in the loop of :mod:`hrsam.loop`.

The same command serves one device or many.
"""

from __future__ import annotations

import hashlib
import math
import time
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor

from hrsam.clicks import Click
from hrsam.data.bank import PhotoBank
from hrsam.data.transforms import MEAN, STD, CanvasSettings, make_batch
from hrsam.images import overlay
from hrsam.loop import Loop, Outcome, Part, accelerator, recompute
from hrsam.models.block import Block, CycleScan
from hrsam.models.encoder import Encoder
from hrsam.models.model import HRSAM, Decoded
from hrsam.models.presets import build
from hrsam.models.sam_vit import PATCH
from hrsam.optim import Phase
from hrsam.rollout import ClickRollout, Rounds, compile_parts
from hrsam.run import RunSettings
from hrsam.weights import load


class TrainSettings(RunSettings):
    """One run; see ``configs/hrsam_pp_t_starter.yaml``, and :class:`hrsam.run.RunSettings` for what is not said here.

    ``data``: folders of photographs in the ``pairs`` layout; every ``hold_out``-th photograph is left out (0: none).
    A phase's ``batch`` is canvases of its ``side``.  ``compile`` and ``graphs`` change speed only, on CUDA: ``"all"`` compiles
    the decoder too, which takes minutes.
    """

    FREE: ClassVar[frozenset[str]] = RunSettings.FREE | {"compile", "graphs"}

    data: tuple[str, ...]
    canvas: CanvasSettings = CanvasSettings()
    rounds: Rounds = Rounds()
    hold_out: int = 0
    compile: Literal["none", "encoder", "all"] = "encoder"
    graphs: bool = True

    @model_validator(mode="after")
    def _graphs_hold_all_of_the_backward_pass(self) -> TrainSettings:
        if self.recompute and self.graphs:
            raise ValueError(
                "recompute=true changes the backward pass that graphs would record; set graphs=false with it"
            )
        return self


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
    torch.manual_seed(settings.seed)
    model = build(settings.preset)
    if settings.start is not None:
        started_from = load(settings.start)
        if started_from.config != model.config:
            raise ValueError(f"{settings.start} is not a {settings.preset}; start from weights of that architecture")
        model.load_state_dict(started_from.state_dict())
    if bank is None:
        bank = load_bank(settings)
    task = ClickTask(model.to(machine.device).train(), bank.to(machine.device), settings)
    loop = Loop(
        settings, model, task, machine, content=fingerprint(bank), began=began, stop_after=stop_after, live=live
    )
    return loop.run()


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
    """Simulated clicks on canvases, as the loop asks for them."""

    def __init__(self, model: HRSAM, bank: PhotoBank, settings: TrainSettings):
        self.model, self.bank, self.settings = model, bank, settings
        self.rollout = ClickRollout(model, settings.rounds)
        self.witness = Witness(model)
        self.canvas: tuple[Tensor, Tensor] | None = None
        if settings.recompute:
            recompute(m for m in model.encoder.modules() if isinstance(m, (Block, CycleScan)))
        if bank.device.type == "cuda":
            # cuDNN's attention prepares a plan for each new length, and the number of clicks changes all the time
            torch.backends.cuda.enable_cudnn_sdp(False)
            if settings.compile != "none":
                compile_parts(decoder=settings.compile == "all")

    def enter(self, phase: Phase) -> None:
        if self.settings.graphs and self.bank.device.type == "cuda":
            self.rollout.set_side(phase.side)
            graph_encoder(self.model, phase)

    def part(self, part: Part) -> Outcome:
        side, count = part.phase.side, part.phase.batch
        batch = make_batch(self.bank, count, side, part.generator, self.settings.canvas)
        self.canvas = batch.pixels[0].clone(), batch.truth[0, 0].clone()
        self.witness.answers = 0
        loss, ious = self.rollout(batch.pixels, batch.truth, part.generator, part.plan)
        ious = ious.detach()
        counts = {"images": count, "clicks": self.witness.answers, "tokens": count * encoder_tokens(self.model, side)}
        return Outcome(loss, {"iou_first": ious[0], "iou_last": ious[-1]}, counts)

    def picture(self) -> np.ndarray | None:
        """The last part's first canvas twice: with the object, and with the last mask and all clicks."""
        if self.canvas is None:
            return None
        pixels, truth = self.canvas
        mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (MEAN, STD))
        picture = (pixels * std + mean).clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()
        mask, clicks = self.witness.last_seen(truth.shape[-1])
        return np.concatenate((overlay(picture, truth.cpu().numpy()), overlay(picture, mask, clicks)), axis=1)


class Witness:
    """Stands before a model's ``decode``: counts the prompts it answers and remembers the last one of the first object."""

    def __init__(self, model: HRSAM):
        self.decode, self.answers = model.decode, 0
        self.last: tuple[Tensor, Tensor, Tensor] | None = None
        vars(model)["decode"] = self

    def __call__(self, embedding: Any, points: Tensor, labels: Tensor, *rest: Any, **options: Any) -> Decoded:
        out = self.decode(embedding, points, labels, *rest, **options)
        self.answers += len(points)
        self.last = points[0], labels[0], out.logits[0, 0].detach()
        return out

    def last_seen(self, side: int) -> tuple[np.ndarray, list[Click]]:
        """Mask (side, side) bool and clicks in its pixels."""
        assert self.last is not None
        points, labels, logits = self.last
        full = F.interpolate(logits[None, None].float(), (side, side), mode="bilinear", align_corners=False)
        clicks = [Click(x, y, label == 1) for (x, y), label in zip(points.tolist(), labels.tolist())]
        return (full[0, 0] > 0).cpu().numpy(), clicks


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
    with torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=False):
        torch.cuda.make_graphed_callables(encoder, (pixels,), allow_unused_input=True)
