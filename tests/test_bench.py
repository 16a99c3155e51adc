"""Benchmarks on a CPU with tiny sizes: what is reported, and that a wrong result has no speed."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from hrsam import cli
from hrsam.bench import command, scan
from hrsam.bench.flops import flops, scan_updates
from hrsam.bench.gate import BenchError, Gate
from hrsam.bench.models import redraw
from hrsam.bench.timing import ceilings, compare, machine
from hrsam.models.model import HRSAM
from hrsam.models.presets import PRESETS
from tests.builders import small_model

CPU = torch.device("cpu")


class Fast(nn.Module):
    """Stands in for an optimised model; ``error`` is added to features and logits."""

    def __init__(self, model, error):
        super().__init__()
        self.model, self.error = model, error

    def encoder(self, pixels):
        return self.model.encoder(pixels) + self.error

    def decode(self, *prompt, **options):
        decoded = self.model.decode(*prompt, **options)
        return type(decoded)(decoded.logits + self.error, decoded.iou)


@pytest.fixture
def optimize(monkeypatch):
    """``optimize(error)``: what ``model.optimize`` returns is off by ``error``; before, or while it does not exist, by 0."""

    def put(error):
        monkeypatch.setattr(HRSAM, "optimize", lambda self, **_: Fast(self, error), raising=False)

    if not hasattr(HRSAM, "optimize"):
        put(0)
    return put


@pytest.fixture
def bench(monkeypatch, capsys):
    """``bench(*arguments)``: ``hrsam bench`` -> exit code, stdout, stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["hrsam", "bench", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        return caught.value.code or 0, out, err

    return run


@pytest.mark.parametrize(
    ("preset", "side", "gmac", "updates"),
    [
        ("hrsam_b", 512, 103, 0.30),
        ("hrsam_b", 1024, 412, 1.21),
        ("hrsam_b", 2048, 1649, 4.83),
        ("hrsam_b", 3072, 3711, 10.9),
        ("hrsam_b", 4096, 6597, 19.3),
        ("hrsam_pp_b", 1024, 567, 3.02),
        ("hrsam_pp_b", 2048, 1932, 10.3),
        ("hrsam_pp_b", 4096, 7392, 39.3),
    ],
)
def test_operations_counted_by_hand(preset, side, gmac, updates):
    config = PRESETS[preset]().encoder
    assert flops(config, side) / 2e9 == pytest.approx(gmac, rel=0.01)
    assert scan_updates(config, side) / 1e9 == pytest.approx(updates, rel=0.01)


def test_functions_are_called_in_turn_and_checked_first():
    calls = []
    functions = {name: lambda name=name: calls.append(name) or name for name in ("a", "b")}

    def check(results):
        assert results == {"a": "a", "b": "b"}
        calls.append("check")

    times = compare(functions, seconds=1e-9, device=CPU, check=check)
    warm, timed = calls[: calls.index("check")], calls[calls.index("check") + 1 :]
    assert set(warm) == {"a", "b"}
    assert "".join(timed).endswith("ab" * 5)
    assert list(times) == ["a", "b"]
    for t in times.values():
        assert t.repeats == 5
        assert 0 < t.low_ms <= t.median_ms <= t.high_ms
        assert t.peak_gib is None


def test_more_time_means_more_rounds():
    assert compare({"a": lambda: torch.ones(1000).sum()}, seconds=0.05, device=CPU)["a"].repeats > 20


def test_only_optional_functions_may_fail():
    def fail():
        raise RuntimeError("no kernel for this size\nand a long story")

    skipped = {}
    functions = {"a": int, "b": fail}
    assert list(compare(functions, seconds=1e-9, device=CPU, optional=("b",), skipped=skipped)) == ["a"]
    assert skipped == {"b": "no kernel for this size"}
    with pytest.raises(RuntimeError, match="no kernel"):
        compare(functions, seconds=1e-9, device=CPU)


def test_the_gate_is_a_budget_of_the_data():
    high = torch.randn(1000, dtype=torch.float64)
    low = high.float() + 1e-3
    gate = Gate()
    gate.check("near", high.float() + 1.9e-3, high, low)
    for wrong in (high.float() + 2.1e-3, torch.full((1000,), torch.nan)):
        with pytest.raises(BenchError, match=r"^far is wrong: .* no speed is shown"):
            gate.check("far", wrong, high, low)
    with pytest.raises(BenchError):
        gate.check("far", high.float(), high, low * torch.nan)
    with pytest.raises(BenchError, match="shapes differ"):
        gate.check("far", high[:5].float(), high, low)
    assert gate.errors[0] == {
        "name": "near", "error": pytest.approx(1.9e-3, rel=1e-3), "plain_error": pytest.approx(1e-3, rel=1e-3),
        "budget": pytest.approx(2e-3, rel=1e-2), "of_budget": pytest.approx(0.95, rel=1e-2),
        "largest_value": pytest.approx(float(high.abs().max()), rel=1e-3),
    }  # fmt: skip


def test_of_many_results_the_worst_counts():
    high = {name: torch.randn(100, dtype=torch.float64) for name in "abc"}
    low = {name: value.float() + 1e-3 for name, value in high.items()}
    got = {name: value.float() + error for (name, value), error in zip(high.items(), (1e-4, 1.5e-3, 1e-3))}
    low["a"] = high["a"].float()  # exact by chance
    gate = Gate()
    gate.check_all("gradients", got, high, low)
    assert [entry["name"] for entry in gate.errors] == ["gradients: b"]
    got["c"] = got["c"] * torch.nan
    with pytest.raises(BenchError, match="gradients: c is wrong"):
        gate.check_all("gradients", got, high, low)


def test_where_and_when():
    found = machine(CPU)
    assert found["device"]
    assert found["driver"] is None
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"].keys() >= {"python", "triton", "cuda"}
    assert found["commit"] is None or len(found["commit"].removesuffix("-dirty")) == 40
    assert set(ceilings(CPU).values()) == {None}


def test_every_parameter_is_redrawn():
    before, after = small_model(seed=3), redraw(small_model(seed=3), seed=4)
    again = redraw(small_model(seed=5), seed=4)
    for (name, old), new, other in zip(before.named_parameters(), after.parameters(), again.parameters()):
        assert (new != old).any(), name
        assert new.std() > 0, name
        if name.rsplit(".", 1)[-1] not in ("A_log", "dt_bias"):
            assert torch.equal(new, other), name


EXPECTED = {
    "encoder": {"ours optimized", "ours eager", "reference flow, torch scan"},
    "train-step": {"ours eager", "reference flow, torch scan"},
    "packing": {"packed", "packed, a new layout each step", "padded to the largest"},
    "click": {"ours optimized", "ours eager"},
    "scan": {"ours", "ours with one cycle, sequence repeated"},
    "attention": {"ours", "SDPA flash", "SDPA math"},
    "demo": {"click to mask, through the server", "the same without a server"},
}
SKIPPED = {
    "encoder": {"reference flow, mamba scan", "SAM ViT-B (timm)"},
    "train-step": {"reference flow, mamba scan", "ours compiled"},
    "packing": set(),
    "click": set(),
    "scan": {"mamba-ssm, sequence repeated"},
    "attention": {"SDPA cuDNN", "FlexAttention, compiled"},
    "demo": set(),
}


def test_every_benchmark_is_tried():
    assert command.BENCHES.keys() - EXPECTED.keys() == {"page"}  # in test_page.py: it needs a browser


@pytest.mark.parametrize("what", EXPECTED)
def test_quick_reports(what, optimize, tmp_path):
    out = tmp_path / "new" / "folder" / "report.json"
    report = command.run(what, out, device="cpu", quick=True, peers=what == "encoder")
    assert json.loads(out.read_text()) == report
    assert (report["bench"], report["quick"]) == (what, True)
    assert {row["name"] for row in report["rows"]} == EXPECTED[what]
    for row in report["rows"]:
        low, high = row["quantiles_20_80"]
        assert 0 < low <= row["median_ms"] <= high
        assert (row["ratio"] == 1) or row["name"] != row["ratio_to"]
        assert row["ratio"] > 0
    assert report["errors"]
    assert all(entry["of_budget"] <= 1 for entry in report["errors"])
    assert {entry["name"] for entry in report["skipped"]} == SKIPPED[what]
    assert all(entry["why"] for entry in report["skipped"])
    headings, cells = command.table(report["rows"])
    assert "median ms" in headings
    assert "peak GiB" not in headings  # there is none on a CPU
    assert {len(row) for row in cells} == {len(headings)}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_other_precisions(dtype, optimize):
    report = command.run("click", device="cpu", quick=True, dtype=dtype, sides=[32])
    assert {row["grid"] for row in report["rows"]} == {2}
    assert {row["clicks"] for row in report["rows"]} == {1, 5, 20}
    assert report["dtype"] == dtype


@pytest.mark.parametrize(("what", "name"), [("encoder", "hrsam_b 64: ours optimized"), ("click", "hrsam_pp_b 64 1")])
def test_a_wrong_result_has_no_speed(what, name, optimize, bench, tmp_path):
    optimize(0.5)
    code, out, err = bench(what, "--quick", "--device", "cpu", "--out", tmp_path / "report.json")
    assert (code, out) == (2, "")
    assert name in err
    assert "is wrong" in err
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_scan_has_no_speed(monkeypatch, bench):
    right = scan.cycle_scan
    monkeypatch.setattr(scan, "cycle_scan", lambda *x, impl: right(*x, impl=impl) * (1.01 if impl == "auto" else 1))
    code, out, err = bench("scan", "--quick", "--device", "cpu")
    assert (code, out) == (2, "")
    assert "16 float32: y is wrong" in err


def test_command_line(bench, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    out = tmp_path / "scan.json"
    code, text, err = bench(
        "scan", "--quick", "--device", "cpu", "--dtype", "float32", "--side", 48, "--side", 32, "--out", out
    )
    assert (code, err) == (0, "")
    for expected in ("median ms", "forward and backward", "skipped: mamba-ssm", "checked before timing", str(out)):
        assert expected in text
    report = json.loads(out.read_text())
    assert [row["tokens"] for row in report["rows"]] == [9] * 4 + [4] * 4
    assert {row["dtype"] for row in report["rows"]} == {"float32"}
    assert report["command"].startswith("PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True hrsam bench scan --quick")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["encodr"], "no benchmark 'encodr'; did you mean 'encoder'?"),
        (["scan", "--preset", "hrsam_b"], "the benchmark scan has no presets; leave --preset out"),
        (["scan", "--dtype", "int8"], "no precision 'int8'; choose one of bfloat16"),
        (["scan", "--side", "50"], "multiples of 16 pixels; got 50"),
        (["encoder", "--preset", "sam_b"], "no preset 'sam_b'"),
        (["attention", "--side", "1040"], "multiples of 256 pixels"),
        (["scan", "--out", "file/report.json"], "the folder file cannot be made"),
        (["scan", "--out", "."], ". is a folder; name a file"),
    ],
)
def test_what_a_person_does_wrong(arguments, message, bench, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    code, out, err = bench(*arguments, "--device", "cpu")
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_the_script_is_the_command(monkeypatch):
    seen = []
    monkeypatch.setattr(cli, "main", lambda: seen.append(sys.argv[1:]))
    monkeypatch.setattr(sys, "argv", ["reference_flow.py", "--quick"])
    runpy.run_path(str(Path(cli.__file__).parents[1] / "tools" / "reference_flow.py"))
    assert seen == [["bench", "encoder", "--quick"]]
