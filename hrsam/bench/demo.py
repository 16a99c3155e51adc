"""``hrsam bench demo``: how long a click takes through the click page's server, and the drills that it must stand."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from hrsam import weights
from hrsam.bench import models
from hrsam.bench.gate import BenchError
from hrsam.bench.record import Record
from hrsam.bench.timing import summary

MODELS, SIDE = ("hrsam_pp_t.starter",), 4096
SERVED, ALONE = "click to mask, through the server", "the same without a server"


def bench_demo(
    *,
    device: torch.device,
    sides: Sequence[int] = (),
    presets: Sequence[str] = (),
    quick: bool = False,
    seconds: float = 10.0,
) -> dict[str, Any]:
    """Latency on pictures of ``sides`` pixels at a model side of 1024, then load, races, kills and attacks.

    ``presets``: trained models by tag or file, or architectures, which get random weights, and so masks without an object.
    Raises ``ValueError`` when the extra ``demo`` is missing and ``BenchError`` when a mask is wrong or a drill is not stood.
    """
    if any(find_spec(name) is None for name in ("fastapi", "uvicorn", "websockets")):
        raise ValueError("the benchmark demo needs the click page; run: pip install 'hrsam[demo]'")
    record = Record("demo", device, quick=quick, seconds=seconds)
    sizes = {}
    for preset in presets or MODELS:
        for side in sides or ((256,) if quick else (SIDE,)):
            sizes[f"{preset} {side}"] = _click(record, preset, side, device, quick)
    return record.done(bytes_of_a_mask=sizes, **_drills(quick))


def _click(record: Record, preset: str, side: int, device: torch.device, quick: bool) -> dict[str, float]:
    """Time clicks on one picture; bytes of the masks that were sent, median and largest."""
    from hrsam.bench.page_client import Client, serving
    from hrsam.cutting import Cutting
    from hrsam.demo.messages import draw
    from hrsam.demo.site import Site
    from hrsam.images import write_png
    from hrsam.pyramid import open_pyramid

    if quick or "." not in preset:
        model, width = models.random_model(preset.split(".")[0], device, quick), 128 if quick else 1024
    else:
        model, width = weights.load(preset, device), 1024
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "picture.png"
        write_png(path, picture(side))
        site = Site(model, preset, [path], Path(temporary) / "state", side=width)
        cutting = Cutting(model, open_pyramid(path), width)
        cutting.encode()
        rng = np.random.default_rng(models.SEED)
        times: dict[str, list[float]] = {SERVED: [], ALONE: []}
        sent: list[int] = []
        with serving(site) as url:
            tab = Client(url)
            tab = tab.open(tab.desk())
            end = time.perf_counter() + record.seconds
            while time.perf_counter() < end or len(times[SERVED]) < 5:
                x, y = rng.uniform(0, side - 1, 2)
                command = {"do": "click", "object": 1, "x": float(x), "y": float(y), "positive": True}
                started = time.perf_counter()
                _, served = tab.do(**command)
                answered = time.perf_counter()
                cutting.apply(command)
                alone = draw(cutting.objects[1], 0, site.limits.mask_side, site.limits.mask_bytes)[1]
                done = time.perf_counter()
                times[SERVED].append(1000 * (answered - started))
                times[ALONE].append(1000 * (done - answered))
                if served != alone:
                    raise BenchError(f"{preset} {side}: the server's mask is another one; no speed is shown for it")
                sent.append(len(served))
                tab.do(do="clear", object=1)
                cutting.apply({"do": "clear", "object": 1})
            tab.close()
    same = torch.ones(1)
    record.gate.check(f"{preset} {side}: {len(times[SERVED])} masks, to the byte", same, same.double(), same)
    found = {name: summary(values) for name, values in times.items()}
    record.add({"preset": preset, "picture": side}, found, baselines=(ALONE,))
    return {"median": statistics.median(sent), "largest": max(sent)}


def picture(side: int) -> np.ndarray:
    """(side, side, 3) uint8: the middle of the bundled photograph, enlarged."""
    from hrsam.demo.tour import PHOTO

    photo = Image.open(PHOTO)
    left = (photo.width - photo.height) // 2
    square = photo.crop((left, 0, left + photo.height, photo.height))
    return np.asarray(square.resize((side, side), Image.Resampling.BICUBIC))


def _drills(quick: bool) -> dict[str, Any]:
    from hrsam.bench.attacks import attacks
    from hrsam.bench.drills import kills, load, races

    found = {
        "load": asdict(load(2, 2, laps=3) if quick else load(50, 20, laps=6)),
        "races": asdict(races(2 if quick else 2000)),
        "kills": asdict(kills(1 if quick else 200)),
        "attacks": asdict(attacks(every=40 if quick else 1)),
    }
    wrong = {
        "errors under load": found["load"]["errors"],
        "wrong masks under load": found["load"]["mismatches"],
        "races that equal no serial order": found["races"]["wrong"],
        "acknowledged clicks lost by kills": found["kills"]["lost"],
        "wrong masks after kills": found["kills"]["wrong_masks"],
        "unreadable journals": found["kills"]["unreadable"],
        "attacks that got through": len(found["attacks"]["broken"]),
        "servers that died of attacks": int(not found["attacks"]["alive"]),
    }
    if any(wrong.values()):
        raise BenchError("; ".join(f"{name}: {count}" for name, count in wrong.items() if count))
    for name, value in found["load"].items():
        found["load"][name] = float(f"{value:.4g}") if isinstance(value, float) else value
    return found
