"""SAM's predictor, so that code written for ``segment_anything.SamPredictor`` runs by changing the import."""

from __future__ import annotations

import numpy as np
import torch

from hrsam.clicks import Click
from hrsam.models.model import HRSAM, Embedding
from hrsam.session import EncodedPicture, encode_picture, predict_masks


class Predictor:
    """``set_image`` once, ``predict`` as often as you like.

    ``side``: longest side of the model's input in pixels (SAM's is 1024).  Differences to SAM: a click on pixel (x, y)
    means its centre at every scale; ``set_image`` returns the embedding; low-resolution logits have the embedding's
    size × 4.
    """

    def __init__(self, model: HRSAM, side: int = 1024):
        self.model = model
        self.side = side
        self._picture: EncodedPicture | None = None

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def is_image_set(self) -> bool:
        return self._picture is not None

    def set_image(self, image: np.ndarray, image_format: str = "RGB") -> Embedding:
        """``image`` (H, W, 3) uint8, ``image_format`` "RGB" or "BGR".  Returns the immutable embedding."""
        if image_format not in ("RGB", "BGR"):
            raise ValueError(f"image_format must be 'RGB' or 'BGR'; got {image_format!r}")
        if image_format == "BGR" and isinstance(image, np.ndarray) and image.ndim == 3:
            image = np.ascontiguousarray(image[:, :, ::-1])
        self._picture = encode_picture(self.model, image, self.side)
        return self._picture.embedding

    def reset_image(self) -> None:
        self._picture = None

    def get_image_embedding(self) -> torch.Tensor:
        """(1, 256, h, w)."""
        return self._current().embedding.features

    def predict(
        self,
        point_coords: np.ndarray | None = None,
        point_labels: np.ndarray | None = None,
        box: np.ndarray | None = None,
        mask_input: np.ndarray | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Masks for one prompt.

        ``point_coords`` (N, 2) x, y in original pixels, ``point_labels`` (N,) 1 object, 0 background; ``box`` (4,) x0,
        y0, x1, y1; ``mask_input`` (1, 4h, 4w) logits of an earlier call.  ``multimask_output``: three guesses instead
        of one.
        Returns masks (M, H, W) bool (float32 logits with ``return_logits``), predicted IoU (M,) and logits (M, 4h, 4w).
        Raises ``ValueError`` for an empty prompt, coordinates outside the picture, shapes that do not fit.
        """
        picture = self._current()
        clicks = _clicks(point_coords, point_labels)
        previous = None
        if mask_input is not None:
            grid = tuple(4 * n for n in picture.embedding.grid)
            previous = torch.as_tensor(np.asarray(mask_input, dtype=np.float32)).reshape(-1, *np.shape(mask_input)[-2:])
            if previous.shape != (1, *grid):
                raise ValueError(f"mask_input must be (1, {grid[0]}, {grid[1]}) logits; got {np.shape(mask_input)}")
            previous = previous[0]
        corners = None if box is None else tuple(np.asarray(box, dtype=np.float64).reshape(-1).tolist())
        out = predict_masks(
            self.model, picture, clicks, corners, previous, masks=(1, 2, 3) if multimask_output else (0,)
        )
        masks = np.stack([p.logits if return_logits else p.mask for p in out])
        scores = np.array([p.iou for p in out], dtype=np.float32)
        return masks, scores, torch.stack([p.low_res for p in out]).cpu().numpy()

    def _current(self) -> EncodedPicture:
        if self._picture is None:
            raise ValueError("no picture is set; call set_image before predict")
        return self._picture


def _clicks(coords: np.ndarray | None, labels: np.ndarray | None) -> list[Click]:
    if coords is None:
        if labels is not None:
            raise ValueError("point_labels came without point_coords; give both")
        return []
    coords = np.asarray(coords, dtype=np.float64)
    if coords.ndim != 2 or coords.shape[1] != 2:
        raise ValueError(f"point_coords must be (N, 2) x, y; got shape {coords.shape}")
    labels = np.asarray([] if labels is None else labels)
    if labels.shape != (len(coords),):
        raise ValueError(
            f"point_labels must hold one label for each of the {len(coords)} points; got shape {labels.shape}"
        )
    return [Click(float(x), float(y), label) for (x, y), label in zip(coords, labels.tolist())]
