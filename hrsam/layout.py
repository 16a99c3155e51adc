"""Where each image's tokens sit in the packed sequence.

All tokens of all images and scales lie in one matrix ``(T, C)``.  A :class:`Layout` says whose they are; it holds numbers
only, so it is hashable and index tables can be cached by its value.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hrsam.tables import as_table, cached, to_device


@dataclass(frozen=True)
class Layout:
    """Token grids in packed order.

    ``grids``: ``(rows, cols)`` of each token grid, each at least 1×1.  Tokens of a grid are stored in raster order.
    ``images``: for each grid the index of the image it belongs to; grids of one image stand next to each other, image
    indices start at 0 and never decrease.  Raises ``ValueError`` when this is broken.
    """

    grids: tuple[tuple[int, int], ...]
    images: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.grids or len(self.grids) != len(self.images):
            raise ValueError(
                f"got {len(self.grids)} grids and {len(self.images)} image indices; give one image index for each grid"
            )
        for rows, cols in self.grids:
            if rows < 1 or cols < 1:
                raise ValueError(f"got a token grid of {rows}x{cols}; every grid needs at least one row and one column")
        if self.images[0] != 0 or any(b - a not in (0, 1) for a, b in zip(self.images, self.images[1:])):
            raise ValueError(f"image indices must be 0, 0, …, 1, 1, … without gaps; got {self.images}")

    @property
    def lengths(self) -> tuple[int, ...]:
        """Number of tokens of each grid."""
        return tuple(rows * cols for rows, cols in self.grids)

    @property
    def starts(self) -> tuple[int, ...]:
        """Packed index of each grid's first token, and ``tokens`` at the end."""
        starts = [0]
        for length in self.lengths:
            starts.append(starts[-1] + length)
        return tuple(starts)

    @property
    def tokens(self) -> int:
        """Length T of the packed sequence."""
        return self.starts[-1]

    @property
    def num_images(self) -> int:
        return self.images[-1] + 1

    @property
    def image_starts(self) -> tuple[int, ...]:
        """Packed index of each image's first token, and ``tokens`` at the end."""
        starts = self.starts
        first = [starts[g] for g, image in enumerate(self.images) if g == 0 or self.images[g - 1] != image]
        return (*first, starts[-1])

    def runs(self, merge: bool) -> tuple[tuple[int, int, tuple[tuple[int, int], ...]], ...]:
        """Each image, or with ``merge`` neighbouring images of equal grids together, as (first token, number of images,
        grids of one image)."""
        runs: list[tuple[int, int, tuple[tuple[int, int], ...]]] = []
        image_starts = self.image_starts
        for image in range(self.num_images):
            grids = tuple(g for g, owner in zip(self.grids, self.images) if owner == image)
            if merge and runs and runs[-1][2] == grids:
                runs[-1] = (runs[-1][0], runs[-1][1] + 1, grids)
            else:
                runs.append((image_starts[image], 1, grids))
        return tuple(runs)

    def boundaries(self, across: bool) -> tuple[int, ...]:
        """Where sequences begin: every grid by itself, or (``across``) all grids of an image as one sequence."""
        return self.image_starts if across else self.starts


@cached(256)
def boundaries_on(layout: Layout, across: bool, device: torch.device) -> torch.Tensor:
    """:meth:`Layout.boundaries` as an int32 tensor of length sequences + 1 on ``device``."""
    return to_device([as_table(layout.boundaries(across))], device)[0]


@cached(256)
def token_images(layout: Layout, device: torch.device) -> torch.Tensor:
    """Image index of every token, int64 ``(T,)``."""
    images, lengths = to_device([as_table(layout.images), as_table(layout.lengths)], device)
    return torch.repeat_interleave(images.long(), lengths, output_size=layout.tokens)
