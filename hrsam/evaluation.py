"""The simulated user's game: click on what is wrong, look at the new mask, twenty times; and what is said about it.

Several samples can be played in step, which suits a GPU; one sample is a batch of one.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any

import numpy as np
import torch

from hrsam import rle
from hrsam.clicks import RULES, Click, next_click
from hrsam.data.sample import Sample
from hrsam.lockstep import Stopwatch, fetch_later, next_clicks
from hrsam.metrics import boundary_iou, failures, iou, mean_iou_after, noc, thin_part
from hrsam.segmenters import BatchSegmenter, Segmenter, together
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


class _Game:
    """One sample and what was played of it."""

    def __init__(self, sample: Sample, protocol: Protocol, given: Trace | None, device: torch.device | None):
        if given is not None and (given.size != sample.mask.shape or len(given.clicks) < protocol.clicks):
            raise ValueError(
                f"the trace of {sample.name} has {len(given.clicks)} steps on {given.size}, the sample is "
                f"{sample.mask.shape} and the protocol {protocol.clicks} clicks; give the traces of this data set and "
                "protocol"
            )

        def placed(mask: np.ndarray) -> Any:
            return mask if device is None else torch.from_numpy(mask).to(device)

        self.sample, self.given = sample, given
        self.rng = random.Random(f"{protocol.seed} {sample.name}") if protocol.ties == "seeded" else None
        self.seen_here = np.ones_like(sample.mask) if sample.ignore is None else ~sample.ignore
        self.truth_here = sample.mask & self.seen_here
        self.thin = thin_part(self.truth_here)
        self.truth, self.seen = placed(self.truth_here), placed(self.seen_here)
        self.ignore = None if sample.ignore is None else ~self.seen
        self.mask: Any = self.truth & ~self.truth
        self.answer = np.zeros_like(sample.mask)
        self.made: list[Click] = []
        self.clicks: list[tuple[float, float, int] | None] = []
        self.ious: list[Any] = []
        self.hashes: list[str] = []
        self.boundary: dict[str, float] = {}
        self.recall: dict[str, float | None] = {}
        self.spent = {"encode": 0.0, "decode": 0.0, "user": 0.0, "metric": 0.0}

    def take(self, click: Click | None, rule: str) -> bool:
        """Take the click of this round, None when nothing is wrong; True if the answer is to be asked for."""
        self.clicks.append(None if click is None else (click.x, click.y, int(click.positive)))
        if click is not None:
            self.made.append(click)
        return click is not None or (rule == "hrsam" and bool(self.made))

    def note(self, answer: np.ndarray, last: bool) -> None:
        """Write down what is said of the next mask."""
        self.answer = answer
        self.hashes.append(mask_hash(answer))
        step = len(self.hashes)
        if step in LOOKED_AT or last:
            answer = answer & self.seen_here
            self.boundary[str(step)] = boundary_iou(answer, self.truth_here)
            self.recall[str(step)] = float((answer & self.thin).sum() / self.thin.sum()) if self.thin.any() else None

    def trace(self, ious: Sequence[float]) -> Trace:
        return Trace(
            self.sample.name,
            self.sample.dataset,
            (self.truth_here.shape[0], self.truth_here.shape[1]),
            int(self.truth_here.sum()),
            tuple(self.clicks),
            tuple(float(value) for value in ious),
            tuple(self.hashes),
            self.boundary,
            self.recall,
            rle.encode(self.answer),
            self.spent,
        )


def play(segmenter: Segmenter, sample: Sample, protocol: Protocol, given: Trace | None = None) -> Trace:
    """Play one sample; with ``given`` its clicks are made instead of the simulated user's.

    Seconds: ``metric`` is the IoU; boundary IoU, thin recall and hashes are not counted.
    Raises ``ValueError`` for a trace of another picture or with fewer steps than the protocol.
    """
    return play_together(segmenter, [sample], protocol, [given])[0]


def play_together(
    segmenter: Segmenter, samples: Sequence[Sample], protocol: Protocol, given: Sequence[Trace | None] | None = None
) -> list[Trace]:
    """:func:`play` for several samples in step; more than one needs a :class:`hrsam.segmenters.BatchSegmenter`.

    The samples of a round share its seconds equally.  On a GPU there is one wait a round, for the clicks (two where ties
    are drawn); hashes and boundary IoU of a round are made, in a thread a sample, while the GPU works on the next.
    """
    table = together(segmenter, len(samples))
    device = getattr(segmenter, "device", None)
    given = given or [None] * len(samples)
    with ThreadPoolExecutor(min(len(samples), os.cpu_count() or 1)) as pool:
        each = pool.map if device is not None and device.type == "cuda" else map
        games = list(each(lambda sample, trace: _Game(sample, protocol, trace, device), samples, given))
        ious = _rounds(table, games, protocol, device, each)
        return list(each(_Game.trace, games, ious))


def _rounds(
    table: BatchSegmenter,
    games: Sequence[_Game],
    protocol: Protocol,
    device: torch.device | None,
    each: Callable[..., Iterable[Any]],
) -> list[list[float]]:
    """Play all rounds; the IoUs of each sample after each."""
    everyone = [game.spent for game in games]
    watch = Stopwatch(device)
    table.start_all([game.sample.pixels for game in games])
    watch.lap("encode", everyone)
    answers: Callable[[], list[np.ndarray]] | None = None
    for step in range(protocol.clicks):
        watch.start()
        clicks = _next_clicks(games, protocol, step, device)
        watch.lap("user", everyone)
        asked = [game.take(click, protocol.rule) for game, click in zip(games, clicks)]
        if any(asked):
            masks = table.click_all([tuple(game.made) if ask else None for game, ask in zip(games, asked)])
            watch.lap("decode", [game.spent for game, ask in zip(games, asked) if ask])
            for game, mask in zip(games, masks):
                game.mask = game.mask if mask is None else mask
        if answers is not None:
            list(each(_Game.note, games, answers(), repeat(False)))
        watch.start()
        for game in games:
            game.ious.append(iou(game.mask & game.seen, game.truth))
        watch.lap("metric", everyone)
        answers = fetch_later([game.mask for game in games])
    assert answers is not None
    list(each(_Game.note, games, answers(), repeat(True)))
    watch.stop()
    ious = [game.ious for game in games]
    if device is not None:
        return torch.stack([torch.stack(row) for row in ious]).tolist()
    return ious


def _next_clicks(
    games: Sequence[_Game], protocol: Protocol, step: int, device: torch.device | None
) -> list[Click | None]:
    """The click of each sample in this round: the one given, or the simulated user's."""
    users = [game for game in games if game.given is None]
    if device is None:
        found = [next_click(g.truth, g.mask, g.made, rule=protocol.rule, rng=g.rng, ignore=g.ignore) for g in users]
    else:
        found = next_clicks(
            [game.truth for game in users],
            [game.mask for game in users],
            [game.made for game in users],
            rule=protocol.rule,
            rngs=[game.rng for game in users],
            ignores=[game.ignore for game in users],
        )
    placed = iter(found)
    return [next(placed) if game.given is None else game.given.click_at(step) for game in games]


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
