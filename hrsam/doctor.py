"""``hrsam doctor``: what is installed, which implementation will run, how much memory an encode takes."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from hrsam.kernels import has_triton, resolve_impl
from hrsam.models.encoder import EncoderConfig
from hrsam.models.presets import PRESETS

PACKAGES = {
    "torch": "required",
    "numpy": "required",
    "opencv-python-headless": "required",
    "pillow": "required",
    "pycocotools": "required",
    "safetensors": "required",
    "triton": "kernels on a GPU",
    "timm": "SAM's own encoder (sam_b, sam_l, sam_h)",
    "accelerate": "training",
}


def versions() -> dict[str, str | None]:
    """Installed version of each package this one may use, ``None`` where it is missing."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


# Largest number of values alive at once, per channel of a token, while a window's queries and keys are rotated; measured
# with hrsam_b and hrsam_pp_{t,s,b} at 1024 to 4096 px on a CPU: 14 to 19.
VALUES_PER_CHANNEL = 19


def encode_memory(config: EncoderConfig, side: int, bytes_per_value: int = 4) -> int:
    """Forecast of the memory one encode takes beyond the weights, in bytes, for a square input of ``side`` pixels.

    Tokens of the picture and its anchor map, the picture itself and the map of features being gathered.  What the system's
    allocator keeps for later is not counted.
    """
    tokens = (side // config.patch) ** 2
    others = tokens * config.out_channels + 3 * side * side
    if config.anchor_side is not None:
        tokens += (config.anchor_side // config.patch) ** 2
    return (tokens * config.width * VALUES_PER_CHANNEL + others) * bytes_per_value


def report() -> list[str]:
    """Lines for a person."""
    lines = [f"hrsam {version('hrsam')}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"]
    for name, found in versions().items():
        lines.append(f"  {name:24} {found or 'missing':14} {PACKAGES[name]}")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            lines.append(f"device cuda:{index}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    else:
        lines.append(
            f"device cpu: {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads; no CUDA device found"
        )
    probe = torch.empty(1, device="cuda" if torch.cuda.is_available() else "cpu")
    lines.append(f"cycle scan runs on: {resolve_impl('auto', probe)} (Triton {'found' if has_triton() else 'missing'})")
    lines.append("forecast of memory for one encode in float32, beyond the weights:")
    lines.append(f"  {'preset':12} {'1024':>10} {'2048':>10} {'4096':>10}")
    for name, preset in PRESETS.items():
        config = preset().encoder
        if isinstance(config, EncoderConfig):
            sizes = (f"{encode_memory(config, side) / 2**30:.2f} GiB" for side in (1024, 2048, 4096))
            lines.append(f"  {name:12} " + " ".join(f"{size:>10}" for size in sizes))
    return lines
