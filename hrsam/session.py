"""One picture and its rounds of clicks.

A :class:`Round` is immutable and holds its own result, and a :class:`History` is immutable too: undo and redo compute
nothing, and what was refused has changed nothing.  The model is given and never changed; many sessions may share it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from hrsam.clicks import Click, check_clicks
from hrsam.frame import Frame
from hrsam.mask import Mask
from hrsam.models.model import HRSAM, Embedding

Box = tuple[float, float, float, float]
GIVEN_LOGIT = 8.0  # how sure a given mask is, in logits


@dataclass(frozen=True, eq=False)
class EncodedPicture:
    """A picture after the encoder: geometry, embedding and the seconds it took."""

    frame: Frame
    embedding: Embedding
    seconds: float


@dataclass(frozen=True, eq=False)
class Prediction:
    """A mask.  ``low_res`` (4h, 4w) float32 logits in the model's frame; ``iou`` the model's own estimate, 0–1."""

    frame: Frame
    low_res: Tensor
    iou: float
    seconds: float

    @cached_property
    def mask(self) -> np.ndarray:
        """(H, W) bool at the original size, read-only: logits above 0."""
        return _read_only(self.frame.mask_to_original(self.low_res))

    @cached_property
    def runs(self) -> Mask:
        """:attr:`mask` as run lengths, made without the array."""
        frame, rows = self.frame, self.frame.rows_above(self.low_res)
        bands = frame.bands(self.low_res, rows)
        return Mask.scan(frame.height, frame.width, ((rows[some.start], band > 0) for some, band in bands))

    @cached_property
    def logits(self) -> np.ndarray:
        """(H, W) float32 at the original size, read-only."""
        return _read_only(self.frame.logits_to_original(self.low_res).numpy())


@dataclass(frozen=True, eq=False)
class Round:
    """Everything that was asked so far, and the answer.  ``given``: the mask that counts instead of the prediction's."""

    clicks: tuple[Click, ...]
    box: Box | None
    prediction: Prediction
    given: Mask | None = None

    @property
    def mask(self) -> np.ndarray:
        """(H, W) bool at the original size, read-only."""
        return self.prediction.mask if self.given is None else self._given

    @cached_property
    def _given(self) -> np.ndarray:
        assert self.given is not None
        return _read_only(self.given.array())

    @property
    def runs(self) -> Mask:
        """:attr:`mask` as run lengths."""
        return self.prediction.runs if self.given is None else self.given


@dataclass(frozen=True, eq=False)
class History:
    """The rounds of one object, oldest first, and those taken back, the last one first to come back.

    What changes it returns the history that is then.
    """

    rounds: tuple[Round, ...] = ()
    undone: tuple[Round, ...] = ()

    @property
    def last(self) -> Round | None:
        return self.rounds[-1] if self.rounds else None

    def then(self, round: Round) -> History:
        return History((*self.rounds, round))

    def undo(self) -> History:
        """Without the last round; ``ValueError`` when there is none."""
        if not self.rounds:
            raise ValueError("there is nothing to undo")
        return History(self.rounds[:-1], (*self.undone, self.rounds[-1]))

    def redo(self) -> History:
        """With the round undone last; ``ValueError`` when there is none."""
        if not self.undone:
            raise ValueError("there is nothing to redo")
        return History((*self.rounds, self.undone[-1]), self.undone[:-1])

    def click(self, model: HRSAM, picture: EncodedPicture, click: Click) -> History:
        """Decode all clicks so far and this one, the box, and the logits before."""
        clicks, box, previous = self._prompt()
        return self._play(model, picture, (*clicks, click), box, previous)

    def box(self, model: HRSAM, picture: EncodedPicture, box: Box) -> History:
        """As :meth:`click`, with a box that replaces an earlier one."""
        clicks, _, previous = self._prompt()
        return self._play(model, picture, clicks, check_box(box, picture.frame.height, picture.frame.width), previous)

    def start_from(self, frame: Frame, mask: Mask) -> History:
        """Go on from a given mask; the next click improves it."""
        clicks, box, _ = self._prompt()
        low_res = frame.mask_to_logits(mask.sample(2 * frame.side), GIVEN_LOGIT)
        return self.then(Round(clicks, box, Prediction(frame, low_res, float("nan"), 0.0), given=mask))

    def _prompt(self) -> tuple[tuple[Click, ...], Box | None, Tensor | None]:
        if self.last is None:
            return (), None, None
        return self.last.clicks, self.last.box, self.last.prediction.low_res

    def _play(
        self,
        model: HRSAM,
        picture: EncodedPicture,
        clicks: tuple[Click, ...],
        box: Box | None,
        previous: Tensor | None,
    ) -> History:
        return self.then(Round(clicks, box, predict_masks(model, picture, clicks, box, previous)[0]))


