"""Supervised training with simulated clicks: the loop around :mod:`hrsam.rollout`, on Accelerate.

The same command serves one device or many.
"""

from __future__ import annotations

import json
import logging
import math
import random
import time
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hrsam.checkpoint import load_state, save_state
from hrsam.config import Settings
from hrsam.data.bank import PhotoBank
from hrsam.data.transforms import CanvasSettings, make_batch
from hrsam.models.model import HRSAM
from hrsam.models.presets import build
from hrsam.rollout import ClickRollout, Rounds, compile_parts
from hrsam.weights import load

log = logging.getLogger("hrsam")

CLOCK_EVERY = 10  # steps between two looks at the clock of a run with a time budget


class Phase(Settings):
    """A stretch of the run: canvas ``side`` in pixels, canvases a step on each device, number of steps, learning rate."""

    side: int
    batch: int
    steps: int
    lr: float


class TrainSettings(Settings):
    """One run; see ``configs/hrsam_pp_t_starter.yaml``.

    ``start``: a tag or weight file of the same architecture to begin from, instead of random weights.
    ``data``: folders of photographs in the ``pairs`` layout; every ``hold_out``-th photograph is left out (0: none).
    ``warmup``: steps; ``decay``: share of the run over which the rate falls to ``final_lr`` of itself; ``clip``: largest
    gradient norm; ``ema``: weight of the past in the averaged weights.  ``compile`` and ``graphs`` change speed only, on CUDA:
    ``"all"`` compiles the decoder too, which takes minutes.  ``log_every``, ``save_every``: steps.
    ``budget``: seconds the run may take in all, preparation and earlier pieces included.  The phases' steps are then shares of
    that time: with 3000 and 1000 steps the second phase begins after three quarters of it, however many steps were made.
    """

    preset: str
    start: str | None = None
    data: tuple[str, ...]
    out: str
    phases: tuple[Phase, ...]
    budget: float | None = None
    canvas: CanvasSettings = CanvasSettings()
    rounds: Rounds = Rounds()
    seed: int = 0
    hold_out: int = 0
    warmup: int = 200
    decay: float = 0.3
    final_lr: float = 0.02
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0
    ema: float = 0.999
    compile: Literal["none", "encoder", "all"] = "encoder"
    graphs: bool = True
    log_every: int = 20
    save_every: int = 500

    @property
    def steps(self) -> int:
        return sum(phase.steps for phase in self.phases)

    def phase_at(self, step: float) -> Phase:
        for phase in self.phases:
            if step < phase.steps:
                return phase
            step -= phase.steps
        return self.phases[-1]

    def lr_at(self, step: int, place: float | None = None) -> float:
        """Warm-up, each phase's own rate, then linear to ``final_lr`` of it over the last ``decay`` of all steps.

        ``place``: where the run is when it goes by time, in steps of ``phases``; else that is ``step``.
        """
        place = step if place is None else place
        left = (self.steps - place) / max(1.0, self.decay * self.steps)
        falling = self.final_lr + (1 - self.final_lr) * min(1.0, left)
        return self.phase_at(place).lr * min(1.0, (step + 1) / max(1, self.warmup)) * falling


def build_optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """AdamW; weight decay on matrices only (not on biases, norms, tokens, positions, scan parameters)."""
    no_decay = ("pos_embed", "padding", "A_log", "gamma", "token", "embed")
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[parameter.ndim >= 2 and not any(word in name for word in no_decay)].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": groups[True], "weight_decay": settings.weight_decay},
            {"params": groups[False], "weight_decay": 0.0},
        ],
        lr=settings.lr_at(0),
        betas=settings.betas,
        fused=next(model.parameters()).is_cuda,
    )


def graph_encoder(model: HRSAM, phase: Phase) -> None:
    """Replace the encoder's forward and backward in training mode by CUDA graphs for the canvases of ``phase``."""
    encoder = model.encoder
    encoder.__dict__.pop("forward", None)  # an earlier phase's graphs
    pixels = torch.randn(phase.batch, 3, phase.side, phase.side, device=model.device)
    with torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=False):
        torch.cuda.make_graphed_callables(encoder, (pixels,), allow_unused_input=True)


def average_gradients(parameters: list[nn.Parameter], accelerator: Any) -> None:
    """Mean over processes, in one message."""
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = accelerator.reduce(torch.cat([g.flatten() for g in gradients]), reduction="mean")
    parts = flat.split([p.numel() for p in parameters])
    for parameter, part in zip(parameters, parts):
        parameter.grad = part.view_as(parameter)


