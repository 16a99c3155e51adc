"""The click loop over a data set: how good is the mask after each click of the simulated user?"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from hrsam.clicks import Click, next_click
from hrsam.data.sample import Sample
from hrsam.metrics import failures, iou, mean_iou_after, noc
from hrsam.models.model import HRSAM
from hrsam.session import Session


@dataclass(frozen=True)
class Protocol:
    """Two numbers with different protocols are not comparable, so a report carries it.

    ``rule``: the simulated user of :func:`hrsam.clicks.next_click`; always ``clicks`` clicks, never stopped early; a
    mask is logits above 0 at the original size; logits of the round before are fed back.  ``seed``: for the rule that
    draws, with a stream of its own for each sample's name.
    """

    rule: str = "frozen"
    clicks: int = 20
    side: int = 1024
    seed: int = 0


@dataclass(frozen=True)
class Played:
    """One sample: IoU after each click, the clicks, seconds for encode, all decodes, and the simulated user."""

    name: str
    ious: tuple[float, ...]
    clicks: tuple[Click, ...]
    seconds: dict[str, float] = field(default_factory=dict)


def play(model: HRSAM, sample: Sample, protocol: Protocol) -> Played:
    """Play one sample.  When nothing is wrong any more no click is added and the IoU stays."""
    session = Session(model, protocol.side)
    rng = random.Random(f"{protocol.seed} {sample.name}")
    encode = session.set_image(sample.pixels).seconds
    ious: list[float] = []
    clicks: list[Click] = []
    decode = user = 0.0
    for _ in range(protocol.clicks):
        started = time.perf_counter()
        click = next_click(sample.mask, session.mask, clicks, rule=protocol.rule, rng=rng)
        user += time.perf_counter() - started
        if click is not None:
            clicks.append(click)
            prediction = session.click(click.x, click.y, click.positive)
            decode += prediction.seconds
        ious.append(float(iou(session.mask, sample.mask)))
    return Played(sample.name, tuple(ious), tuple(clicks), {"encode": encode, "decode": decode, "user": user})


def summary(played: Iterable[Played], thresholds: tuple[float, ...] = (0.80, 0.85, 0.90, 0.95)) -> dict[str, float]:
    """Mean IoU after 1, 3, 5, 10, 20 clicks, NoC (a sample never solved counts as the maximum) and how many were never
    solved, over all samples, which must have been played equally long."""
    played = list(played)
    if not played:
        raise ValueError("there are no samples to summarise; check the data set's folder")
    ious = np.array([p.ious for p in played])
    most = ious.shape[1]
    out: dict[str, float] = {"samples": len(played)}
    for k in (1, 3, 5, 10, 20):
        if k <= most:
            out[f"iou@{k}"] = round(mean_iou_after(ious, k), 4)
    for threshold in thresholds:
        out[f"noc@{round(100 * threshold)}"] = round(noc(ious, threshold, most), 3)
        out[f"never@{round(100 * threshold)}"] = failures(ious, threshold, most)["never_reached"]
    return out
