"""Several samples in step on one device: the next click of each with one wait, and a stopwatch that does not wait.

A GPU is waited for when a number is fetched from it; here that happens once a round, however many samples are played.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hrsam.clicks import RULES, Click, check_clicks
from hrsam.ops.distance import squared_distance


def next_clicks(
    truths: Sequence[Tensor],
    masks: Sequence[Tensor],
    clicks: Sequence[Sequence[Click]],
    *,
    rule: str = "frozen",
    rngs: Sequence[random.Random | None],
    ignores: Sequence[Tensor | None],
) -> list[Click | None]:
    """:func:`hrsam.clicks.next_click`, which is the definition, for samples of any sizes on one device.

    ``truths``, ``masks`` (H, W) bool, of one size for each sample; ``rngs`` and ``ignores`` are None for a sample without.
    All answers are fetched with one transfer, with two where ties are drawn.  Raises ``ValueError`` for an unknown rule,
    ``hrsam`` without a generator, and clicks outside of their picture.
    """
    if rule not in RULES:
        raise ValueError(f"unknown click rule {rule!r}; choose one of {', '.join(RULES)}")
    if rule == "hrsam" and None in rngs:
        raise ValueError("the rule 'hrsam' draws among equals: give each sample a random.Random(seed)")
    if not truths:
        return []
    facts, maps = [], []
    for truth, mask, clicked, rng, ignore in zip(truths, masks, _on_device(truths, clicks), rngs, ignores):
        wrong = torch.stack((truth & ~mask, mask & ~truth))
        if ignore is not None:
            wrong &= ~ignore
        if rule != "ritm":
            wrong.flatten(1).index_fill_(1, clicked, False)
        squared = squared_distance(wrong).flatten(1)
        if rule == "ritm":
            squared.index_fill_(1, clicked, 0)
        depth, first = squared.max(1)  # of equals the first
        fact = [depth.long(), first]
        if rng is not None:
            fact.append((squared == depth.unsqueeze(1)).sum(1))
        facts.append(torch.cat(fact))
        maps.append(squared if rng is not None else None)
    found: list[Click | None] = []
    drawn: dict[int, Tensor] = {}
    for index, ((missed, extra, *rest), squared, rng) in enumerate(zip(_fetched(facts), maps, rngs)):
        if missed == extra == 0:
            found.append(Click(0, 0, positive=False) if rule == "ritm" else None)
            continue
        kind = 0 if missed > extra else 1
        found.append(_click(rest[kind], truths[index], kind == 0))
        if squared is not None and rng is not None:
            equals = (squared[kind] == max(missed, extra)).cumsum(0, dtype=torch.int32)
            drawn[index] = torch.searchsorted(equals, rng.randrange(rest[2 + kind]) + 1).view(1)
    for index, (pixel,) in zip(drawn, _fetched(list(drawn.values()))):
        first = found[index]
        assert first is not None
        found[index] = _click(pixel, truths[index], first.positive)
    return found


def _click(pixel: int, truth: Tensor, positive: bool) -> Click:
    row, col = divmod(pixel, truth.shape[1])
    return Click(col, row, positive)


def _on_device(truths: Sequence[Tensor], clicks: Sequence[Sequence[Click]]) -> Sequence[Tensor]:
    """The clicked pixels of each sample as indices into its flat picture, brought there with one transfer."""
    pixels = []
    for truth, made in zip(truths, clicks):
        check_clicks(made, *truth.shape)
        pixels += [int(click.y + 0.5) * truth.shape[1] + int(click.x + 0.5) for click in made]
    there = torch.tensor(pixels, dtype=torch.int64).to(truths[0].device, non_blocking=True)
    return there.split([len(made) for made in clicks])


def _fetched(facts: Sequence[Tensor]) -> list[list[int]]:
    """Rows of whole numbers of any lengths, with one transfer."""
    if not facts:
        return []
    flat = iter(torch.cat(list(facts)).tolist())
    return [[next(flat) for _ in range(len(row))] for row in facts]


def fetch_later(masks: Sequence[np.ndarray] | Sequence[Tensor]) -> Callable[[], list[np.ndarray]]:
    """Begin to fetch masks, of one device or NumPy; what is returned waits until they are here, if need be."""
    there = [mask for mask in masks if isinstance(mask, Tensor)]
    if not there:
        return lambda: [mask for mask in masks if isinstance(mask, np.ndarray)]
    here = [mask.to("cpu", non_blocking=True) for mask in there]
    done = torch.cuda.Event() if there[0].is_cuda else None
    if done is not None:
        done.record(torch.cuda.current_stream(there[0].device))

    def wait() -> list[np.ndarray]:
        if done is not None:
            done.synchronize()
        return [mask.numpy() for mask in here]

    return wait


class Stopwatch:
    """Seconds from lap to lap; those of a GPU by its own clock, so that nobody waits for it meanwhile.

    ``device``: where the work is done, None for NumPy.
    """

    def __init__(self, device: torch.device | None):
        self.device = device if device is not None and device.type == "cuda" else None
        self._laps: list[tuple[str, Sequence[dict[str, float]], Any, Any]] = []
        self.start()

    def start(self) -> None:
        """What was done since the last lap does not count."""
        self._since = self._now()

    def lap(self, what: str, among: Sequence[dict[str, float]]) -> None:
        """The time since the last lap or start was spent on ``what``, in equal shares for each of ``among``."""
        now = self._now()
        self._laps.append((what, among, self._since, now))
        self._since = now

    def stop(self) -> None:
        """Wait for the device and add the seconds to where they belong."""
        if self.device is not None:
            torch.cuda.synchronize(self.device)
        for what, among, begin, end in self._laps:
            seconds = end - begin if self.device is None else begin.elapsed_time(end) / 1000
            for spent in among:
                spent[what] += seconds / len(among)
        self._laps = []

    def _now(self) -> Any:
        if self.device is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event
