"""Small things to test with: a random model that answers in milliseconds, pictures with something on them."""

import numpy as np
import torch
from torch import nn

from hrsam.models.encoder import EncoderConfig
from hrsam.models.model import HRSAM, ModelConfig

SMALL = {"width": 64, "heads": 1, "depth": 4, "scan_at": (1, 3), "state": 4}


def small_config(anchor_side=64, **changes):
    return ModelConfig("test", EncoderConfig(**{**SMALL, "anchor_side": anchor_side, **changes}))


def small_model(anchor_side=64, seed=0, **changes):
    torch.manual_seed(seed)
    model = HRSAM(small_config(anchor_side, **changes)).eval()
    with torch.no_grad():  # zeros would hide wiring mistakes
        for block in model.encoder.blocks:
            nn.init.normal_(block.attn.padding)
            nn.init.normal_(block.attn.qkv.bias)
        model.mask_decoder.iou_prediction_head.layers[-1].bias.fill_(0.5)  # away from 0, where the estimate is cut
    return model


def identity_scans(encoder):
    for name in ("scans", "scans_across"):
        for scan in getattr(encoder, name, ()):
            nn.init.zeros_(scan.out_proj.weight)
            nn.init.zeros_(scan.out_proj.bias)


def photo(height, width, seed=0):
    """(height, width, 3) uint8 RGB: a coloured block on noise, nothing of it symmetric."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    pixels[height // 4 : height // 2, width // 3 :] = (200, 40, 90)
    return pixels
