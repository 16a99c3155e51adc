"""Packs of any sizes launch few variants of each kernel: Triton compiles one for every set of constants, integers that are 1
or divisible by 16, and pointers that are."""

import inspect
import json
import random
import runpy
import shlex
from collections import defaultdict
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from hrsam.kernels import attend, cycle_scan
from hrsam.layout import Layout
from hrsam.ops import cycle_scan as scan
from hrsam.ops import full, window
from hrsam.ops.rope import Rope


def specialised(kernel, *args, **options):
    """What Triton compiles a variant of ``kernel`` for, by name of the argument."""
    parameters = inspect.signature(kernel.fn).parameters
    loose = getattr(kernel, "do_not_specialize", None) or getattr(kernel, "kwargs", {}).get("do_not_specialize") or ()
    key = {}
    for name, value in {**dict(zip(parameters, args)), **options}.items():
        constant = name not in parameters or "constexpr" in str(parameters[name].annotation)
        if torch.is_tensor(value):
            key[name] = value.dtype, value.data_ptr() % 16 == 0
        elif constant:
            key[name] = value
        elif isinstance(value, int) and name not in loose:
            key[name] = "one" if value == 1 else value % 16 == 0
        else:
            key[name] = type(value).__name__
    return key


@pytest.fixture
def launched(monkeypatch):
    """Variants of each kernel that is launched, without running it: {name: [{argument: what it is compiled for}]}."""
    variants = defaultdict(list)

    class Launch:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def run(*args, **options):
                found = specialised(self.kernel, *args, **options)
                if found not in variants[self.kernel.fn.__name__]:
                    variants[self.kernel.fn.__name__].append(found)

            return run

    for module, names in (
        (attend.programs, "attend attend_groups"),
        (attend.gradients, "key_gradients query_gradients"),
        (cycle_scan.programs, "scan_chunks enter_chunks chain_states"),
        (cycle_scan.gradients, "local_adjoints chain_adjoints gradients"),
    ):
        for name in names.split():
            monkeypatch.setattr(module, name, Launch(getattr(module, name)))
    return variants


def random_layouts(count):
    """Packs of pictures of any size, each with an anchor grid; the first are of whole windows."""
    rng = random.Random(0)
    layouts = [Layout(((16, 16), (16, 16)), (0, 0)), Layout(((32, 16), (16, 16)), (0, 0))]
    while len(layouts) < count:
        images = rng.randint(1, 3)
        grids = [grid for _ in range(images) for grid in ((rng.randint(1, 40), rng.randint(1, 40)), (16, 16))]
        layouts.append(Layout(tuple(grids), tuple(image for image in range(images) for _ in "ab")))
    return layouts


def varying(variants):
    """Arguments that differ between variants, with all their values."""
    names = {name for variant in variants for name in variant}
    values = {name: {variant.get(name) for variant in variants} for name in names}
    return {name: found for name, found in values.items() if len(found) > 1}


@pytest.mark.parametrize("shift", [0, 8])
def test_window_attention_of_packs(launched, shift):
    pad = torch.zeros(2, 64, dtype=torch.bfloat16, requires_grad=True)
    for layout in random_layouts(30):
        q = torch.zeros(layout.tokens, 2, 64, dtype=torch.bfloat16, requires_grad=True)
        y = window.window_attention(q, q, q, layout, shift=shift, rope=Rope(), pad_kv=(pad, pad), impl="triton")
        torch.autograd.grad(y.sum(), (q, pad))
    assert sorted(launched) == ["attend_groups", "key_gradients", "query_gradients"]
    for variants in launched.values():  # with and without padding; with a shift there always is some
        assert varying(variants) == ({"PAD": {True, False}} if shift == 0 else {})


def test_full_attention_of_packs(launched):
    for layout in random_layouts(30):
        q = torch.zeros(layout.tokens, 2, 64, dtype=torch.bfloat16, requires_grad=True)
        torch.autograd.grad(full.full_attention(q, q, q, layout, rope=Rope(), impl="triton").sum(), q)
    assert {name: len(variants) for name, variants in launched.items()} == {
        "attend": 1,
        "key_gradients": 1,
        "query_gradients": 1,
    }


@pytest.mark.parametrize("across", [False, True])
def test_cycle_scan_of_packs(launched, across):
    layouts = [*random_layouts(20), *(Layout((grid,), (0,)) for grid in ((1, 1), (3, 5), (4, 4)))]
    assert {layout.tokens % 16 == 0 for layout in layouts} == {True, False}
    for layout in layouts:
        u, b = torch.zeros(layout.tokens, 32, requires_grad=True), torch.zeros(layout.tokens, 4)
        shared = torch.zeros(32), torch.zeros(32, 4), b, b, torch.zeros(32), torch.ones(32, 2)
        torch.autograd.grad(scan.cycle_scan(u, u, *shared, layout, across=across, impl="triton").sum(), u)
    scans = launched.pop("scan_chunks")  # for end states and for outputs
    assert varying(scans) == {"OUTPUTS": {True, False}}
    assert len(launched) == 5
    assert all(len(variants) == 1 for variants in launched.values())


def test_the_tool_that_times_the_scan_knows_the_kernel(tmp_path, monkeypatch):
    tool = Path(cycle_scan.__file__).parents[2] / "tools" / "tune_scan.py"
    options = shlex.split(
        "--tokens 20 --channels 8 --states 4 --chunks 2 --registers 0 --forms float32 --seconds 0.001"
    )
    monkeypatch.setattr("sys.argv", [str(tool), *options, "--out", str(tmp_path / "times.json")])
    runpy.run_path(str(tool), run_name="__main__")
    rows = json.loads((tmp_path / "times.json").read_text())["rows"]
    assert {row["kernel"] for row in rows} == {"F1", "F3"}
    assert all(row["us"] > 0 for row in rows)