def encode_picture(
    model: HRSAM, pixels: np.ndarray, side: int = 1024, size: tuple[int, int] | None = None
) -> EncodedPicture:
    """Encode ``pixels`` (H, W, 3) uint8 RGB with its longest side resized to ``side`` model pixels, padded to a square.

    ``size``: height and width of the original when ``pixels`` are what became of it at :attr:`Frame.resized`.
    Raises ``ValueError`` for anything else.
    """
    if not isinstance(pixels, np.ndarray) or pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        what = f"{pixels.dtype} {pixels.shape}" if isinstance(pixels, np.ndarray) else type(pixels).__name__
        raise ValueError(f"a picture is an (H, W, 3) uint8 RGB array; got {what}: read files with hrsam.read_image")
    started = time.perf_counter()
    height, width = size or pixels.shape[:2]
    frame = Frame(height, width, side)
    config = model.config
    ready = frame.prepare(pixels, config.mean, config.std, bgr=config.bgr, device=model.device)
    embedding = model.encode_normalised([ready])[0]
    _wait(model.device)
    return EncodedPicture(frame, embedding, time.perf_counter() - started)


@torch.no_grad()
def predict_masks(
    model: HRSAM,
    picture: EncodedPicture,
    clicks: Sequence[Click] = (),
    box: Box | None = None,
    previous: Tensor | None = None,
    masks: Sequence[int] = (0,),
) -> list[Prediction]:
    """Decode one prompt.

    ``clicks`` and ``box`` (x0, y0, x1, y1) in original pixels; ``previous`` (4h, 4w) logits; ``masks`` as in
    :meth:`HRSAM.decode`.  Raises ``ValueError`` for prompts outside the picture or an empty prompt.
    """
    started = time.perf_counter()
    frame, device = picture.frame, model.device
    check_clicks(clicks, frame.height, frame.width)
    points = frame.to_model(torch.tensor([[c.x, c.y] for c in clicks], dtype=torch.float64).reshape(-1, 2))
    labels = torch.tensor([[int(c.positive) for c in clicks]], dtype=torch.int64, device=device).reshape(1, -1)
    corners = None
    if box is not None:
        corners = frame.to_model(torch.tensor(check_box(box, frame.height, frame.width)).view(2, 2))
        corners = corners.float().to(device).view(1, 4)
    out = model.decode(
        picture.embedding,
        points.float().to(device).unsqueeze(0),
        labels,
        corners,
        None if previous is None else previous.to(device).view(1, 1, *previous.shape[-2:]),
        masks,
    )
    logits, scores = out.logits[0].float(), out.iou[0].float().clamp(0, 1).tolist()
    _wait(device)
    seconds = time.perf_counter() - started
    return [Prediction(frame, low, score, seconds) for low, score in zip(logits, scores)]


