"""What an encode costs, counted from the architecture."""

from __future__ import annotations

from hrsam.models.encoder import EncoderConfig


def flops(config: EncoderConfig, side: int) -> int:
    """Floating-point operations of one encode of a square input of ``side`` pixels, two for each multiply-add.

    Matrix products and convolutions of the cheapest exact form: padding is projected once a block and never asks.  The
    scan's recurrence (:func:`scan_updates`) and passes over single elements are not counted.
    """
    return 2 * multiply_adds(config, side)


def multiply_adds(config: EncoderConfig, side: int) -> int:
    full, anchor = tokens(config, side)
    width, length = config.width, full + anchor
    total = 3 * config.patch**2 * width * length
    hidden = int(width * config.mlp_ratio)
    for index in range(config.depth):
        mixer, options = config.mixers[index % len(config.mixers)]
        if mixer == "window":
            pairs = length * options["window"] ** 2
        elif mixer == "full":
            pairs = length * length
        else:
            raise ValueError(f"operations of the mixer {mixer!r} are not known; add them to hrsam/bench/flops.py")
        total += 3 * width * width * (length + 1) + width * width * length  # projections
        total += 2 * width * pairs + 2 * width * hidden * length
    scans = len(config.scan_at) * (1 if config.anchor_side is None else 2)
    total += scans * width * (4 * width + 2 * config.state) * length
    lateral = width if config.anchor_side is None else 2 * width
    total += len(config.scan_at) * lateral * config.out_channels * full + 9 * config.out_channels * full
    return total


def scan_updates(config: EncoderConfig, side: int) -> int:
    """State updates of all cycle scans when the sequence is repeated, as its definition says: R · L · C · N, summed."""
    scans = len(config.scan_at) * (1 if config.anchor_side is None else 2)
    return scans * config.cycles * sum(tokens(config, side)) * config.width * config.state


def tokens(config: EncoderConfig, side: int) -> tuple[int, int]:
    """Tokens of the picture and of its anchor map (0 without one)."""
    anchor = 0 if config.anchor_side is None else (config.anchor_side // config.patch) ** 2
    return (side // config.patch) ** 2, anchor
