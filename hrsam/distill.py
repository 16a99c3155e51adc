"""Distillation: a student encoder learns to give a teacher's embeddings."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from hrsam.config import Settings
from hrsam.data.transforms import Chance
from hrsam.train import Phase


class DistillSettings(Settings):
    """One run; see ``configs/distill_hrsam_pp_b.yaml``.

    ``preset``, ``start``: the student, as in :class:`hrsam.train.TrainSettings`; only its encoder is trained.  ``teacher``: a
    tag or weight file.  ``data``: folders of pictures, without masks.

    ``targets``: folder of cached embeddings, which are computed first where they are missing; None: the teacher runs in every
    step.  Cached ones were made of the pictures as they are, so nothing may move the picture (``mirror`` must be 0), and its
    colours are changed for the student alone; without a cache teacher and student see the same changed picture.
    ``precision`` of the teacher; ``stored``: dtype of cached embeddings.

    ``loss``: of the embeddings, with weight 1.  ``padding``: whether cells without picture count.  ``decoder_weight``: of the
    divergence between the masks that the teacher's decoder makes of both embeddings, for ``prompts`` random prompts a picture.
    ``colour``: chance of each of a changed brightness, contrast, saturation and hue; ``mirror``: of a mirrored picture.

    ``drop_path``: stochastic depth of the student's last block; ``layer_decay``: factor of the rate from a block to the
    one before it.  The rest as in :class:`hrsam.train.TrainSettings`, a phase's ``batch`` being pictures on each device.
    """

    preset: str
    start: str | None = None
    teacher: str
    data: tuple[str, ...]
    out: str
    phases: tuple[Phase, ...]
    targets: str | None = None
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    stored: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    loss: Literal["mse", "cosine"] = "mse"
    padding: Literal["ignored", "counted"] = "ignored"
    decoder_weight: float = Field(default=0.0, ge=0)
    prompts: int = Field(default=4, ge=1)
    colour: Chance = 0.5
    mirror: Chance = 0.0
    seed: int = 0
    warmup: int = 1500
    decay: float = 1.0
    final_lr: float = 0.0
    weight_decay: float = 0.05
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    ema: float = 0.999
    compile: Literal["none", "encoder"] = "encoder"
    log_every: int = 20
    save_every: int = 500

    @model_validator(mode="after")
    def _cached_targets_stay_in_place(self) -> DistillSettings:
        if self.targets is not None and self.mirror > 0:
            raise ValueError(
                "cached targets are of unmirrored pictures; set mirror to 0, or leave targets out so that the teacher runs in "
                "every step"
            )
        return self

    @property
    def steps(self) -> int:
        return sum(phase.steps for phase in self.phases)
