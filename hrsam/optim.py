"""How weights are moved: the course of the learning rate, groups of parameters, gradients as one vector, averaged weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from hrsam.config import Settings

_NO_MATRIX = re.compile(  # has two dimensions and multiplies nothing: learned tokens, positions, parameters of the scan
    r"(?:pos_embed|rel_pos_[hw]|padding|A_log|gamma|(?:iou_token|mask_tokens|point_embeddings\.\d|not_a_point_embed|no_mask_embed)\.weight)$"
)
_BLOCK = re.compile(r"(?:^|\.)blocks\.(\d+)\.")
_EMBED = re.compile(r"(?:^|\.)(?:patch_embed|pos_embed)(?:\.|$)")


class Phase(Settings):
    """A stretch of the run: ``side`` in pixels, ``batch`` on each device at once, number of steps, learning rate."""

    side: int
    batch: int
    steps: int
    lr: float


class Recipe(Settings):
    """The optimiser's part of a run.

    ``warmup``: steps; ``decay``: share of the run over which the rate falls to ``final_lr`` of itself, linearly and after the
    warm-up, so that 1 is the paper's "polynomial" schedule of power 1.  ``weight_decay``: on matrices only; ``layer_decay``:
    factor of the rate from a block of the encoder to the one before it; ``clip``: largest gradient norm; ``ema``: weight of
    the past in the averaged weights.
    """

    phases: tuple[Phase, ...]
    warmup: int = 200
    decay: float = 0.3
    final_lr: float = 0.02
    weight_decay: float = 0.05
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0
    ema: float = 0.999

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
        falling = max(1.0, min(self.decay * self.steps, self.steps - self.warmup))
        left = min(1.0, (self.steps - place) / falling)
        rate = self.phase_at(place).lr * min(1.0, (step + 1) / max(1, self.warmup))
        return rate * (self.final_lr + (1 - self.final_lr) * left)


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Groups for an optimiser, each with ``weight_decay`` and ``lr_scale``, a factor of the rate; frozen parameters in none.

    Decay is for matrices and kernels, not for biases, norms, tokens, positions and scan parameters.  Of n blocks, block i has
    the scale ``layer_decay`` ** (n - i), patches and positions before them ** (n + 1), everything else 1: neck and decoder,
    and the scans between the blocks, which no pretraining has seen.
    Source: Bao et al., "BEiT" (arXiv 2106.08254), appendix; exponents of the blocks as in HRSAM (arXiv 2407.02109).
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    blocks = {int(match[1]) for name, _ in named if (match := _BLOCK.search(name))}
    depth = max(blocks, default=-1) + 1
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        is_matrix = parameter.ndim >= 2 and not _NO_MATRIX.search(name)
        scale = 1.0
        if match := _BLOCK.search(name):
            scale = layer_decay ** (depth - int(match[1]))
        elif _EMBED.search(name):
            scale = layer_decay ** (depth + 1)
        groups.setdefault((weight_decay if is_matrix else 0.0, scale), []).append(parameter)
    return [
        {"params": groups[decay, scale], "weight_decay": decay, "lr_scale": scale}
        for decay, scale in sorted(groups, reverse=True)
    ]


def build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW over :func:`parameter_groups`.

    Fused, on every device: it is fast, and it leaves everything as it is while its ``found_inf`` is 1, see :class:`Watch`.
    """
    groups = parameter_groups(model, recipe.weight_decay, recipe.layer_decay)
    return torch.optim.AdamW(groups, lr=recipe.lr_at(0), betas=recipe.betas, fused=True)


def move(optimizer: torch.optim.Optimizer, rate: float, found_inf: Tensor) -> None:
    """One step at ``rate``, times each group's scale; none at all where ``found_inf`` is 1."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
    vars(optimizer)["found_inf"] = found_inf  # how PyTorch's gradient scaler tells fused optimisers
    optimizer.step()


class Gradients:
    """The gradients of ``weights`` as one vector ``flat``, of which each ``grad`` is a view.

    One vector is cleared, averaged over processes and measured at once.  Who gets no gradient has one of zero, so that a step
    does not depend on how it is divided into parts.
    """

    def __init__(self, weights: Sequence[nn.Parameter]):
        first = weights[0]
        self.flat = torch.zeros(sum(p.numel() for p in weights), dtype=first.dtype, device=first.device)
        for parameter, part in zip(weights, self.flat.split([p.numel() for p in weights])):
            parameter.grad = part.view_as(parameter)

    def clip(self, largest: float) -> Tensor:
        """Scale to a norm of at most ``largest``; returns the norm it had, not finite when a gradient is not."""
        norm = torch.linalg.vector_norm(self.flat)
        self.flat.mul_((largest / (norm + 1e-6)).clamp(max=1.0))
        return norm


class Watch:
    """Remembers, on the device, the first step whose loss or gradient is not finite.

    ``found_inf`` is 1 from that step on, and with it a fused optimiser leaves weights and moments as they were before it; so
    nobody has to wait for the device in every step.
    """

    def __init__(self, device: torch.device):
        self.first = torch.full((3,), -1.0, dtype=torch.float64, device=device)  # step, loss, gradient norm
        self.found_inf = torch.zeros((), device=device)

    def see(self, step: int, loss: Tensor, norm: Tensor) -> None:
        now = torch.stack((torch.full_like(self.first[0], step), loss.double(), norm.double()))
        keep = (self.first[0] >= 0) | now.isfinite().all()
        self.first = torch.where(keep, self.first, now)
        self.found_inf = (self.first[0] >= 0).float()

    def look(self) -> tuple[int, float, float] | None:
        """(step, loss, gradient norm) of the first bad step, None when all were well.  Waits for the device."""
        step, loss, norm = self.first.tolist()
        return None if step < 0 else (int(step), loss, norm)


class Average:
    """Exponentially averaged weights, which forget the first steps quickly: the weight of the past is at most ``ema``."""

    def __init__(self, model: nn.Module, ema: float):
        self.ema = ema
        self.weights = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.values = [p.detach().clone() for _, p in self.weights]

    def update(self, step: int) -> None:
        """After step number ``step``, counted from 0."""
        past = min(self.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.values, [p.detach() for _, p in self.weights], 1 - past)

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """``model``'s state with the averaged weights in place of its own."""
        return {**model.state_dict(), **{name: value for (name, _), value in zip(self.weights, self.values)}}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        for (name, _), value in zip(self.weights, self.values):
            value.copy_(state[name])
