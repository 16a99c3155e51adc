"""Time the cycle scan on a GPU, forward and backward, after checking it: python tools/bench_scan.py [--width 192]."""

import argparse
import json

import torch

from hrsam.layout import Layout
from hrsam.ops.cycle_scan import cycle_scan

LAYOUTS = {
    "10 x (64x64 + 32x32)": Layout(((64, 64), (32, 32)) * 10, tuple(i // 2 for i in range(20))),
    "120 x (16x16 + 12x16)": Layout(((16, 16), (12, 16)) * 120, tuple(i // 2 for i in range(240))),
    "1 x (256x256 + 32x32)": Layout(((256, 256), (32, 32)), (0, 0)),
}


def inputs(layout, width, dtype, states=32, cycles=3):
    g = torch.Generator("cuda").manual_seed(0)

    def draw(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=g, device="cuda").to(dtype)

    tokens = layout.tokens
    projected = draw(tokens, width + 2 * states, dtype=dtype)
    r, B, C = projected.split((width, states, states), dim=1)
    A_log = torch.log(torch.arange(1.0, states + 1, device="cuda")).repeat(width, 1)
    tensors = draw(tokens, width, dtype=dtype), r, draw(width) - 4, A_log, B, C, draw(width), draw(width, cycles)
    return [t.detach().requires_grad_() for t in tensors]


def milliseconds(function, repeats=20):
    for _ in range(3):
        function()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats


def measure(layout, width):
    x = inputs(layout, width, torch.bfloat16)
    y = cycle_scan(*x, layout, across=True, impl="triton")
    w = torch.randn_like(y)
    with torch.no_grad():
        error = (y - cycle_scan(*x, layout, across=True, impl="torch")).abs().max() / y.abs().max()
        forward = milliseconds(lambda: cycle_scan(*x, layout, across=True, impl="triton"))
    backward = milliseconds(lambda: torch.autograd.grad(y, x, w, retain_graph=True))
    return {"relative_error": error.item(), "forward_ms": round(forward, 3), "backward_ms": round(backward, 3)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=192)
    width = parser.parse_args().width
    for name, layout in LAYOUTS.items():
        print(json.dumps({"layout": name, "tokens": layout.tokens, "width": width, **measure(layout, width)}))
