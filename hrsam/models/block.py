"""The residual parts of the encoder: attention block and scan block, over packed tokens ``(T, C)``."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrsam.layout import Layout
from hrsam.ops import MIXERS
from hrsam.ops.cycle_scan import cycle_scan
from hrsam.ops.rope import Rope


class Attention(nn.Module):
    """Multi-head projection and a mixer.

    ``mixer``: a name of ``MIXERS`` and its options, for instance ``("window", {"window": 16, "shift": 8})``.
    ``padding`` (1, C) is HRSAM's learned padding token: it enters after the block's norm, so even at zero it gives the
    projection's bias as key and value.
    """

    def __init__(self, width: int, heads: int, mixer: str, options: dict, rope: Rope | None = None):
        super().__init__()
        if mixer not in MIXERS:
            raise ValueError(f"there is no mixer {mixer!r}; choose one of {', '.join(MIXERS)}")
        self.heads = heads
        self.mixer, self.options, self.rope = MIXERS[mixer], dict(options), rope or Rope()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.padding = nn.Parameter(torch.zeros(1, width))
        self.frozen_pad: tuple[Tensor, Tensor] | None = None

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``x`` (T, C) -> q, k, v, each (T, heads, C / heads)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        return q, k, v

    def pad_kv(self) -> tuple[Tensor, Tensor]:
        """Key and value (heads, C / heads) of the padding token; a constant of a frozen encoder."""
        if self.frozen_pad is not None:
            return self.frozen_pad
        _, k, v = self.project(self.padding)
        return k[0], v[0]

    def mix(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, pad_kv: tuple[Tensor, Tensor]) -> Tensor:
        return self.mixer(q, k, v, layout, rope=self.rope, pad_kv=pad_kv, **self.options).flatten(1)


@torch.library.custom_op("hrsam::linear_gelu", mutates_args=())
def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``gelu(x @ weightᵀ + bias)``, (T, C) -> (T, hidden), in one matrix product on a GPU.

    There the product's own GELU is the tanh form, which is nearer to the exact one (within 5e-4) than a 16-bit sum is; it is
    applied before the sum is rounded.  An operator, because the compiler would take it apart again.  Inference only.
    """
    return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)


@linear_gelu.register_fake
def _(x, weight, bias):
    return x.new_empty(x.shape[0], weight.shape[0])


class Mlp(nn.Module):
    """Two linear layers and the exact GELU; ``fused``: the GELU of :func:`linear_gelu`, for frozen 16-bit weights."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.fused = False

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            return self.fc2(linear_gelu(x.to(self.fc1.weight.dtype), self.fc1.weight, self.fc1.bias))
        return self.fc2(F.gelu(self.fc1(x)))


def by_image(function: Callable[..., Any], layout: Layout, *tensors: Tensor) -> Any:
    """Apply a function of single tokens to the rows of each image by itself, and pack the results again.

    A matrix product chooses its order of summation by the number of rows, so only equal shapes give equal bits.
    """
    if layout.num_images == 1:
        return function(*tensors)
    parts = [function(*(t[start:stop] for t in tensors)) for start, stop in pairwise(layout.image_starts)]
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    return tuple(torch.cat(part) for part in zip(*parts))


class Block(nn.Module):
    """Pre-norm transformer block: ``x + attention(norm(x))``, then ``x + mlp(norm(x))``.

    ``before`` and ``after`` hold everything that acts on each token alone, so that they can be compiled whatever the mixer.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, mixer: str, options: dict):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads, mixer, options)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def before(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.attn.project(self.norm1(x))

    def after(self, x: Tensor, mixed: Tensor, keep: tuple[Tensor, Tensor] | None = None) -> Tensor:
        branch = self.attn.proj(mixed)
        x = x + (branch if keep is None else branch * keep[0])
        branch = self.mlp(self.norm2(x))
        return x + (branch if keep is None else branch * keep[1])

    def forward(
        self, x: Tensor, layout: Layout, keep: tuple[Tensor, Tensor] | None = None, exact: bool = False
    ) -> Tensor:
        """``x`` (T, C) -> (T, C).

        ``keep``: stochastic depth, one factor a token (T, 1) for each of the two branches, equal for all tokens of an image.
        ``exact``: an image's bits do not depend on what is packed beside it (see :func:`by_image`); without ``keep``.
        """
        if exact:
            q, k, v = by_image(self.before, layout, x)
            return by_image(self.after, layout, x, self.attn.mix(q, k, v, layout, self.attn.pad_kv()))
        q, k, v = self.before(x)
        return self.after(x, self.attn.mix(q, k, v, layout, self.attn.pad_kv()), keep)


class CycleScan(nn.Module):
    """HRSAM's scan module: gated selective scan over the R times repeated sequence, as a residual.

    ``u, z = SiLU(in_proj(norm(x)))``; ``r, B, C = param_proj(u)``; ``x + out_proj(z ⊙ norm(scan(u, r, B, C)))``.
    """

    def __init__(self, width: int, state: int = 32, cycles: int = 3):
        super().__init__()
        self.norm_in = nn.LayerNorm(width)
        self.in_proj = nn.Linear(width, 2 * width)
        self.param_proj = nn.Linear(width, width + 2 * state)
        self.dt_bias = nn.Parameter(torch.empty(width))
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, state + 1)).repeat(width, 1))
        self.D = nn.Parameter(torch.ones(width))
        self.gamma = nn.Parameter(torch.ones(width, cycles))
        self.norm_out = nn.LayerNorm(width)
        self.out_proj = nn.Linear(width, width)
        self.reset_steps()

    def reset_steps(self, low: float = 1e-3, high: float = 1e-1, floor: float = 1e-4) -> None:
        """Bias of the step size: softplus⁻¹ of a step drawn log-uniformly from [low, high]; weights of its projection
        uniform in ±C^-½ with zero bias."""
        with torch.no_grad():
            span = torch.log(torch.tensor([low, high]))
            steps = torch.exp(torch.rand_like(self.dt_bias) * (span[1] - span[0]) + span[0]).clamp(min=floor)
            self.dt_bias.copy_(steps + torch.log(-torch.expm1(-steps)))
            nn.init.uniform_(self.param_proj.weight, -(len(steps) ** -0.5), len(steps) ** -0.5)
            nn.init.zeros_(self.param_proj.bias)

    def before(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        u, z = self.in_proj(self.norm_in(x)).chunk(2, dim=-1)
        u = F.silu(u)
        state = self.A_log.shape[1]
        r, b, c = self.param_proj(u).split((x.shape[-1], state, state), dim=-1)
        return u, z, r, b, c

    def after(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return x + self.out_proj(F.silu(z) * self.norm_out(y))

    def forward(self, x: Tensor, layout: Layout, across: bool, exact: bool = False) -> Tensor:
        """``x`` (T, C) -> (T, C); each grid by itself, or all grids of an image as one sequence (``across``).

        ``exact`` as in :class:`Block`.
        """
        u, z, r, b, c = by_image(self.before, layout, x) if exact else self.before(x)
        y = cycle_scan(u, r, self.dt_bias, self.A_log, b, c, self.D, self.gamma, layout, across=across)
        return by_image(self.after, layout, x, y, z) if exact else self.after(x, y, z)