def check_box(box: Sequence[float], height: int, width: int) -> Box:
    """``box`` as (x0, y0, x1, y1) cut to the picture; ``ValueError`` when it is not finite, not ordered or outside."""
    if len(box) != 4 or not all(np.isfinite(box)):
        raise ValueError(f"a box is four finite numbers x0, y0, x1, y1 in pixels; got {tuple(box)}")
    x0, y0, x1, y1 = (float(v) for v in box)
    if x0 >= x1 or y0 >= y1:
        raise ValueError(f"a box needs x0 < x1 and y0 < y1; got {x0:g}, {y0:g}, {x1:g}, {y1:g}")
    cut = (max(x0, -0.5), max(y0, -0.5), min(x1, width - 0.5), min(y1, height - 0.5))
    if cut[0] >= cut[2] or cut[1] >= cut[3]:
        raise ValueError(f"the box {x0:g}, {y0:g}, {x1:g}, {y1:g} lies outside the picture of {width}x{height} pixels")
    return cut


def parse_box(text: str) -> Box:
    """``"X0,Y0,X1,Y1"`` as a box; ``ValueError`` with one sentence when it is not one."""
    try:
        x0, y0, x1, y1 = (float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"a box is X0,Y0,X1,Y1 in pixels, for instance 10,20,300,400; got {text!r}") from None
    return x0, y0, x1, y1


class Session:
    """Click on one picture: ``set_image``, then ``click``, ``box``, ``refine``, ``undo``, ``redo``.

    ``side``: longest side of the model's input in pixels, a larger one follows finer detail and costs more.
    """

    def __init__(self, model: HRSAM, side: int = 1024):
        self.model = model
        self.side = side
        self._picture: EncodedPicture | None = None
        self._history = History()

    def set_image(self, pixels: np.ndarray) -> EncodedPicture:
        """Encode ``pixels`` (H, W, 3) uint8 RGB and forget all rounds.  A refused picture changes nothing."""
        picture = encode_picture(self.model, pixels, self.side)
        return self.set_picture(picture)

    def set_picture(self, picture: EncodedPicture) -> EncodedPicture:
        """Go on with a picture that is encoded already."""
        self._picture, self._history = picture, History()
        return picture

    @property
    def picture(self) -> EncodedPicture:
        if self._picture is None:
            raise ValueError("no picture is set; call set_image first")
        return self._picture

    @property
    def rounds(self) -> tuple[Round, ...]:
        """The rounds played, oldest first; undone ones are not among them."""
        return self._history.rounds

    @property
    def mask(self) -> np.ndarray:
        """The mask of the last round, (H, W) bool; empty before the first."""
        frame, last = self.picture.frame, self._history.last
        return np.zeros((frame.height, frame.width), dtype=bool) if last is None else last.mask

    def click(self, x: float, y: float, positive: bool = True) -> Prediction:
        """Add a click at pixel (x, y) of the original picture: on the object or, ``positive=False``, beside it."""
        return self._played(self._history.click(self.model, self.picture, Click(x, y, positive)))

    def box(self, x0: float, y0: float, x1: float, y1: float) -> Prediction:
        """Draw a box around the object, corners in pixels of the original picture; it replaces an earlier box."""
        return self._played(self._history.box(self.model, self.picture, (x0, y0, x1, y1)))

    def refine(self, mask: np.ndarray) -> None:
        """Start from a given mask, (H, W) bool of the picture's size; the next click improves it."""
        frame = self.picture.frame
        mask = np.asarray(mask)
        if mask.shape != (frame.height, frame.width):
            raise ValueError(f"the mask must be {frame.height}x{frame.width} as the picture; got shape {mask.shape}")
        self._history = self._history.start_from(frame, Mask.of(mask.astype(bool)))

    def undo(self) -> Round | None:
        """Take back the last round; returns the one that counts now.  ``ValueError`` when there is none."""
        self._history = self._history.undo()
        return self._history.last

    def redo(self) -> Round:
        """Bring back the round undone last.  ``ValueError`` when there is none."""
        self._history = self._history.redo()
        return self._history.rounds[-1]

    def clear(self) -> None:
        """Forget all rounds; the picture stays."""
        self._history = History()

    def _played(self, history: History) -> Prediction:
        self._history = history
        return history.rounds[-1].prediction


def _read_only(array: np.ndarray) -> np.ndarray:
    array.setflags(write=False)  # a round keeps it
    return array


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
