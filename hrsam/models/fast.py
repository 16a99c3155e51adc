"""A model for inference only: 16-bit matrices, a compiled encoder and decoder, CUDA graphs.

Same results within the rounding of the chosen precision.  Everything that can be computed once is; a call then is a copy
of its inputs, one replay and a copy of its outputs.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from copy import copy, deepcopy
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrsam.kernels import has_triton
from hrsam.models.decoder import MaskDecoder, TwoWayLayer
from hrsam.models.encoder import Encoder
from hrsam.models.prompt import NOBODY, PromptEncoder
from hrsam.tables import holding

KEPT = 8  # graphs of one function, the least recently used is dropped; each holds the memory of its activations


class Graphed:
    """A function of tensors (or ``None``) as CUDA graphs, one for each set of shapes.  Calls are serialised by a lock."""

    def __init__(self, function: Callable[..., Any], kept: int = KEPT):
        self.function, self.kept = function, kept
        self._graphs: OrderedDict[Any, tuple[Any, list[Tensor | None], Any, list[Any]]] = OrderedDict()
        self._lock = threading.Lock()

    @torch.no_grad()
    def __call__(self, *tensors: Tensor | None, **options: Any) -> Any:
        key = (*(None if t is None else (t.shape, t.dtype, t.device) for t in tensors), *sorted(options.items()))
        with self._lock:
            if key not in self._graphs:
                self._graphs[key] = self._capture(tensors, options)
                while len(self._graphs) > self.kept:
                    self._graphs.popitem(last=False)
            self._graphs.move_to_end(key)
            graph, inputs, outputs, _ = self._graphs[key]
            for mine, given in zip(inputs, tensors):
                if mine is not None and given is not None:
                    mine.copy_(given)
            graph.replay()
            return tuple(t.clone() for t in outputs) if isinstance(outputs, tuple) else outputs.clone()

    def _capture(self, tensors, options):
        inputs = [None if t is None else t.clone() for t in tensors]
        device = next(t.device for t in inputs if t is not None)
        with torch.cuda.device(device):
            stream = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):  # compilation, tables and workspaces must be there before the capture
                for _ in range(3):
                    self.function(*inputs, **options)
            torch.cuda.current_stream(device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with holding() as tables, torch.cuda.graph(graph):
                outputs = self.function(*inputs, **options)
        return graph, inputs, outputs, tables


class FastEncoder(nn.Module):
    """An encoder for inference; called and used as :class:`hrsam.models.encoder.Encoder`."""

    def __init__(self, encoder: Encoder, dtype: torch.dtype, compiled: bool, graphs: bool):
        super().__init__()
        self.encoder = encoder.frozen(dtype)
        self.config, self.dtype = encoder.config, dtype
        run: Callable[[Tensor], Tensor] = self.encoder
        if compiled:
            run = torch.compile(self.encoder.forward, fullgraph=True, dynamic=False)
        self._run = Graphed(self._one(run)) if graphs else self._one(run)

    def _one(self, run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def encode(pixels: Tensor) -> Tensor:
            with torch.autocast(pixels.device.type, self.dtype, enabled=self.dtype != torch.float32):
                return run(pixels).contiguous()

        return encode

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """As :meth:`Encoder.forward`; features in the encoder's precision."""
        self.encoder.check(pixels)
        self.encoder.remember(self.encoder.grids(pixels.shape[2], pixels.shape[3]))
        return self._run(pixels)

    def encode(self, images: Sequence[Tensor]) -> list[Tensor]:
        """As :meth:`Encoder.encode`: one picture after the other, so that equal pictures give equal bits."""
        if not images:
            raise ValueError("got no images to encode; give at least one (3, H, W) tensor")
        return [self(image.unsqueeze(0))[0] for image in images]


