"""``hrsam demo``: cut the bundled photograph with a few clicks of the simulated user and show how good each mask is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hrsam.clicks import Click, next_click
from hrsam.images import read_image, read_mask, write_png
from hrsam.metrics import iou
from hrsam.models.model import HRSAM
from hrsam.overlay import overlay
from hrsam.session import Session

HERE = Path(__file__).parent
PHOTO, TRUTH = HERE / "coffee.jpg", HERE / "coffee_truth.png"


def tour(model: HRSAM, out: Path, clicks: int = 5, side: int = 1024, say: Callable[[str], None] = print) -> list[float]:
    """Play ``clicks`` rounds on the bundled photograph; returns the IoU after each and writes ``out`` (PNG overlay)."""
    pixels, truth = read_image(PHOTO).pixels, read_mask(TRUTH)
    session = Session(model, side)
    picture = session.set_image(pixels)
    size = f"{pixels.shape[1]}x{pixels.shape[0]}"
    say(f"encoded {size} pixels at side {side} in {picture.seconds:.2f} s on {model.device}")
    placed: list[Click] = []
    scores: list[float] = []
    for number in range(1, clicks + 1):
        click = next_click(truth, session.mask, placed)
        if click is None:
            break
        placed.append(click)
        prediction = session.click(click.x, click.y, click.positive)
        scores.append(float(iou(prediction.mask, truth)))
        sign = "+" if click.positive else "−"
        say(
            f"click {number}  {sign} ({click.x:.0f}, {click.y:.0f})   IoU {scores[-1]:.3f}   "
            f"model's own estimate {prediction.iou:.3f}   {1000 * prediction.seconds:.0f} ms"
        )
    write_png(out, overlay(pixels, session.mask, placed))
    say(f"overlay: {out}")
    return scores
