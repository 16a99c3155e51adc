"""Where a training step's time goes on a CUDA device: wall and kernel time a step, the shares of canvases and simulated user,
and the costliest kernels, as JSON.

python tools/profile_train.py --data train/part1 --side 384 --batch 64 --compile encoder --out profile.json
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from hrsam.bench.timing import machine
from hrsam.data.bank import PhotoBank
from hrsam.data.transforms import make_batch
from hrsam.models.presets import build
from hrsam.optim import Phase, build_optimizer
from hrsam.rollout import ClickRollout, compile_parts
from hrsam.train import TrainSettings, graph_encoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--preset", default="hrsam_pp_t")
    parser.add_argument("--side", type=int, default=384)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--compile", choices=["none", "encoder", "all"], default="encoder")
    parser.add_argument("--no-graphs", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = torch.device("cuda")
    phase = Phase(side=args.side, batch=args.batch, steps=1000, lr=1e-3)
    settings = TrainSettings(preset=args.preset, data=tuple(map(str, args.data)), out="", phases=(phase,))
    bank = PhotoBank.load(args.data).to(device)
    model = build(args.preset).to(device).train()
    rollout, optimizer = ClickRollout(model, settings.rounds), build_optimizer(model, settings)
    torch.backends.cuda.enable_cudnn_sdp(False)
    started = time.perf_counter()
    if args.compile != "none":
        compile_parts(decoder=args.compile == "all")
    rollout.set_side(args.side)
    if not args.no_graphs:
        graph_encoder(model, phase)
    generator = torch.Generator(device)

    def step(number: int) -> None:
        generator.manual_seed(number)
        batch = make_batch(bank, args.batch, args.side, generator, settings.canvas)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss, _ = rollout(batch.pixels, batch.truth, generator, random.Random(number))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def timed(run, count: int) -> float:
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for number in range(count):
            run(number)
        torch.cuda.synchronize()
        return round(1000 * (time.perf_counter() - begun) / count, 2)

    timed(step, 10)
    options = {name: value for name, value in vars(args).items() if name not in ("data", "out")}
    report = {**machine(device), "command": shlex.join(["python", *sys.argv]), **options, "photos": len(bank)}
    report |= {"prepare_s": round(time.perf_counter() - started, 1), "step_ms": timed(step, 10)}
    report["user_ms"] = user_time(rollout, step, 10)
    report["batch_ms"] = timed(lambda n: make_batch(bank, args.batch, args.side, generator, settings.canvas), 5)
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        timed(step, 3)
    rows = [(e.key, e.self_device_time_total / 3000, e.count / 3) for e in recorded.key_averages()]
    rows.sort(key=lambda row: -row[1])
    report["kernel_ms"], report["kernels"] = round(sum(r[1] for r in rows), 2), round(sum(r[2] for r in rows))
    report["costliest"] = [{"name": n[:100], "ms": round(ms, 2), "calls": round(c, 1)} for n, ms, c in rows[:20]]
    report["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    print(json.dumps(report, indent=1))
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


def user_time(rollout: ClickRollout, step: Callable[[int], None], count: int) -> float:
    """Milliseconds a step between the beginning and the end of the simulated user's kernels."""
    pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    plays = {name: getattr(rollout, name) for name in ("_start", "_next")}
    inside = False

    def watched(play: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            nonlocal inside
            if inside:  # the first click is the next click of an empty mask
                return play(*arguments)
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            pairs.append(pair)
            inside = True
            pair[0].record()
            try:
                return play(*arguments)
            finally:
                pair[1].record()
                inside = False

        return call

    for name, play in plays.items():
        setattr(rollout, name, watched(play))
    for number in range(count):
        step(number)
    torch.cuda.synchronize()
    for name in plays:
        delattr(rollout, name)
    return round(sum(begin.elapsed_time(end) for begin, end in pairs) / count, 2)


if __name__ == "__main__":
    main()
