"""Pictures of different sizes in one step: which go into a pack, which to a device, and what each counts in the loss.

A pack is what goes through the encoder at once, as many pictures as its tokens allow; nothing is padded to the largest.  All
functions are of plain numbers: the same pictures give the same packs on every device.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

Reduction = Literal["image", "token", "pixel", "object"]


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: the longest first, each into the fullest pack that still holds it.

    ``lengths`` at least 1, in tokens -> indices of each pack, every one once.  A pack holds at most ``capacity`` tokens; what
    is longer is a pack by itself, since pictures are not cut.  Raises ``ValueError`` for a length or capacity below 1.
    Source: Johnson, "Near-optimal bin packing algorithms" (1973): at most 11/9 of the fewest packs, and one.
    """
    if capacity < 1 or min(lengths, default=1) < 1:
        raise ValueError(f"got capacity {capacity} and a shortest length of {min(lengths, default=1)}; give at least 1")
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, pack), sorted
    for index in _descending(lengths):
        length = lengths[index]
        place = bisect_left(room, (length, -1))
        if place < len(room):
            left, pack = room.pop(place)
        else:
            left, pack = capacity, len(packs)
            packs.append([])
        packs[pack].append(index)
        if left > length:
            insort(room, (left - length, pack))
    return packs


def longest_first(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Longest processing time first: the costliest picture goes to the rank with the least work so far.

    ``costs`` of pictures in any unit -> indices for each of the ``ranks``, ascending.  Equal loads go to the lower rank.
    Raises ``ValueError`` for less than one rank.
    Source: Graham, "Bounds on multiprocessing timing anomalies" (1969): at most 4/3 of the least possible maximum.
    """
    if ranks < 1:
        raise ValueError(f"got {ranks} ranks; give at least 1")
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0.0, rank) for rank in range(ranks)]  # equal, hence a heap
    for index in _descending(costs):
        load, rank = loads[0]
        shares[rank].append(index)
        heapq.heapreplace(loads, (load + costs[index], rank))
    return [sorted(share) for share in shares]


def _descending(values: Sequence[float]) -> list[int]:
    return sorted(range(len(values)), key=lambda index: (-values[index], index))


# ---------------------------------------------------------------- what counts how much


class Counts(NamedTuple):
    """Of one picture: objects that have a loss, tokens of its own grid, its pixels without padding."""

    objects: int
    tokens: int
    pixels: int


UNITS: dict[Reduction, Callable[[Counts], float]] = {
    "image": lambda picture: 1 / picture.objects,
    "object": lambda picture: 1.0,
    "token": lambda picture: float(picture.tokens),
    "pixel": lambda picture: float(picture.pixels),
}
"""What each object's loss, itself a mean over its picture, counts before division by the step's total.

``image``: every picture the same, shared by its objects; ``object``: every object the same; ``token``, ``pixel``: by size.
"""


def loss_total(reduction: Reduction, pictures: Sequence[Counts]) -> float:
    """The denominator's part of these pictures; add it up over all packs of all processes of a step."""
    return sum(picture.objects * UNITS[reduction](picture) for picture in pictures)


def loss_weights(reduction: Reduction, pictures: Sequence[Counts], total: float, ranks: int = 1) -> list[float]:
    """For each picture what to multiply the loss of each of its objects by, see :func:`hrsam.losses.weighted_sum`.

    ``total``: :func:`loss_total` of the whole step, never of a pack, so that a step may be cut into packs and shared among
    processes in any way; ``ranks``: number of processes where gradients are averaged over them, 1 where they are added.
    """
    return [ranks * UNITS[reduction](picture) / total for picture in pictures]
