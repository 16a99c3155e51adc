"""Supervised training with simulated clicks.

A step encodes a batch of canvases once and plays a few rounds with two objects of each: predict, let the simulated user place
the next click on the largest error, predict again with the earlier logits fed back.  The loss of a round is normalized focal
plus Dice at the canvas' resolution; the first round also trains SAM's three guesses (only the best one is pulled) and every
round trains the predicted IoU.  The loop runs on Accelerate, so the same command serves one device or many.
"""

from __future__ import annotations

import json
import logging
import math
import random
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrsam.checkpoint import load_state, save_state
from hrsam.clicks import random_clicks, simulate_clicks
from hrsam.config import Settings
from hrsam.data.transforms import CanvasSettings, PhotoBank, make_batch
from hrsam.losses import dice_loss, iou_target, normalized_focal_loss
from hrsam.models.encoder import Encoder
from hrsam.models.model import HRSAM, Embedding
from hrsam.models.presets import build

log = logging.getLogger("hrsam")

STRIDE = 4  # mask logits, and the clicks of the simulated user in training, live at a quarter of the canvas


class Phase(Settings):
    """A stretch of the run: canvas ``side`` in pixels, canvases a step on each device, number of steps, learning rate."""

    side: int
    batch: int
    steps: int
    lr: float


class Rounds(Settings):
    """How the simulated user plays.  Probabilities are per step, the same on every device."""

    trained: int = 3
    another: float = 0.6
    most_silent: int = 6
    start_random: float = 0.3
    most_random: int = 7
    start_box: float = 0.15
    box_jitter: float = 0.06
    spread: float = 1.7


class TrainSettings(Settings):
    """One run; see ``configs/hrsam_pp_t_starter.yaml``."""

    preset: str
    data: tuple[str, ...]
    out: str
    phases: tuple[Phase, ...]
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
    guess_weight: float = 0.5
    iou_weight: float = 0.5
    compile: bool = True
    graphs: bool = True
    log_every: int = 20
    save_every: int = 500

    @property
    def steps(self) -> int:
        return sum(phase.steps for phase in self.phases)

    def phase_at(self, step: int) -> Phase:
        for phase in self.phases:
            if step < phase.steps:
                return phase
            step -= phase.steps
        return self.phases[-1]

    def lr_at(self, step: int) -> float:
        """Warm-up, each phase's own rate, then linear to ``final_lr`` of it over the last ``decay`` of all steps."""
        left = (self.steps - step) / max(1.0, self.decay * self.steps)
        falling = self.final_lr + (1 - self.final_lr) * min(1.0, left)
        return self.phase_at(step).lr * min(1.0, (step + 1) / max(1, self.warmup)) * falling


class ClickRollout(nn.Module):
    """Encode once, then rounds of prediction and simulated clicks; returns the loss and what to log."""

    def __init__(self, model: HRSAM, settings: TrainSettings):
        super().__init__()
        self.model = model
        self.settings = settings

    def forward(self, pixels: Tensor, truth: Tensor, generator: torch.Generator, plan: random.Random):
        """``pixels`` (B, 3, S, S) normalised, ``truth`` (B, K, S, S) bool.  ``plan`` draws the course of the rounds."""
        objects, rounds = truth.shape[1], self.settings.rounds
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
                    loss, iou = _mask_loss(
                        out.logits, out.iou, truth, small, self.settings.guess_weight, self.settings.iou_weight
                    )
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
        rounds = self.settings.rounds
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
def compile_parts() -> None:
    """Compile what costs time, for the rest of the process.

    Everything is specialised to its shapes but the number of prompt tokens; all blocks of a kind share one compilation.
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
    whole = torch.compile(MaskDecoder.forward)

    def decode(self, image, image_pe, sparse, dense, masks=(0,)):
        torch._dynamo.mark_dynamic(sparse, 1)
        return whole(self, image, image_pe, sparse, dense, masks)

    MaskDecoder.forward = decode
    clicks.squared_distance = torch.compile(clicks.squared_distance)
    globals()["_mask_loss"] = torch.compile(_mask_loss)


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

    cuda = torch.cuda.is_available()
    accelerator = Accelerator(cpu=not cuda, mixed_precision="bf16" if cuda else "no")
    device, rank, processes = accelerator.device, accelerator.process_index, accelerator.num_processes
    torch.manual_seed(settings.seed)
    model = build(settings.preset)
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    optimizer_state, step = None, 0
    average = {name: value.detach().clone() for name, value in model.state_dict().items()}
    if (out / "state.pt").exists():
        state = load_state(out / "state.pt")
        model.load_state_dict(state["model"])
        average, optimizer_state, step = state["average"], state["optimizer"], state["step"]
    if bank is None:
        bank = load_bank(settings)
    bank = bank.to(device)

    rollout = ClickRollout(model.to(device).train(), settings)
    optimizer = build_optimizer(model, settings)
    if optimizer_state is not None:
        optimizer.load_state_dict(optimizer_state)
    if device.type == "cuda":
        # cuDNN's attention prepares a plan for each new length, and the number of clicks changes all the time
        torch.backends.cuda.enable_cudnn_sdp(False)
        if settings.compile:
            compile_parts()
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
            "settings": settings.model_dump(mode="json"),
        }
        save_state(state, out / "state.pt")

    meter = Meter(out / "log.jsonl", settings, step)
    phase = None
    while step < settings.steps and time.monotonic() - meter.started < stop_after:
        if phase is not (phase := settings.phase_at(step)) and settings.graphs and device.type == "cuda":
            rollout.set_side(phase.side)
            graph_encoder(model, phase)
        for group in optimizer.param_groups:
            group["lr"] = settings.lr_at(step)
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
            meter.write(step, norm, quiet=rank != 0)
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

    def __init__(self, path: Path, settings: TrainSettings, step: int):
        self.path, self.settings, self.step = path, settings, step
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

    def write(self, step: int, norm: Tensor, quiet: bool) -> None:
        """One line of JSON."""
        self.check(step)
        count, now = step - self.step, time.monotonic()
        first, last = (torch.as_tensor(self.ious) / count).tolist()
        self.total += self.images
        line = {
            "step": step,
            "side": self.settings.phase_at(step - 1).side,
            "loss": round(float(self.loss) / count, 4),
            "iou_first": round(first, 4),
            "iou_last": round(last, 4),
            "grad_norm": round(float(norm), 3),
            "lr": round(self.settings.lr_at(step - 1), 7),
            "images": self.total,
            "images_per_s": round(self.images / (now - self.since), 1),
            "seconds": round(now - self.started, 1),
        }
        if not quiet:
            log.info("%s", line)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        self.step, self.since, self.images, self.loss, self.ious = step, time.monotonic(), 0, 0.0, 0.0
