"""The simulated user's game: click on what is wrong, look at the new mask, twenty times; and what is said about it.

What plays is a *segmenter*: ``start(pixels)``, then ``click(clicks)`` with all clicks so far, which answers with a mask.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from typing import Protocol as Interface

import numpy as np
import torch
from torch import Tensor

from hrsam import rle
from hrsam.clicks import RULES, Click, next_click
from hrsam.data.sample import Sample
from hrsam.metrics import boundary_iou, failures, iou, mean_iou_after, noc, thin_part
from hrsam.models.model import HRSAM
from hrsam.session import EncodedPicture, encode_picture, predict_masks
from hrsam.traces import Trace, mask_hash

THRESHOLDS = (0.80, 0.85, 0.90, 0.95)
LOOKED_AT = (1, 5, 10, 20)
"""Steps after which boundary IoU and thin recall are measured, and the last one."""


@dataclass(frozen=True)
class Protocol:
    """The rules of the game; numbers of different protocols are not comparable, so a report carries them.

    ``rule``: the simulated user of :func:`hrsam.clicks.next_click`.  Always ``clicks`` clicks, never stopped early.
    ``threshold``: a pixel belongs to the mask when its probability is above it.  ``ties`` between deepest pixels:
    ``"first"`` in scan order, or ``"seeded"``: drawn with a stream of its own for each sample, from ``seed`` and the
    sample's name.
    """

    name: str = "frozen"
    rule: str = "frozen"
    clicks: int = 20
    threshold: float = 0.5
    ties: str = "first"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"unknown click rule {self.rule!r}; choose one of {', '.join(RULES)}")
        if self.ties not in ("first", "seeded"):
            raise ValueError(f"ties are 'first' or 'seeded'; got {self.ties!r}")
        if self.rule == "hrsam" and self.ties == "first":
            raise ValueError("the rule 'hrsam' draws among equals: use ties='seeded', or the rule 'frozen'")
        if not 1 <= self.clicks <= 1000 or not 0 < self.threshold < 1:
            raise ValueError(f"clicks are 1 to 1000, a threshold lies in (0, 1); got {self.clicks}, {self.threshold}")

    def text(self) -> list[str]:
        """The protocol in words."""
        after = self.rule == "ritm"
        idle = {
            "frozen": "the IoU stays",
            "hrsam": "the model is asked again with the old clicks and its last mask",
            "ritm": "a negative click on pixel (0, 0)",
        }
        return [
            f"{self.clicks} clicks on every sample, never stopped early, the first one on an empty mask.",
            "Missed object and extra mask at the original size; the click goes to the pixel farthest from the boundary "
            "of its error, positive if the missed object is deeper than the extra mask, else negative.",
            "Distances are exact squared Euclidean integers; outside of the picture nothing is wrong.",
            "Pixels clicked before are skipped after the distance transform."
            if after
            else "Pixels clicked before leave the errors before the distance transform.",
            "Of several deepest pixels "
            + ("the first in scan order." if self.ties == "first" else f"one is drawn, seed {self.seed} and the name."),
            f"When nothing is wrong: {idle[self.rule]}.",
            f"A pixel is mask when its probability is above {self.threshold:g}; the model's logits are fed back.",
            f"NoC: clicks until the IoU is reached, {self.clicks} if it never is. Never reached: the IoU was below after "
            f"each click. Equals max (RITM's NoF): NoC is {self.clicks}, a success at the last click included.",
        ]


PROTOCOLS = {
    "frozen": Protocol(),
    "hrsam": Protocol("hrsam", "hrsam", ties="seeded", seed=42),
    "ritm": Protocol("ritm", "ritm", threshold=0.49),
}
"""``frozen``: ours, without chance.  ``hrsam``: HRSAM, FocSAM, Inter2Former.  ``ritm``: RITM, SimpleClick, SegNext."""


class Segmenter(Interface):
    """What plays: :class:`ModelSegmenter`, or one of :mod:`hrsam.baselines`."""

    def start(self, pixels: np.ndarray) -> None:
        """A new picture (H, W, 3) uint8 RGB; everything before is forgotten."""
        ...

    def click(self, clicks: Sequence[Click]) -> Any:
        """The mask (H, W) bool after ``clicks``, all of this picture so far, the newest last.

        A NumPy array, or a tensor on the device that ``device`` names, where user and metric then work too.
        """
        ...


class ModelSegmenter:
    """A model at input ``side``; its logits of the round before are fed back.

    ``on_device``: masks are enlarged where the model is and stay there; None: if that is a GPU.
    """

    def __init__(self, model: HRSAM, side: int = 1024, threshold: float = 0.5, on_device: bool | None = None):
        self.model, self.side, self.above = model, side, math.log(threshold / (1 - threshold))
        on_device = model.device.type == "cuda" if on_device is None else on_device
        self.device = model.device if on_device else None
        self._picture: EncodedPicture | None = None
        self._previous: Tensor | None = None

    def start(self, pixels: np.ndarray) -> None:
        self._picture, self._previous = encode_picture(self.model, pixels, self.side), None

    def click(self, clicks: Sequence[Click]) -> np.ndarray | Tensor:
        if self._picture is None:
            raise ValueError("no picture is set; call start first")
        found = predict_masks(self.model, self._picture, clicks, previous=self._previous)[0]
        self._previous = found.low_res
        enlarge = found.frame.mask_to_original if self.device is None else found.frame.mask_on_device
        return enlarge(found.low_res, self.above)


def play(segmenter: Segmenter, sample: Sample, protocol: Protocol, given: Trace | None = None) -> Trace:
    """Play one sample; with ``given`` its clicks are made instead of the simulated user's.

    Seconds: ``metric`` is the IoU; boundary IoU, thin recall and hashes are not counted.
    Raises ``ValueError`` for a trace of another picture or with fewer steps than the protocol.
    """
    if given is not None and (given.size != sample.mask.shape or len(given.clicks) < protocol.clicks):
        raise ValueError(
            f"the trace of {sample.name} has {len(given.clicks)} steps on {given.size}, the sample is {sample.mask.shape} "
            f"and the protocol {protocol.clicks} clicks; give the traces of this data set and protocol"
        )
    rng = random.Random(f"{protocol.seed} {sample.name}") if protocol.ties == "seeded" else None
    device = getattr(segmenter, "device", None)

    def placed(mask: np.ndarray) -> Any:
        return mask if device is None else torch.from_numpy(mask).to(device)

    def fetched(mask: Any) -> np.ndarray:
        return mask if device is None else mask.cpu().numpy()

    seen_here = np.ones_like(sample.mask) if sample.ignore is None else ~sample.ignore
    truth_here = sample.mask & seen_here
    thin = thin_part(truth_here)
    truth, seen = placed(truth_here), placed(seen_here)
    ignore = None if sample.ignore is None else ~seen
    spent: dict[str, float] = {"encode": 0.0, "decode": 0.0, "user": 0.0, "metric": 0.0}
    clock = time.perf_counter()

    def lap(what: str) -> None:
        nonlocal clock
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        spent[what] += now - clock
        clock = now

    segmenter.start(sample.pixels)
    lap("encode")
    mask = truth & ~truth
    made: list[Click] = []
    clicks, ious, hashes = [], [], []
    boundary: dict[str, float] = {}
    recall: dict[str, float | None] = {}
    for step in range(protocol.clicks):
        if given is not None:
            click = given.click_at(step)
        else:
            click = next_click(truth, mask, made, rule=protocol.rule, rng=rng, ignore=ignore)
        lap("user")
        if click is not None:
            made.append(click)
        if click is not None or (protocol.rule == "hrsam" and made):
            mask = segmenter.click(tuple(made))
            lap("decode")
        clicks.append(None if click is None else (click.x, click.y, int(click.positive)))
        counted = mask & seen
        ious.append(float(iou(counted, truth)))
        lap("metric")
        answer = fetched(mask)
        hashes.append(mask_hash(answer))
        if step + 1 in (*LOOKED_AT, protocol.clicks):
            answer = answer & seen_here
            boundary[str(step + 1)] = boundary_iou(answer, truth_here)
            recall[str(step + 1)] = float((answer & thin).sum() / thin.sum()) if thin.any() else None
        clock = time.perf_counter()
    return Trace(
        sample.name,
        sample.dataset,
        (truth_here.shape[0], truth_here.shape[1]),
        int(truth_here.sum()),
        tuple(clicks),
        tuple(ious),
        tuple(hashes),
        boundary,
        recall,
        rle.encode(fetched(mask)),
        spent,
    )


def summary(traces: Sequence[Trace], thresholds: Sequence[float] = THRESHOLDS) -> dict[str, Any]:
    """Means over samples, which must have been played equally long: IoU after each click, NoC, failures by both
    definitions, boundary IoU and thin recall (of the samples that have something thin)."""
    if not traces:
        raise ValueError("there are no samples to summarise; check the data set's folder")
    ious = np.array([trace.ious for trace in traces])
    most = ious.shape[1]
    names = [str(round(100 * threshold)) for threshold in thresholds]
    failed = [failures(ious, threshold, most) for threshold in thresholds]
    return {
        "samples": len(traces),
        "iou": [mean_iou_after(ious, k) for k in range(1, most + 1)],
        "noc": {name: noc(ious, threshold, most) for name, threshold in zip(names, thresholds)},
        "never_reached": {name: f["never_reached"] for name, f in zip(names, failed)},
        "equals_max": {name: f["equals_max"] for name, f in zip(names, failed)},
        "boundary_iou": _means([trace.boundary_ious for trace in traces]),
        "thin_recall": _means([trace.thin_recall for trace in traces]),
    }


def _means(tables: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for key in tables[0]:
        values = [table[key] for table in tables if table.get(key) is not None]
        found[key] = float(np.mean(values)) if values else None
    return found


def seeded(protocol: Protocol, seed: int) -> Protocol:
    """The protocol with ties drawn from ``seed``."""
    return replace(protocol, ties="seeded", seed=seed)
