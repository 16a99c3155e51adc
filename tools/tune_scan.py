"""Where the constants of the scan's forward kernels come from: times of F1 and F3 over chunks, lanes, registers and forms of
B and C.

python tools/tune_scan.py --tokens 4096 16384 65536 --chunks 88 128 --lanes 32 64 --registers 0 254 --out FILE

``--beside FILE``: other versions of ``hrsam/kernels/cycle_scan_device.py`` to time in turn with it.  Every result is compared
with the first one of its chunks: ``off`` is the largest difference by the largest value, and more than ``--most`` is an error.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hrsam.bench.timing import compare, machine
from hrsam.kernels import cycle_scan_device, interpreting
from hrsam.kernels.cycle_scan import scan_tables

FORMS = {
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "bfloat16, B and C float32": (torch.bfloat16, torch.float32),
    "float32": (torch.float32, torch.float32),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[65536])
    parser.add_argument("--channels", type=int, default=768)
    parser.add_argument("--states", type=int, default=32)
    parser.add_argument("--chunks", type=int, nargs="+", default=[88, 128])
    parser.add_argument(
        "--registers", type=int, nargs="+", default=[0, 254], help="of a thread; 0: as the compiler likes"
    )
    parser.add_argument("--lanes", type=int, nargs="+", default=[32, 64], help="channels of a warp")
    parser.add_argument("--warps", type=int, nargs="+", default=[1], help="of a program")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--beside", type=Path, nargs="*", default=[])
    parser.add_argument("--most", type=float, default=1e-5)
    parser.add_argument("--seconds", type=float, default=0.1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    versions = {"ours": cycle_scan_device, **{path.stem: loaded(path) for path in args.beside}}
    rows: list[dict[str, Any]] = []
    for tokens, form, chunks in itertools.product(args.tokens, args.forms, args.chunks):
        inputs = drawn(tokens, args.channels, args.states, *FORMS[form], device)
        for name, outputs in (("F1", False), ("F3", True)):
            runs: dict[str, Callable[[], Tensor]] = {}
            for version, lanes, warps, registers in itertools.product(versions, args.lanes, args.warps, args.registers):
                runs[f"{version}, {warps} of {lanes} lanes, {registers or 'free'} registers"] = partial(
                    scan, versions[version], inputs, tokens, chunks, outputs, lanes, warps, registers or None
                )
            off: dict[str, float] = {}
            times = compare(runs, seconds=args.seconds, device=device, graphs=True, check=partial(differences, off))
            for called, time in times.items():
                rows.append({"tokens": tokens, "form": form, "chunks": chunks, "kernel": name, "how": called})
                rows[-1] |= {"us": round(1000 * time.median_ms, 1), "off": off[called]}
                print(", ".join(map(str, rows[-1].values())), flush=True)
                if not off[called] <= args.most:
                    raise SystemExit(f"{called} is off by {off[called]}, more than --most {args.most}")
    if args.out:
        args.out.write_text(json.dumps({**machine(device), "rows": rows}, indent=1) + "\n")


def loaded(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def drawn(tokens: int, channels: int, states: int, kind: torch.dtype, shared: torch.dtype, device: torch.device):
    """u, r, B, C as the encoder has them, r, B and C side by side; dt_bias, A_log, D and γ."""
    random = partial(torch.randn, generator=torch.Generator(device).manual_seed(0), device=device)
    u, projected = random(tokens, channels).to(kind), (random(tokens, channels + 2 * states) / 2).to(kind)
    r, B, C = projected.split((channels, states, states), 1)
    if shared != kind:
        B, C = torch.cat((B, C), 1).to(shared).split(states, 1)
    A_log = torch.arange(1.0, states + 1, device=device).log().repeat(channels, 1)
    one = torch.ones(channels, device=device)
    return u, r, B, C, random(channels) / 10 - 4, A_log, one, torch.ones(channels, 3, device=device)


def scan(
    program: Any,
    inputs: tuple[Tensor, ...],
    tokens: int,
    count: int,
    outputs: bool,
    lanes: int,
    warps: int,
    registers: int | None,
):
    """F1's states, or F3's outputs from states that are all one."""
    u, r, B, C, _, A_log, _, gamma = inputs
    (channels, states), device = A_log.shape, u.device
    chunks, _ = scan_tables((0, tokens), -(-tokens // count), device)
    entered = torch.ones(len(chunks), states, channels, device=device)
    elapsed, y = torch.empty(len(chunks), channels, device=device), torch.empty_like(u)
    program.scan_chunks[-(-channels // (lanes * warps)), len(chunks)](
        *inputs, chunks, entered, elapsed, y, u_row=u.stride(0), r_row=r.stride(0), B_row=B.stride(0), C_row=C.stride(0),
        channels=channels, N=states, R=gamma.shape[1], BC=lanes * warps, PACK=8 // B.element_size(), OUTPUTS=outputs,
        FETCH=outputs and not interpreting(), num_warps=warps, maxnreg=registers,
    )  # fmt: skip
    return y if outputs else entered


def differences(off: dict[str, float], results: dict[str, Tensor]) -> None:
    first = next(iter(results.values())).float()
    for name, result in results.items():
        off[name] = ((result.float() - first).abs().max() / first.abs().max()).item()


if __name__ == "__main__":
    main()
