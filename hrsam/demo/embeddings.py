"""Encoded pictures that the desks of a server share."""

from __future__ import annotations

from collections import OrderedDict

from hrsam.session import EncodedPicture


class Embeddings:
    """Encoded pictures shared by all desks, the least recently used dropped beyond ``most`` bytes."""

    def __init__(self, most: int):
        self._most = most
        self._kept: OrderedDict[tuple[str, int], EncodedPicture] = OrderedDict()

    def __contains__(self, key: tuple[str, int]) -> bool:
        return key in self._kept

    def get(self, key: tuple[str, int]) -> EncodedPicture | None:
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def put(self, key: tuple[str, int], picture: EncodedPicture) -> None:
        self._kept[key] = picture
        self._kept.move_to_end(key)
        while len(self._kept) > 1 and sum(map(size_of, self._kept.values())) > self._most:
            self._kept.popitem(last=False)

    def drop(self) -> None:
        self._kept.clear()


def size_of(picture: EncodedPicture) -> int:
    """Bytes of its embedding."""
    return picture.embedding.features.nbytes + picture.embedding.positions.nbytes