def _normed_sum(norm: nn.LayerNorm, dtype: torch.dtype, compiled: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """LayerNorm of a sum, computed in float32, in one pass where it is compiled."""

    def run(image: Tensor, update: Tensor) -> Tensor:
        total = image.float() + update.float()
        return F.layer_norm(total, norm.normalized_shape, norm.weight, norm.bias, norm.eps).to(dtype)

    return torch.compile(run, dynamic=False) if compiled else run


class FastDecoder:
    """Prompt encoder and mask decoder for inference, called as ``HRSAM.decode_prompts``.

    Prompts are filled up to one of a few lengths with tokens that nothing reads, so that a few graphs serve any number of
    clicks.
    """

    def __init__(self, prompts: PromptEncoder, decoder: MaskDecoder, dtype: torch.dtype, compiled: bool, graphs: bool):
        self.prompts: PromptEncoder = deepcopy(prompts).eval().requires_grad_(False)
        self.decoder: MaskDecoder = deepcopy(decoder).eval().requires_grad_(False)
        for module in self.decoder.modules():
            if isinstance(module, (nn.Linear, nn.ConvTranspose2d)):
                module.to(dtype)
        self.dtype = dtype
        cuda = prompts.no_mask_embed.weight.is_cuda
        split = cuda and has_triton()
        self.decoder.transformer.final_attn_token_to_image.split = split
        for layer in self.decoder.transformer.layers:
            assert isinstance(layer, TwoWayLayer)
            layer.update_image = _normed_sum(layer.norm4, dtype, compiled)  # type: ignore[method-assign]
            layer.cross_attn_token_to_image.split = split
        self._dense = self.prompts.dense
        if compiled:  # what is done for every cell of the image; few prompt tokens gain nothing
            self._dense = torch.compile(self.prompts.dense, dynamic=False)
            self.decoder.mask_logits = torch.compile(self.decoder.mask_logits, dynamic=False)
        self._run = Graphed(self._decode, 2 * KEPT) if graphs else torch.no_grad()(self._decode)

    @torch.no_grad()
    def dense_positions(self, grid: tuple[int, int]) -> Tensor:
        return self.prompts.dense_positions(grid).to(self.dtype)

    def _decode(self, features, positions, points, labels, previous, masks):
        size = 16 * features.shape[2], 16 * features.shape[3]
        with torch.autocast(features.device.type, self.dtype, enabled=self.dtype != torch.float32):
            sparse = self.prompts.sparse(points, labels, size)
            dense = self._dense(previous, len(points), tuple(features.shape[2:])).to(self.dtype)
            features, positions = features.to(self.dtype), positions.to(self.dtype)
            logits, iou = self.decoder(features, positions, sparse, dense, masks, labels != NOBODY)
        return logits.float(), iou.float()

    def __call__(self, features, positions, points, labels, previous, masks):
        length = max(4, 1 << (labels.shape[1] - 1).bit_length())
        extra = length - labels.shape[1]
        points = F.pad(points, (0, 0, 0, extra))
        labels = F.pad(labels, (0, extra), value=NOBODY)
        return self._run(features, positions, points, labels, previous, masks=masks)


def optimized(model: Any, dtype: torch.dtype, compiled: bool, graphs: bool) -> Any:
    """A shallow copy of an ``HRSAM`` with a fast encoder and decoder; see ``HRSAM.optimize``."""
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"a model runs in float32, float16 or bfloat16; got {dtype}")
    if not isinstance(model.encoder, Encoder):
        raise ValueError(f"only HRSAM's own encoders can be optimized; got {type(model.encoder).__name__}")
    graphs = graphs and model.device.type == "cuda"
    fast = copy(model)
    fast._modules = dict(model._modules)
    fast.encoder = FastEncoder(model.encoder, dtype, compiled, graphs)
    if model.config.decoder:
        fast.decode_prompts = FastDecoder(model.prompt_encoder, model.mask_decoder, dtype, compiled, graphs)
        fast.dense_positions = cache(fast.decode_prompts.dense_positions)
    return fast
