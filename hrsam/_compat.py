"""Import timm beside a torch whose torchvision was built for another torch.

pip may install a CUDA torchvision beside a CPU torch.  Its compiled operators then do not load, ``import torchvision``
fails, and with it timm and transformers' SAM, which need only its Python parts.  Declaring the two operators that it
looks up at import is enough.  On a healthy installation nothing is changed.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch

_OPERATORS = ("nms", "qnms")
_libraries: list[torch.library.Library] = []  # a declaration lives as long as its library object


def import_torchvision() -> ModuleType:
    """``import torchvision``, with its missing compiled operators declared (not defined: calling them still fails)."""
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as err:
        if _libraries or "torchvision::" not in str(err):
            raise
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in _OPERATORS:
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)
    return importlib.import_module("torchvision")


def import_timm_sam() -> ModuleType:
    """timm's module with SAM's image encoder; ``ValueError`` when timm is not installed."""
    try:
        import_torchvision()
        return importlib.import_module("timm.models.vision_transformer_sam")
    except ModuleNotFoundError as err:
        raise ValueError(
            f"SAM's own encoder needs timm, and {err.name} is not installed; run: pip install 'hrsam[sam]'"
        ) from None
