"""What the profiling tools make of what profilers print."""

import runpy
from pathlib import Path

import pytest

TOOLS = Path(__file__).parent.parent / "tools"
UNITS = {
    "ID": "",
    "Host Name": "",
    "Kernel Name": "",
    "gpu__time_duration.sum": "ns",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "%",
}
UNITS |= {"sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active": "%"}
UNITS |= {
    f"smsp__average_warps_issue_stalled_{name}_per_issue_active.ratio": "" for name in ("wait", "long_scoreboard")
}


def printed(kernels):
    """As ``ncu --csv --page raw`` prints launches of ``kernels`` by name and nanoseconds."""
    rows = [UNITS, UNITS.values()]
    rows += [
        [i, "127.0.0.1", f"{name}(int)", f"{time:,}", "48.6", "70.25", "1", "3"]
        for i, (name, time) in enumerate(kernels)
    ]
    return ["==PROF== Connected", *(",".join(f'"{value}"' for value in row) for row in rows)]


def test_kernels_are_told_without_their_first_calls():
    tool = runpy.run_path(str(TOOLS / "profile_kernels.py"))
    launches = [(name, 1000 * i) for i, name in enumerate(["attend_groups"] * 4 + ["attend"] * 2 + ["scan_chunks"] * 4)]
    rows = tool["kernels_of"](printed(launches))
    assert [(row["kernel"], row["us"]) for row in rows] == [
        ("attend_groups", 1.0), ("attend_groups", 3.0), ("attend", 5.0), ("scan_chunks", 8.0), ("scan_chunks", 9.0),
    ]  # fmt: skip
    assert [row["kernel"] for row in rows] == list(tool["KERNELS"].values())
    assert rows[0]["memory"] == 48.6
    assert rows[0]["pipes"] == {"xu": 70.2}
    assert rows[0]["waits"] == {"long_scoreboard": 75.0, "wait": 25.0}
    assert rows[0]["registers"] is None


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_sm90_tst_192x192_64x4_2x1_v_bz_coopB_bias_TNN", "matrix products"),
        ("conv2d_c1_k1_nhwc", "matrix products"),
        ("scan_chunks", "cycle scans"),
        ("attend_groups", "window attention"),
        ("triton_per_fused__to_copy_add_convolution_native_layer_norm_permute_9", "norms, residual sums, gates"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
    ],
)
def test_every_kernel_has_a_kind(kernel, kind):
    assert runpy.run_path(str(TOOLS / "profile_encoder.py"))["kind_of"](kernel) == kind
