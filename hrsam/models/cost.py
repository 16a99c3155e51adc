"""What encoding a picture costs, counted from the architecture: to fill packs and to share work among devices."""

from __future__ import annotations

from typing import NamedTuple

from hrsam.models.encoder import EncoderConfig

SCAN_FLOPS = 14  # of one state and token: two passes of an exponential and three multiply-adds


class Cost(NamedTuple):
    """``tokens`` in the packed sequence, the anchor map's included; ``flops`` of a forward pass, two for each multiply-add."""

    tokens: int
    flops: int


def encode_cost(config: EncoderConfig, height: int, width: int) -> Cost:
    """Cost of one picture of ``height`` × ``width`` pixels, whole or not in patches.

    Matrix products, attention and the closed form of the scans; passes over single elements are not counted.  With windows the
    operations grow with the tokens alone, with the mixer ``full`` also with their square.  ``ValueError`` for other mixers.
    """
    full = -(-height // config.patch) * -(-width // config.patch)
    anchor = 0 if config.anchor_side is None else (config.anchor_side // config.patch) ** 2
    tokens, c, stages = full + anchor, config.width, len(config.scan_at)
    products = 3 * config.patch**2 * c * tokens
    for index in range(config.depth):
        mixer, options = config.mixers[index % len(config.mixers)]
        if mixer not in ("window", "full"):
            raise ValueError(f"the cost of the mixer {mixer!r} is not known; add it to hrsam/models/cost.py")
        read = options["window"] ** 2 if mixer == "window" else tokens
        products += (4 * c + 2 * read + 2 * int(c * config.mlp_ratio)) * c * tokens + 3 * c * c
    scans = stages * (1 if anchor == 0 else 2)
    products += scans * (4 * c + 2 * config.state) * c * tokens
    lateral = c if anchor == 0 else 2 * c
    products += (stages * lateral + 9) * config.out_channels * full
    return Cost(tokens, 2 * products + scans * SCAN_FLOPS * config.state * c * tokens)
