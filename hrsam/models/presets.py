"""Architectures by name.  A preset plus a training of it is a tag: ``hrsam_pp_t.starter``."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable

from hrsam.models.encoder import EncoderConfig
from hrsam.models.model import HRSAM, ModelConfig
from hrsam.models.sam_vit import SamVitConfig

ANCHOR_SIDE = 512


def _hrsam(preset: str, width: int, heads: int, anchor_side: int | None) -> ModelConfig:
    return ModelConfig(preset, EncoderConfig(width=width, heads=heads, anchor_side=anchor_side))


def hrsam_b() -> ModelConfig:
    """The paper's size: 768 wide, 12 blocks, 12 heads."""
    return _hrsam("hrsam_b", 768, 12, None)


def hrsam_pp_b() -> ModelConfig:
    return _hrsam("hrsam_pp_b", 768, 12, ANCHOR_SIDE)


def hrsam_s() -> ModelConfig:
    return _hrsam("hrsam_s", 384, 6, None)


def hrsam_pp_s() -> ModelConfig:
    return _hrsam("hrsam_pp_s", 384, 6, ANCHOR_SIDE)


def hrsam_t() -> ModelConfig:
    return _hrsam("hrsam_t", 192, 3, None)


def hrsam_pp_t() -> ModelConfig:
    return _hrsam("hrsam_pp_t", 192, 3, ANCHOR_SIDE)


def sam_b() -> ModelConfig:
    """SAM's own encoder, ViT-B; takes pictures of 1024×1024 only."""
    return ModelConfig("sam_b", SamVitConfig(width=768, depth=12, heads=12, global_at=(2, 5, 8, 11)))


def sam_l() -> ModelConfig:
    return ModelConfig("sam_l", SamVitConfig(width=1024, depth=24, heads=16, global_at=(5, 11, 17, 23)))


def sam_h() -> ModelConfig:
    return ModelConfig("sam_h", SamVitConfig(width=1280, depth=32, heads=16, global_at=(7, 15, 23, 31)))


PRESETS: dict[str, Callable[[], ModelConfig]] = {
    "hrsam_b": hrsam_b,
    "hrsam_pp_b": hrsam_pp_b,
    "hrsam_s": hrsam_s,
    "hrsam_pp_s": hrsam_pp_s,
    "hrsam_t": hrsam_t,
    "hrsam_pp_t": hrsam_pp_t,
    "sam_b": sam_b,
    "sam_l": sam_l,
    "sam_h": sam_h,
}  # name -> architecture


def build(config: ModelConfig | str) -> HRSAM:
    """A model with fresh random weights, in training mode, from a preset's name or a configuration.

    Raises ``ValueError`` for an unknown name.
    """
    if isinstance(config, str):
        if config not in PRESETS:
            raise ValueError(f"there is no architecture {config!r}; {suggest(config, PRESETS)}")
        config = PRESETS[config]()
    return HRSAM(config)


def suggest(name: str, known: Iterable[str]) -> str:
    """The nearest of the ``known`` names as a question, and the list of all."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    return (f"did you mean {near[0]!r}? " if near else "") + f"known are {', '.join(known)}"
