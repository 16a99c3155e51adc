"""Every kernel compiles for sm_80 and sm_90 without a GPU, fits the card and keeps its values in registers."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

# Interpreted kernels cannot be compiled, so this runs in a process of its own, without TRITON_INTERPRET.
CHILD = """
import json, pathlib, re, subprocess, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hrsam.kernels import cycle_scan as k

capability, folder = int(sys.argv[1]), pathlib.Path(sys.argv[2])
tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
CONSTANTS = {"N": 32, "NP": 32, "R": 3, "CHUNK": k.CHUNK, "AHEAD": k.CHAIN_AHEAD, "channels": 192}
CONSTANTS |= {"u_row": 384, "r_row": 256, "B_row": 256, "C_row": 256, "w_row": 192}

def kind(name):
    if name in constants:
        return "constexpr"
    if name in ("w", "u", "r", "B", "C", "y", "d_u", "d_r"):
        return "*bf16"
    return {"tokens": "i32", "chunks": "*i32", "first_chunk": "*i32"}.get(name, "*fp32")

for name in ("local_states", "chain_states", "outputs", "local_adjoints", "chain_adjoints", "gradients"):
    kernel = getattr(k.programs, name)
    chain = name.startswith("chain")
    constants = CONSTANTS | {"BC": k.CHAIN_LANES if chain else k.LANES}
    signature = {argument: kind(argument) for argument in kernel.arg_names}
    source = ASTSource(kernel, signature, {a: constants[a] for a, t in signature.items() if t == "constexpr"})
    warps = k.CHAIN_WARPS if chain else 1
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    found = {"kernel": name, "shared": compiled.metadata.shared}
    cubin = folder / f"{name}.{capability}.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    if tool.exists():
        usage = subprocess.check_output([tool, "--dump-resource-usage", cubin], text=True)
        found.update({resource: int(value) for resource, value in re.findall(r"\\b(REG|STACK):(\\d+)", usage)})
    print("FOUND", json.dumps(found))

from hrsam.kernels import distance as d
WIDTH = 2048
for name, types, constants, warps in (
    ("along_rows", {"mask": "*u8", "g": "*i16", "width": "i32"}, {"BLOCK": WIDTH}, 4),
    ("across_rows", {"g": "*i16", "out": "*i32", "height": "i32", "width": "i32"}, {"ROWS": d.ROWS, "COLUMNS": d.COLUMNS}, 4),
):
    kernel = getattr(d, name)
    signature = {a: types.get(a, "constexpr") for a in kernel.arg_names}
    source = ASTSource(kernel, signature, constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    print("FOUND", json.dumps({"kernel": name, "shared": compiled.metadata.shared}))
"""


@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_compiles_and_keeps_to_registers(capability, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-c", CHILD, str(capability), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert len(found) == 8
    for kernel in found:
        assert kernel["shared"] <= 48 * 1024, kernel
        assert kernel.get("STACK", 0) <= 32, kernel  # bytes of spilled registers; none with Triton 3.7
