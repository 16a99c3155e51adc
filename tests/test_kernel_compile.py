"""Every kernel in every configuration compiles for sm_80 and sm_90 without a GPU, fits the card and keeps its values in
registers."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

# Interpreted kernels cannot be compiled, so this runs in a process of its own, without TRITON_INTERPRET.
CHILD = """
import json, pathlib, re, subprocess, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hrsam.kernels import attend as a, attend_device as p, attend_gradients as g, cycle_scan as s, distance as d

capability, folder, whole = int(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3] == "whole"
tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

def check(kernel, constants, types, default, warps, stages=1, note="", registers=None):
    signature = {n: "constexpr" if n in constants else types.get(n, default) for n in kernel.arg_names}
    source = ASTSource(
        kernel, signature, {n: constants[n] for n, t in signature.items() if t == "constexpr"},
        attrs={(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if signature[n].startswith("*")},
    )
    options = {"num_warps": warps, "num_stages": stages, "maxnreg": registers}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    found = {"kernel": kernel.__name__, "note": note, "shared": compiled.metadata.shared, "lanes": constants.get("BC")}
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    if tool.exists():
        usage = subprocess.check_output([tool, "--dump-resource-usage", cubin], text=True)
        found.update({resource: int(value) for resource, value in re.findall(r"\\\\b(REG|STACK):(\\\\d+)", usage)})
    if capability == 90:
        found["wgmma"] = "wgmma" in compiled.asm["ptx"]
    print("FOUND", json.dumps(found), flush=True)

def scan(token, pack):
    types = {n: "*" + token for n in ("w", "u", "r", "B", "C", "y", "d_u", "d_r")}
    types |= {"tokens": "i32", "chunks": "*i32", "first_chunk": "*i32"}
    sizes = {"N": 32, "NP": 32, "R": 3, "CHUNK": s.CHUNK, "AHEAD": s.CHAIN_AHEAD, "channels": 192, "PACK": pack}
    sizes |= {"u_row": 384, "r_row": 256, "B_row": 256, "C_row": 256, "w_row": 192}
    for kernel in (s.programs.chain_states, s.gradients.chain_adjoints):
        check(kernel, sizes | {"BC": s.CHAIN_LANES}, types, "*fp32", s.CHAIN_WARPS, note=token)
    for outputs in (False, True):
        lanes, registers = s.one_warp(outputs, 4 if token == "fp32" else 2)
        flags = {"BC": lanes, "OUTPUTS": outputs, "FETCH": outputs}
        check(s.programs.scan_chunks, sizes | flags, types, "*fp32", 1, note=token, registers=registers)
    check(s.programs.enter_chunks, sizes | {"BC": s.ENTER_LANES}, types, "*fp32", s.ENTER_WARPS, note=token)
    for kernel in (s.gradients.local_adjoints, s.gradients.gradients):
        check(kernel, sizes | {"BC": s.LANES}, types, "*fp32", 1, note=token)

INDEX = "q_tokens k_tokens q_places k_places q_labels k_labels full_ptr full_idx part_ptr part_idx groups".split()
def attend(dtype, D, **flags):
    note = f"{NAMES[dtype]} {D} {flags}"
    types = {n: "*" + NAMES[dtype] for n in "q k v pad_k pad_v out d_out d_k d_v d_q".split()}
    types |= {"turns": "*fp32" if dtype == torch.float32 else "*fp16"}
    types |= {n: "*i32" for n in INDEX} | {"scale": "fp32", "softmax_scale": "fp32"}
    heads = 12
    sizes = {"q_row": 3 * heads * D, "q_head": D, "k_row": 3 * heads * D, "k_head": D, "v_row": 3 * heads * D, "v_head": D}
    sizes |= {"heads": heads, "GROUP": 1, "D": D, "DP": D, "DV": D, "DVP": D}
    sizes |= {"PRECISION": "ieee" if dtype == torch.float32 else "tf32"}
    window = flags.pop("window")
    forward, backward = a.tiles(D, dtype, False, window), a.tiles(D, dtype, True, window)
    sizes |= {"ROPE": True, "PAD": False, "LABELS": False, "BIAS": False, "RUNS": False, "MASKED": False, "KEYS": 4} | flags
    if window and dtype != torch.float32 and D <= 64:
        check(p.attend_groups, sizes | {"BM": forward.queries, "BN": forward.keys}, types, "*fp32", forward.warps, 1, note)
    check(p.attend, sizes | {"BM": forward.queries, "BN": forward.keys}, types, "*fp32", forward.warps, forward.stages, note)
    sizes |= {"BM": backward.queries, "BN": backward.keys}
    for kernel in (g.key_gradients, g.query_gradients):
        check(kernel, sizes, types, "*fp32", backward.warps, backward.stages, note)

scan("bf16", 4)
attend(torch.bfloat16, 64, window=True, PAD=True)
if whole:
    scan("bf16", 1)
    scan("fp16", 4)
    scan("fp32", 2)
    attend(torch.bfloat16, 64, window=True)
    attend(torch.float16, 64, window=True, PAD=True, MASKED=True, LABELS=True)
    attend(torch.bfloat16, 64, window=False, RUNS=True, ROPE=False)
    attend(torch.bfloat16, 64, window=False, RUNS=True, ROPE=True)
    for D in (32, 128, 256):
        attend(torch.bfloat16, D, window=False, BIAS=True, LABELS=True, PAD=True)
    for D in (32, 64, 128, 256):
        attend(torch.float32, D, window=True, PAD=True)

WIDTH = 2048
check(d.along_rows, {"BLOCK": WIDTH}, {"mask": "*u8", "g": "*i16", "width": "i32"}, None, 4)
types = {"g": "*i16", "out": "*i32", "height": "i32", "width": "i32"}
check(d.across_rows, {"ROWS": d.ROWS, "COLUMNS": d.COLUMNS}, types, None, 4)
"""
SHARED = {80: 163 * 1024, 90: 227 * 1024}
SCAN = {
    32: 128,
    64: 255,
}  # registers of F1 and F3 by lanes: 16 or 8 programs to a multiprocessor, as the chunks suppose


def spilled(kernel, capability):
    """Bytes of registers that a thread may keep in memory.  None to speak of where models run, on Hopper with 16-bit heads of
    up to 64 channels; Ampere's products need more registers, and larger heads or float32 are there for completeness."""
    words = kernel["note"].split()
    if len(words) > 1 and (words[0] == "fp32" or words[1] in ("128", "256")):
        return 4096
    return 400 if capability == 80 else 64


@pytest.mark.parametrize(
    ("capability", "extent"),
    [(90, "short"), *(pytest.param(c, "whole", marks=pytest.mark.slow) for c in (80, 90))],
)
def test_compiles_and_keeps_to_registers(capability, extent, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-c", CHILD.replace("\\\\", "\\"), str(capability), str(tmp_path), extent]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert len(found) == (13 if extent == "short" else 69)
    for kernel in found:
        assert kernel["shared"] <= SHARED[capability], kernel
        assert kernel.get("STACK", 0) <= spilled(kernel, capability), kernel
        assert kernel["kernel"] != "scan_chunks" or kernel.get("REG", 0) <= SCAN[kernel["lanes"]], kernel
        if (
            capability == 90
            and "attend" in kernel["kernel"]
            and "fp32" not in kernel["note"]
            and " 256 " not in kernel["note"]
        ):
            assert kernel["wgmma"], kernel
