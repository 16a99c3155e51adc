"""The reference encoder's data flow, restated plainly: the baseline of ``hrsam bench encoder``.

HRSAM's first version as its paper and its released behaviour describe it (arXiv 2407.02109), in our own words.  The maths is
that of :class:`hrsam.models.encoder.Encoder`, whose weights it uses; what differs is how data move:

* every block joins [tokens; padding token], gathers all window slots by an int64 index, projects, rotates and attends all of
  them, padding queries included, projects the result and scatters it into a fresh buffer;
* rotary tables hold one row for every slot, from positions in the padded grid, and are cached by a string;
* every scan copies u, Δ, B and C R times in float32, channels first, scans the long sequence once and adds the cycles up.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrsam.layout import Layout
from hrsam.models.block import Attention, Block, CycleScan
from hrsam.models.encoder import Encoder
from hrsam.ops.cycle_scan import cycle_scan
from hrsam.ops.rope import angles
from hrsam.ops.window import window_padding

CACHED = 4  # tables; all are thrown away when one more is needed

Grid = tuple[int, int]
Scan = Callable[..., Tensor]


def mamba_missing() -> str | None:
    """Why mamba-ssm cannot be used, ``None`` when it can."""
    if find_spec("mamba_ssm") is None:
        return "mamba-ssm is not installed"
    try:
        importlib.import_module("mamba_ssm.ops.selective_scan_interface")
    except ImportError as err:
        return f"mamba-ssm cannot be imported: {err}"
    return None


def mamba_scan(u: Tensor, r: Tensor, dt_bias: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """A plain scan by mamba-ssm: ``u``, ``r`` (B, Ch, L), ``B``, ``C`` (B, N, L) -> (B, Ch, L)."""
    scan = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    return scan(u, r, -torch.exp(A_log), B, C, D=D, delta_bias=dt_bias, delta_softplus=True)


def own_scan(impl: str) -> Scan:
    """The same by our own cycle scan with one cycle.  It wants channels last, so its inputs are turned first."""

    def scan(u: Tensor, r: Tensor, dt_bias: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
        batch, channels, length = u.shape
        layout = Layout(((1, length),) * batch, tuple(range(batch)))
        u, r, B, C = (t.transpose(1, 2).reshape(batch * length, -1) for t in (u, r, B, C))
        once = torch.ones(channels, 1, dtype=u.dtype, device=u.device)
        y = cycle_scan(u, r, dt_bias, A_log, B, C, D, once, layout, impl=impl)
        return y.view(batch, length, channels).transpose(1, 2)

    return scan


SCANS: dict[str, Scan] = {"mamba": mamba_scan, "triton": own_scan("triton"), "torch": own_scan("torch")}


class ReferenceFlow(nn.Module):
    """An encoder's result, computed the way the reference does.  Weights are the encoder's own, not copies.

    ``scan``: what scans the repeated sequence: ``"mamba"`` (mamba-ssm), ``"triton"`` (our kernel, where mamba-ssm is missing)
    or ``"torch"``.  There is no stochastic depth.  Raises ``ValueError`` for another scan or an encoder with other attention.
    """

    def __init__(self, encoder: Encoder, scan: str = "torch"):
        super().__init__()
        if scan not in SCANS:
            raise ValueError(f"the reference flow has no scan {scan!r}; choose one of {', '.join(SCANS)}")
        if any(mixer != "window" for mixer, _ in encoder.config.mixers):
            raise ValueError(f"the reference has window attention only; got mixers {encoder.config.mixers}")
        self.encoder = encoder
        self.scan = scan
        self.cache: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def forward(self, pixels: Tensor) -> Tensor:
        """``pixels`` (B, 3, H, W) normalised, H and W multiples of the patch -> (B, out_channels, H/16, W/16)."""
        encoder, config = self.encoder, self.encoder.config
        scales = [pixels]
        if encoder.anchor_side is not None:
            size = (encoder.anchor_side, encoder.anchor_side)
            scales.append(F.interpolate(pixels, size, mode="bilinear", align_corners=False))
        grids = [(s.shape[2] // config.patch, s.shape[3] // config.patch) for s in scales]
        x = torch.cat([self._patches(s) + self._positions(grid) for s, grid in zip(scales, grids)], dim=1)
        lengths = [rows * cols for rows, cols in grids]
        stages = []
        for index, block in enumerate(encoder.blocks):
            stage = config.scan_at.index(index) if index in config.scan_at else None
            if stage is not None:
                x = self._scan(encoder.scans[stage], x, lengths)
            assert isinstance(block, Block)
            x = x + self._attention(block.attn, block.norm1(x), grids)
            x = x + block.mlp(block.norm2(x))
            if stage is not None:
                if encoder.anchor_side is not None:
                    x = self._scan(encoder.scans_across[stage], x, [sum(lengths)])
                stages.append(x)
        return self._neck(stages, grids)

    def _patches(self, scale: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, L, C), a matrix product of flattened patches."""
        patch, conv = self.encoder.config.patch, self.encoder.patch_embed
        cells = scale.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # (B, 3, h, patch, w, patch)
        return F.linear(cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2), conv.weight.flatten(1), conv.bias)

    def _positions(self, grid: Grid) -> Tensor:
        side = self.encoder.config.pretrained_grid
        table = self.encoder.pos_embed[:, 1:].transpose(1, 2).unflatten(2, (side, side))
        return F.interpolate(table, grid, mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)

    def _attention(self, attn: Attention, x: Tensor, grids: Sequence[Grid]) -> Tensor:
        """``x`` (B, L, C) -> (B, L, C)."""
        batch, length, width = x.shape
        window = attn.options["window"]
        index, cos, sin = self._tables(attn, batch, grids, width // attn.heads, x)
        tokens = torch.cat((x.flatten(0, 1), attn.padding.to(x.dtype)))
        slots = attn.qkv(tokens.index_select(0, index))
        slots = slots.view(-1, window * window, 3, attn.heads, width // attn.heads)
        q, k, v = slots.permute(2, 0, 3, 1, 4)  # (windows, heads, slots, D) each
        q, k = (_rotate(t, cos, sin) for t in (q, k))
        mixed = attn.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, width))
        out = mixed.new_empty(batch * length + 1, width)  # padding slots all fall on the last row
        return out.index_copy_(0, index, mixed)[:-1].view(batch, length, width)

    def _tables(self, attn: Attention, batch: int, grids: Sequence[Grid], head_dim: int, like: Tensor):
        """``index`` int64 (S,), the token of every slot, B · L for padding; cos and sin (windows, 1, window², D)."""
        window, shift = attn.options["window"], attn.options["shift"]
        dtype = torch.promote_types(like.dtype, torch.float32)
        key = f"{grids}_{batch}_{window}_{shift}_{head_dim}_{attn.rope}_{dtype}_{like.device}"
        if key not in self.cache:
            if len(self.cache) == CACHED:
                self.cache.clear()
            index, places = _slots(grids, window, shift)
            length = sum(rows * cols for rows, cols in grids)
            whole = [torch.where(index < 0, batch * length, index + image * length) for image in range(batch)]
            phi = angles(attn.rope, places.repeat(batch, 1), head_dim).repeat_interleave(2, dim=-1)
            phi = phi.view(-1, 1, window * window, head_dim)
            cos, sin = (t.to(like.device, dtype) for t in (phi.cos(), phi.sin()))
            self.cache[key] = torch.cat(whole).to(like.device), cos, sin
        return self.cache[key]

    def _scan(self, module: nn.Module, x: Tensor, lengths: Sequence[int]) -> Tensor:
        """``x`` (B, L, C) -> (B, L, C); sequences of ``lengths``, one after the other."""
        assert isinstance(module, CycleScan)
        channels, states = module.A_log.shape
        u, z = F.silu(module.in_proj(module.norm_in(x))).chunk(2, dim=-1)
        parts = module.param_proj(u).split((channels, states, states), dim=-1)
        sequences = zip(*(t.split(list(lengths), dim=1) for t in (u, *parts)))
        y = torch.cat([self._cycles(module, *sequence) for sequence in sequences], dim=1)
        return x + module.out_proj(z * module.norm_out(y))

    def _cycles(self, module: CycleScan, u: Tensor, r: Tensor, B: Tensor, C: Tensor) -> Tensor:
        """One sequence, R times: ``u``, ``r`` (B, L, Ch), ``B``, ``C`` (B, L, N) -> (B, L, Ch) float32 (or float64)."""
        gamma, dtype = module.gamma, torch.promote_types(u.dtype, torch.float32)
        with torch.autocast(u.device.type, enabled=False):
            first = (t.to(dtype).transpose(1, 2) for t in (u, r, B, C))
            u, r, B, C = (torch.cat([t] * gamma.shape[1], dim=2).contiguous() for t in first)
            y = SCANS[self.scan](u, r, module.dt_bias, module.A_log, B, C, module.D)
            y = (y.unflatten(2, (gamma.shape[1], -1)) * gamma.unsqueeze(2)).sum(2)
        return y.transpose(1, 2)

    def _neck(self, stages: Sequence[Tensor], grids: Sequence[Grid]) -> Tensor:
        """Outputs (B, L, C) of all stages -> (B, out_channels, h, w)."""
        encoder, (rows, cols) = self.encoder, grids[0]
        fused = []
        for index, x in enumerate(stages):
            full = x[:, : rows * cols].unflatten(1, (rows, cols))
            if encoder.anchor_side is not None:
                small = x[:, rows * cols :].unflatten(1, grids[1]).permute(0, 3, 1, 2)
                anchor = F.interpolate(small, (rows, cols), mode="bilinear", align_corners=False).permute(0, 2, 3, 1)
                norm = encoder.fusion_norms[index]
                full = torch.cat((norm(full), norm(anchor)), dim=-1)
            fused.append(encoder.laterals[index](full))
        out = encoder.out_conv(sum(fused[1:], fused[0]).permute(0, 3, 1, 2))
        return encoder.out_norm(out.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _slots(grids: Sequence[Grid], window: int, shift: int) -> tuple[Tensor, Tensor]:
    """Of one image: token of every slot (S,), −1 for padding, and row and column in the padded grid (S, 2)."""
    tokens, places, start = [], [], 0
    for rows, cols in grids:
        top, left, bottom, right = window_padding(rows, cols, window, shift)
        grid = torch.arange(start, start + rows * cols).view(rows, cols)
        grid = F.pad(grid, (left, right, top, bottom), value=-1)
        axes = torch.meshgrid(torch.arange(grid.shape[0]), torch.arange(grid.shape[1]), indexing="ij")
        table = torch.stack((grid, *axes), dim=-1)
        tiles = table.view(grid.shape[0] // window, window, grid.shape[1] // window, window, 3)
        table = tiles.transpose(1, 2).reshape(-1, 3)
        tokens.append(table[:, 0])
        places.append(table[:, 1:])
        start += rows * cols
    return torch.cat(tokens), torch.cat(places)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channel pairs of ``x`` (..., D) by minus their angle; the halves are written with a stride."""
    half = torch.empty_like(x)
    half[..., 0::2] = x[..., 1::2]
    half[..., 1::2] = -x[..., 0::2]
    return (x * cos + half * sin).to(x.dtype)