def train(settings: TrainSettings, *, stop_after: float = math.inf, bank: PhotoBank | None = None) -> Path:
    """Run (or go on with) a training and return the path of its last checkpoint.

    Writes into ``settings.out``: ``state.pt`` (weights, averaged weights, optimiser, step; written atomically), and
    ``log.jsonl`` with one line every ``log_every`` steps.  A run whose ``state.pt`` exists is continued.
    ``stop_after``: seconds after which the state is saved and the call returns, whatever the step (one process only).
    ``bank``: photos loaded already, instead of ``settings.data``.
    """
    from accelerate import Accelerator
    from accelerate.utils import broadcast

    began = time.monotonic()
    cuda = torch.cuda.is_available()
    accelerator = Accelerator(cpu=not cuda, mixed_precision="bf16" if cuda else "no")
    device, rank, processes = accelerator.device, accelerator.process_index, accelerator.num_processes
    torch.manual_seed(settings.seed)
    model = build(settings.preset)
    if settings.start is not None:
        started_from = load(settings.start)
        if started_from.config != model.config:
            raise ValueError(f"{settings.start} is not a {settings.preset}; start from weights of that architecture")
        model.load_state_dict(started_from.state_dict())
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    optimizer_state, step, spent = None, 0, 0.0
    average = {name: value.detach().clone() for name, value in model.state_dict().items()}
    if (out / "state.pt").exists():
        state = load_state(out / "state.pt")
        model.load_state_dict(state["model"])
        average, optimizer_state, step = state["average"], state["optimizer"], state["step"]
        spent = state["spent"]
    if bank is None:
        bank = load_bank(settings)
    bank = bank.to(device)

    rollout = ClickRollout(model.to(device).train(), settings.rounds)
    optimizer = build_optimizer(model, settings)
    if optimizer_state is not None:
        optimizer.load_state_dict(optimizer_state)
    if device.type == "cuda":
        # cuDNN's attention prepares a plan for each new length, and the number of clicks changes all the time
        torch.backends.cuda.enable_cudnn_sdp(False)
        if settings.compile != "none":
            compile_parts(decoder=settings.compile == "all")
    weights = list(model.parameters())
    averaged = [average[name].to(device) for name, _ in model.named_parameters()]
    generator = torch.Generator(device)

    def save() -> None:
        average.update((name, value) for (name, _), value in zip(model.named_parameters(), averaged))
        state = {
            "model": model.state_dict(),
            "average": average,
            "optimizer": optimizer.state_dict(),
            "step": step,
            "spent": spent + time.monotonic() - began,
            "settings": settings.model_dump(mode="json"),
        }
        save_state(state, out / "state.pt")

    def place(before: float | None) -> float:
        """Where the run is, in steps of the phases; by time, the first process's clock counts and is asked now and then."""
        if settings.budget is None:
            return step
        if before is not None and step % CLOCK_EVERY:
            return before
        share = torch.tensor((spent + time.monotonic() - began) / settings.budget, device=device)
        return torch.as_tensor(broadcast(share)).item() * settings.steps

    meter = Meter(out / "log.jsonl", step)
    phase, at = None, place(None)
    while at < settings.steps and time.monotonic() - began < stop_after:
        if phase is not (phase := settings.phase_at(at)) and settings.graphs and device.type == "cuda":
            rollout.set_side(phase.side)
            graph_encoder(model, phase)
        for group in optimizer.param_groups:
            group["lr"] = settings.lr_at(step, at)
        generator.manual_seed(settings.seed * 1_000_003 + step * 1_009 + rank)
        batch = make_batch(bank, phase.batch, phase.side, generator, settings.canvas)
        with accelerator.autocast():
            loss, ious = rollout(batch.pixels, batch.truth, generator, random.Random(settings.seed * 7_919 + step))
        loss.backward()
        if processes > 1:
            average_gradients(weights, accelerator)
        norm = nn.utils.clip_grad_norm_(weights, settings.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = min(settings.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(averaged, [w.detach() for w in weights], 1 - decay)
        step += 1
        meter.add(loss, ious, phase.batch * processes)
        if step % settings.log_every == 0 or step == settings.steps:
            meter.write(step, phase.side, settings.lr_at(step - 1, at), norm, quiet=rank != 0)
        at = place(at)
        if step % settings.save_every == 0:
            meter.check(step)
            if rank == 0:
                save()
    meter.check(step)
    if rank == 0:
        save()
    accelerator.wait_for_everyone()
    return out / "state.pt"


def load_bank(settings: TrainSettings) -> PhotoBank:
    """All training photos on the CPU, without the held-out ones."""
    bank = PhotoBank.load([Path(folder) for folder in settings.data])
    return bank.split(every=settings.hold_out)[0] if settings.hold_out else bank


class Meter:
    """Means since the last line of the log.  Reading them waits for the device, so only ``write`` does."""

    def __init__(self, path: Path, step: int):
        self.path, self.step = path, step
        self.started = self.since = time.monotonic()
        self.images = self.total = 0
        self.loss: Tensor | float = 0.0
        self.ious: Tensor | float = 0.0

    def add(self, loss: Tensor, ious: Tensor, images: int) -> None:
        self.loss = self.loss + loss.detach()
        self.ious = self.ious + ious.detach()[[0, -1]]
        self.images += images

    def check(self, step: int) -> None:
        """``FloatingPointError`` when a loss since the last line was not finite; called before anything is saved."""
        if not math.isfinite(float(self.loss)):
            raise FloatingPointError(f"the loss is {float(self.loss)} at step {step}; the last saved state is kept")

    def write(self, step: int, side: int, lr: float, norm: Tensor, quiet: bool) -> None:
        """One line of JSON."""
        self.check(step)
        count, now = step - self.step, time.monotonic()
        first, last = (torch.as_tensor(self.ious) / count).tolist()
        self.total += self.images
        line = {
            "step": step,
            "side": side,
            "loss": round(float(self.loss) / count, 4),
            "iou_first": round(first, 4),
            "iou_last": round(last, 4),
            "grad_norm": round(float(norm), 3),
            "lr": round(lr, 7),
            "images": self.total,
            "images_per_s": round(self.images / (now - self.since), 1),
            "seconds": round(now - self.started, 1),
        }
        if not quiet:
            log.info("%s", line)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        self.step, self.since, self.images, self.loss, self.ious = step, time.monotonic(), 0, 0.0, 0.0
